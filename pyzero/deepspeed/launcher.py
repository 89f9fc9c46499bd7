"""This process among those that a launcher started: its device, its place, and the default process group."""

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
_own_group: Any = None  # the default group that initialize() has made
_users: set[object] = set()  # one for each engine since then that destroy() has not ended
# By default group, and the ranks of each.
_subgroups: weakref.WeakKeyDictionary[Any, dict[tuple[tuple[int, ...], ...], Any]] = weakref.WeakKeyDictionary()


def device() -> torch.device:
    """Where this process computes: its GPU, by LOCAL_RANK among those that it sees, or the current one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ:  # as under srun and mpirun
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cuda", local_rank() % torch.cuda.device_count())  # Slurm may show each rank its own alone


def take_device() -> None:
    """Make this process's GPU the current one, where a launcher has said which: `.cuda()` and "cuda" mean it then."""
    if "LOCAL_RANK" in os.environ and device().type == "cuda":
        torch.cuda.set_device(device())


def local_rank() -> int:
    """This process's on its host: the launcher's LOCAL_RANK, or 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def handle_of(process_group: Any) -> Any:
    """A ProcessGroup: itself, or that of a DeviceMesh of one dimension; the default group for None."""
    return process.process_group_of(process_group) or dist.group.WORLD


def rank_and_size_in(process_group: Any) -> tuple[int, int]:
    """(rank, size) of this process in a group."""
    handle = handle_of(process_group)
    return dist.get_rank(handle), dist.get_world_size(handle)


def backend_to_join(from_host: bool) -> str | None:
    """For `join`. from_host: whether GPUs' ranks send tensors from memory of the host, too."""
    return "cpu:gloo,cuda:nccl" if from_host and device().type == "cuda" else None


def join(backend: str | None = None, timeout: timedelta | None = None) -> bool:
    """Initialise the default process group where a launcher set RANK and WORLD_SIZE; True where this call did it."""
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
    """`join` before there is an engine: the next one leaves the group in its stead."""
    global _early_group
    if join(backend):
        _early_group = dist.group.WORLD


def claim_early_group() -> bool:
    """Whether `join_early` has made the default group, and nobody has asked yet."""
    global _early_group
    group, _early_group = _early_group, None
    return group is not None and group is dist.group.WORLD


def subgroup(members: Sequence[Sequence[int]]) -> Any:
    """Groups of these ranks, on all ranks alike; returns the one that this rank is in, or None.

    They live as long as the default group: who asks for the same again gets the same. It has their timeout.
    """
    made = _subgroups.setdefault(dist.group.WORLD, {})
    wanted = tuple(map(tuple, members))
    if wanted not in made:
        rank, timeout = dist.get_rank(), process_group_pool.timeout_of(dist.group.WORLD)
        handles = [dist.new_group(list(ranks), timeout=timeout) for ranks in wanted]
        made[wanted] = next((handle for handle, ranks in zip(handles, wanted, strict=True) if rank in ranks), None)
    return made[wanted]


def enter(made_group: bool) -> object:
    """Count an engine as a user of the default group; returns what `leave` takes.

    Args:
        made_group: Whether initialize() has made the group for this engine.
    """
    global _own_group
    if made_group:
        _own_group = dist.group.WORLD
        _users.clear()
    user = object()
    _users.add(user)
    return user


def leave(user: object) -> None:
    """End the default group, if initialize() has made it and this was its last user. A second call does nothing.

    Whether an engine is garbage plays no part, because ranks may collect it at different times.
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
