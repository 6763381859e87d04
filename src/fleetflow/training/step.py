"""One batch: predict, loss, backward, clip the gradient, step the optimizers, average the weights."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.swa_utils import AveragedModel

from fleetflow.evaluation.metrics import end_point_error
from fleetflow.inference.device import autocast
from fleetflow.models import weights
from fleetflow.models.base import FlowModel
from fleetflow.training.checkpoint import Checkpoint
from fleetflow.training.distill import taught
from fleetflow.training.distributed import Team
from fleetflow.training.recipe import Stage
from fleetflow.types import FleetflowError, Prediction, Sample

BAD_STEPS = 20  # so many steps with a loss that is no number or explodes end the run
SILENT_EVERY = 100  # steps between looks for weights whose gradient is zero
EXPLODED = 50.0  # a loss so many times the median of the last 200 is not learned from


@dataclass
class History:
    """How the last steps of a run went: what decides whether a batch is learned from."""

    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=200))  # loss and EPE
    skipped: int = 0  # steps of the run that were not learned from, for a loss that is no number or explodes
    skipped_in_a_row: int = 0
    unknown_in_a_row: int = 0  # batches without a pixel of known flow
    silent: frozenset[str] = frozenset()  # weights whose gradient was zero when that was looked for last

    def exploded(self, loss: float) -> bool:
        """Returns whether the loss is far beyond those of the last steps."""
        return len(self.recent) >= 100 and loss > EXPLODED * median(row[0] for row in self.recent)

    def look_for_silence(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the names of weights whose gradient is zero now and was when this was called last.

        So it is behind a layer whose units are all dead, or gates so far open or shut that they let none through: that
        part of a network has stopped learning, which neither the loss nor the gradient's norm shows. Weights that have
        no gradient at all (frozen, or in no use) are not named.
        """
        now = frozenset(
            name.replace("_checkpoint_wrapped_module.", "")
            for name, weight in model.named_parameters()
            if weight.grad is not None and not weight.grad.any()
        )
        both, self.silent = now & self.silent, now
        return tuple(sorted(both))

    def note(self, result: "StepResult") -> None:
        """Counts a step; raises FleetflowError where many batches in a row have no known flow."""
        self.unknown_in_a_row = 0 if result.known else self.unknown_in_a_row + 1
        if self.unknown_in_a_row == BAD_STEPS:
            raise FleetflowError(f"{BAD_STEPS} batches in a row have no known flow; look at `fleetflow doctor dataset`")
        if result.learned:
            self.recent.append((result.loss, result.epe))
            self.skipped_in_a_row = 0
        elif result.bad:
            self.skipped += 1
            self.skipped_in_a_row += 1


@dataclass(frozen=True)
class StepResult:
    """What a step gave: means over the batch, and what was done with it."""

    loss: float
    epe: float  # pixels
    grad_norm: float  # before it was clipped
    learning_rate: float
    known: bool  # the batch has pixels of known flow
    learned: bool
    bad: bool  # the loss is no number, or exploded
    worst: tuple[float, Sample]  # the part of the batch with the largest loss, and that loss
    shown: tuple[Sample, Tensor]  # the last part and its predicted flow
    silent: tuple[str, ...] = ()  # weights that had a gradient of zero at this look and the one before


