"""Facts from torch.distributed about this process and a group, and whether a launcher has started other processes."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch.distributed as dist

_inherited: weakref.WeakSet[Any] = weakref.WeakSet()  # process groups of the process that this one was forked from


def _note_inherited() -> None:
    if dist.is_available() and dist.is_initialized():
        _inherited.update(dist.distributed_c10d._world.pg_map)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_inherited)


def check_made_here(process_group: Any) -> None:
    """Raise RuntimeError if this process is a fork that has inherited the group: it shares sockets, without threads."""
    if process_group in _inherited:
        raise RuntimeError(
            "expected a process group that this process has made, got one of the process that it was forked from, "
            "which does not work in a fork; fork before torch.distributed.init_process_group, or start the process "
            "with the spawn method"
        )


def check_built_here(pid: int) -> None:
    """Raise RuntimeError if this process is a fork. pid: Of the process that built the optimizer."""
    if os.getpid() != pid:
        raise RuntimeError(
            "expected the process that built the optimizer, got a fork of it, in which process groups do not work; "
            "train and save in the process that built it"
        )


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
