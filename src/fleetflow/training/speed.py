"""How fast a network trains on this machine."""

import time

import numpy as np
import torch

from fleetflow.inference.device import autocast
from fleetflow.models.weights import load
from fleetflow.training.optimizers import optimizers


def training_speed(network: str, dtype: torch.dtype, seconds: float) -> float:
    """Returns samples per second of whole training steps at 256x320, batch 8, on the CPU (median step)."""
    model = load(network, weights=False).train()
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    updates = optimizers(model, 1e-4, 0.0)
    frame1, frame2 = (torch.rand(8, 3, 256, 320).to(memory_format=torch.channels_last) for _ in range(2))
    taken: list[float] = []
    while len(taken) < 4 or sum(taken) < seconds:
        start = time.perf_counter()
        with autocast(torch.device("cpu"), dtype):
            prediction = model(frame1, frame2)
        loss = prediction.flow.square().mean() + sum(
            step.float().square().mean() for step in prediction.intermediate_flows
        )
        loss.backward()
        for update in updates:
            update.step()
            update.zero_grad()
        taken.append(time.perf_counter() - start)
    return 8 / float(np.median(taken[1:]))