class Training:
    """A stage in training: the network, the average of its weights, and what changes them."""

    def __init__(
        self, stage: Stage, model: FlowModel, team: Team, dtype: torch.dtype, *, compile=False, save_memory=False
    ):
        """Prepares a network, which is changed, for a stage.

        Args:
            stage: of a recipe.
            model: on the device of the team.
            team: the processes that train together.
            dtype: of the convolutions.
            compile: use torch.compile.
            save_memory: compute activations of blocks again instead of keeping them.
        """
        self.stage, self.team, self.dtype = stage, team, dtype
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.model = model.train()
        if stage.freeze_norm:
            for layer in model.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.eval()
        self.average = AveragedModel(model, multi_avg_fn=_ema(stage.ema))
        self.optimizers = stage.optimizer(model, stage.learning_rate, stage.weight_decay)
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.scaler = torch.amp.GradScaler(team.device.type, enabled=dtype == torch.float16)
        self.first_flow = weights.load(stage.initial_flow).to(team.device) if stage.initial_flow else None
        self.teacher = weights.load(stage.teacher).to(team.device) if stage.teacher else None
        if save_memory:
            _compute_again(model)
        self.parallel: DistributedDataParallel | None = None
        if team.world > 1:
            devices = [team.device] if team.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(model, device_ids=devices)
        called = self.parallel or model
        self.called = _compiled(called, team.device) if compile else called  # the model, for all processes

    @property
    def averaged(self) -> FlowModel:
        """The network with the average of its weights."""
        model = self.average.module
        assert isinstance(model, FlowModel)  # a copy of `self.model`
        return model

    def set_learning_rate(self, step: int) -> float:
        """Sets the learning rate of a step of the stage in all optimizers; returns that of the first one."""
        factor = self.stage.schedule(step, self.stage.steps)
        for optimizer, rates in zip(self.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        return self.optimizers[0].param_groups[0]["lr"]

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes over the state in a checkpoint; raises TypeError, ValueError, ... where it is that of something else."""
        self.model.load_state_dict(checkpoint.model)
        self.average.load_state_dict(checkpoint.average)
        self.scaler.load_state_dict(checkpoint.scaler)
        for optimizer, saved in zip(self.optimizers, checkpoint.optimizers, strict=True):
            check_sizes(optimizer, saved)
            optimizer.load_state_dict(saved)
        torch.set_rng_state(checkpoint.random)


def train_step(training: Training, parts: Iterable[Sample], accumulated: int, step: int, history: History):
    """Learns from one batch, unless its loss is no number or far beyond the last ones.

    Args:
        training: the stage, which is changed.
        parts: the parts of the batch that are this process's, on its device.
        accumulated: the number of parts of the whole batch, over which the gradient is accumulated.
        step: of the stage, from 0.
        history: of the run; the step is noted there.

    Returns:
        A `StepResult`, with means over the batches of all processes.
    """
    learning_rate = training.set_learning_rate(step)
    totals, tried, shown = _accumulate_gradient(training, list(parts), accumulated, step)
    for optimizer in training.optimizers:
        training.scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(training.model.parameters(), training.stage.clip).item()

    loss, errors, known = training.team.sum(totals).tolist()
    epe = errors / known if known else math.nan
    exploded = history.exploded(loss)
    overflowed = training.scaler.is_enabled() and math.isfinite(loss)  # float16 does so to find its scale
    learned = math.isfinite(grad_norm + loss) and not exploded and known > 0
    bad = not learned and known > 0 and (exploded or not overflowed)
    silent = history.look_for_silence(training.model) if learned and (step + 1) % SILENT_EVERY == 0 else ()
    if learned:
        with autocast(training.team.device, training.dtype):  # the products of Muon, too
            for optimizer in training.optimizers:
                training.scaler.step(optimizer)
        training.average.update_parameters(training.model)
    training.scaler.update()
    for optimizer in training.optimizers:
        optimizer.zero_grad(set_to_none=True)

    worst = max(((value.item(), sample) for value, sample in tried), key=lambda row: _or_infinite(row[0]))
    result = StepResult(loss, epe, grad_norm, learning_rate, known > 0, learned, bad, worst, shown, silent)
    history.note(result)
    return result


def _accumulate_gradient(training: Training, parts: list[Sample], accumulated: int, step: int):
    """Adds up the gradients of the parts of a batch.

    Returns [loss, sum of the parts' EPE, parts that have known pixels], the loss of each part, and the last part with
    its flow.
    """
    stage, device = training.stage, training.team.device
    totals, tried = torch.zeros(3, device=device), []
    for k, sample in enumerate(parts):
        if training.parallel:
            training.parallel.require_backward_grad_sync = k + 1 == len(parts)  # processes meet at the last part
        start = initial_flow(training.first_flow, sample, step)
        with autocast(device, training.dtype):
            prediction = training.called(*sample[:2], start, iterations=stage.iterations)
            target = taught(training.teacher, sample)
        loss = stage.loss(prediction, target)
        training.scaler.scale(loss / len(parts)).backward()
        error = end_point_error(prediction.flow.detach().float(), sample.flow)[sample.valid]
        known = error.new_tensor(error.numel() > 0)
        totals += torch.stack((loss.detach() / accumulated, error.sum() / max(error.numel(), 1), known))
        tried.append((loss.detach(), sample))
    return totals, tried, (sample, prediction.flow.detach())


@torch.no_grad()
def initial_flow(network: FlowModel | None, sample: Sample, step: int) -> Prediction | None:
    """Returns the flow of the network for every other pair, by turns, and none for those between."""
    if network is None:
        return None
    flow = network(sample.frame1, sample.frame2).flow
    flow[step % 2 :: 2] = 0
    return Prediction(flow)


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _ema(decay: float):
    """The exponential average, with a shorter memory while the run is young; a decay of 0 gives the weights."""

    @torch.no_grad()
    def update(averages, current, count):
        rate = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, current, 1 - rate)  # pyright: ignore[reportPrivateImportUsage]

    return update


def check_sizes(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Raises ValueError unless the tensors in a saved state have the shapes of their weights: a copy takes memory."""
    shapes = [weight.shape for group in optimizer.param_groups for weight in group["params"]]
    for k, state in saved["state"].items():
        for value in state.values():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != shapes[k]:
                raise ValueError(f"the state of weight {k} is {list(value.shape)}, not {list(shapes[k])}")


def _compute_again(model: FlowModel) -> None:
    """Has the activations of the network's blocks computed again in the backward pass instead of kept."""
    blocks = {block for block in model.children() if len(list(block.children())) and _is_repeatable(block)}
    if not blocks:
        raise FleetflowError("no block of this network can be computed again; train it without --save-memory")
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda layer: layer in blocks
    )


def _is_repeatable(block: nn.Module) -> bool:
    """Whether computing a block again gives the same: no statistics to count twice, no weights made once a step."""
    return not any(
        is_parametrized(layer) or (isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training)
        for layer in block.modules()
    )


def _compiled(called: nn.Module, device: torch.device) -> Callable[..., Prediction]:
    """The module, compiled; raises FleetflowError where nothing can be."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:  # whatever a missing or broken compiler raises
        reason = str(error).strip().splitlines()[0][:200]
        raise FleetflowError(
            f"--compile does not work here ({reason}); install a C++ compiler or leave it out"
        ) from None
    return torch.compile(called, dynamic=False)  # the sizes of a stage are few
