"""Facts from torch.distributed about this process and a group, and whether a launcher has started other processes."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the size of the default group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def process_group_of(process_group: Any) -> Any:
    """Return a ProcessGroup as it is, or the one of a DeviceMesh of one dimension. None stays None."""
    return process_group.get_group() if hasattr(process_group, "get_group") else process_group


def backends_of(process_group: Any) -> dict[str, str]:
    """Return the backend of each type of device."""
    return dict(dist.BackendConfig(dist.Backend(dist.get_backend_config(process_group))).get_device_backend_map())


def is_of_signal_handler(error: RuntimeError) -> bool:
    """Whether an error that ended a wait comes from a signal handler, such as a DataLoader's, and not from the wait."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = "" if traceback is None else f"{traceback.tb_frame.f_globals.get('__name__')}."
    return not module.startswith(("pyzero.", "torch.")) or module.startswith("torch.utils.data.")


def check_alone(process_group: Any) -> None:
    """Raise ValueError if a process group is given, or a launcher has started other ranks."""
    if process_group is not None:
        raise ValueError(
            "expected an initialised process group, got a process_group with none; "
            "call torch.distributed.init_process_group first, or leave it out"
        )
    num_ranks = os.environ.get("WORLD_SIZE", "1")
    if num_ranks.isdigit() and int(num_ranks) > 1 and "RANK" in os.environ:
        raise ValueError(
            f"expected an initialised process group, for a launcher has started WORLD_SIZE={num_ranks} processes, got "
            f"none: they would train {num_ranks} models apart; call torch.distributed.init_process_group() before the "
            f"optimizer is built, or unset WORLD_SIZE to train apart"
        )
