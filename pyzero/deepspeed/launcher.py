"""The device and ranks of a process that a launcher started, and the default process group."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pyzero.comm import process, process_group_pool

_early_group: Any = None  # the group of join_early()
_own_group: Any = None  # the default group, if initialize() made it
_users: set[object] = set()  # one per engine made since then, until its destroy()
# Groups of `subgroup`: by default group, then by their ranks.
_subgroups: weakref.WeakKeyDictionary[Any, dict[tuple[tuple[int, ...], ...], Any]] = weakref.WeakKeyDictionary()


def device() -> torch.device:
    """Return the device that this process computes on.

    With LOCAL_RANK set it is that GPU among the visible ones; without, the current GPU. It is the CPU if there is no
    GPU.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ:  # as under srun and mpirun
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cuda", local_rank() % torch.cuda.device_count())  # under Slurm a rank may see only its own GPU


def take_device() -> None:
    """If LOCAL_RANK is set, make this process's GPU the current one, so that `.cuda()` and "cuda" mean it."""
    if "LOCAL_RANK" in os.environ and device().type == "cuda":
        torch.cuda.set_device(device())


def local_rank() -> int:
    """Return this process's rank on its host: the launcher's LOCAL_RANK, or 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def handle_of(process_group: Any) -> Any:
    """Return the ProcessGroup of a ProcessGroup or of a one-dimensional DeviceMesh; the default group for None."""
    return process.process_group_of(process_group) or dist.group.WORLD


def rank_and_size_in(process_group: Any) -> tuple[int, int]:
    """Return (rank of this process, number of ranks) of a group."""
    handle = handle_of(process_group)
    return dist.get_rank(handle), dist.get_world_size(handle)


def backend_to_join(from_host: bool) -> str | None:
    """Return the backend for `join`. from_host: Whether GPU ranks also send tensors that are in host memory."""
    return "cpu:gloo,cuda:nccl" if from_host and device().type == "cuda" else None


def join(backend: str | None = None, timeout: timedelta | None = None) -> bool:
    """Initialise the default process group if a launcher set RANK and WORLD_SIZE. Return whether this call did it."""
    if not dist.is_available() or dist.is_initialized() or not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return False
    mine = device()
    take_device()
    if mine.type == "cuda":
        dist.init_process_group(backend or "nccl", device_id=mine, timeout=timeout)
    else:
        dist.init_process_group(backend or "gloo", timeout=timeout)
    return True


def join_early(backend: str | None = None) -> None:
    """Call `join` before there is an engine. The next engine then leaves the group, as if it had joined."""
    global _early_group
    if join(backend):
        _early_group = dist.group.WORLD


def claim_early_group() -> bool:
    """Return whether `join_early` made the default group. Return True only once."""
    global _early_group
    group, _early_group = _early_group, None
    return group is not None and group is dist.group.WORLD


def subgroup(members: Sequence[Sequence[int]]) -> Any:
    """Make a group for each of these lists of ranks. Return the one that this rank is in, or None. Collective.

    Groups live as long as the default group, and have its timeout. The same lists give the same groups again.
    """
    made = _subgroups.setdefault(dist.group.WORLD, {})
    wanted = tuple(map(tuple, members))
    if wanted not in made:
        rank, timeout = dist.get_rank(), process_group_pool.timeout_of(dist.group.WORLD)
        handles = [dist.new_group(list(ranks), timeout=timeout) for ranks in wanted]
        made[wanted] = next((handle for handle, ranks in zip(handles, wanted, strict=True) if rank in ranks), None)
    return made[wanted]


def enter(made_group: bool) -> object:
    """Count an engine as a user of the default group. Return a token for `leave`.

    Args:
        made_group: Whether initialize() made the group for this engine.
    """
    global _own_group
    if made_group:
        _own_group = dist.group.WORLD
        _users.clear()
    user = object()
    _users.add(user)
    return user


def leave(user: object) -> None:
    """Destroy the default group, if initialize() made it and this was its last user. A second call does nothing.

    Garbage collection of an engine does not count as leaving, because ranks may collect it at different times.
    """
    global _own_group
    if user not in _users:
        return
    _users.remove(user)
    group = None if _users else _own_group
    if group is not None:
        _own_group = None
        if group is dist.group.WORLD:
            dist.destroy_process_group()
