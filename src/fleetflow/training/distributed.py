"""The processes of a training run that torchrun started, on one machine or on several."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from fleetflow.inference.device import choose_device
from fleetflow.types import FleetflowError

PATIENCE = timedelta(hours=12)  # the others wait while the first one validates


def join(device: str) -> tuple[int, int, torch.device]:
    """Returns the rank of this process, the number of processes and its device; joins the others under torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, choose_device(device)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise FleetflowError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {missing[0]} is not set; start with torchrun, or unset it"
        )
    where = choose_device(device)
    if where.type == "cuda":
        where = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=PATIENCE)
    return dist.get_rank(), dist.get_world_size(), where


def agreed(late: bool, where: torch.device, world: int) -> bool:
    """Whether any process is late: all of them stop at the same step."""
    if world == 1:
        return late
    flag = torch.tensor(float(late), device=where)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag.item() > 0


def leave() -> None:
    """Parts from the other processes of torchrun, after the last run; one group serves all runs of a process."""
    if dist.is_initialized():
        dist.destroy_process_group()
