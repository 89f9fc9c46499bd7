"""deepspeed.comm: torch.distributed under DeepSpeed's names. Some functions also work without a process group.

Scripts and the engine use it. The optimizer communicates through pyzero/comm/group.py.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import (
    P2POp,
    ProcessGroup,
    ReduceOp,
    all_gather,
    all_gather_object,
    all_to_all,
    all_to_all_single,
    batch_isend_irecv,
    broadcast_object_list,
    destroy_process_group,
    gather,
    init_process_group,
    irecv,
    is_available,
    is_initialized,
    isend,
    monitored_barrier,
    new_group,
    recv,
    reduce,
    reduce_scatter,
    scatter,
    send,
)

from pyzero.deepspeed import launcher
from pyzero.deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT

log = logging.getLogger("pyzero")

__all__ = [
    "P2POp",
    "ProcessGroup",
    "ReduceOp",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "destroy_process_group",
    "gather",
    "get_global_rank",
    "get_local_rank",
    "get_rank",
    "get_world_group",
    "get_world_size",
    "init_distributed",
    "init_process_group",
    "irecv",
    "is_available",
    "is_initialized",
    "isend",
    "log_summary",
    "monitored_barrier",
    "new_group",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
]

# torch 2.13 renames these, and warns about the old names.
all_gather_into_tensor: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_tensor: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Join the ranks that a launcher started. Do nothing without a launcher, or if there is a process group.

    Args:
        dist_backend: "nccl" or "gloo"; default: the one that suits the device.
        auto_mpi_discovery: Ignored; MPI is not asked.
        distributed_port: Ignored; torchrun's port is used.
        verbose: Ignored.
        timeout: Timeout of collectives; default: torch's.
        init_method: As for torch.distributed.init_process_group, with `rank` and `world_size`.
        dist_init_required: False does nothing.
        config: Ignored.
        rank: Rank of this process, if init_method is given; -1: init_method gives it.
        world_size: Number of processes, if init_method is given; -1: init_method gives it.
    """
    if dist_init_required is False or is_initialized():
        return
    if init_method is None:
        launcher.join(dist_backend, timeout)
        return
    backend = dist_backend or ("nccl" if launcher.device().type == "cuda" else "gloo")
    launcher.take_device()
    dist.init_process_group(backend, init_method=init_method, timeout=timeout, rank=rank, world_size=world_size)


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> None:
    """Log a line that recommends torch.profiler, because collectives are not logged here."""
    if get_rank() == 0:
        log.info("comm.log_summary(): collectives are not logged; use torch.profiler, which shows each")


def get_rank(group: Any = None) -> int:
    """Return this process's rank in a group; 0 without a process group."""
    return dist.get_rank(group) if is_initialized() else 0


def get_world_size(group: Any = None) -> int:
    """Return the number of ranks in a group; 1 without a process group."""
    return dist.get_world_size(group) if is_initialized() else 1


def get_local_rank() -> int:
    """Return this process's rank on its host."""
    return launcher.local_rank()


def get_global_rank(group: Any = None, group_rank: int = 0) -> int:
    """Return the rank in the default group of a rank of another group."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def get_world_group() -> Any:
    """Return the default group; None without one."""
    return dist.group.WORLD if is_initialized() else None


def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
    """Call torch's barrier; do nothing without a process group."""
    return dist.barrier(group, async_op, device_ids) if is_initialized() else None


def all_reduce(tensor: Tensor, op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
    """Call torch's all_reduce; do nothing without a process group."""
    return dist.all_reduce(tensor, op, group, async_op) if is_initialized() else None


def broadcast(tensor: Tensor, src: int, group: Any = None, async_op: bool = False) -> Any:
    """Call torch's broadcast; do nothing without a process group."""
    return dist.broadcast(tensor, src, group, async_op) if is_initialized() else None
