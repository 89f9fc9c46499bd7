"""Process groups for one optimizer each. They are made when needed, and reused after their optimizer is gone."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import secrets
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pyzero.comm import process

_COUNTS_CALLS = torch.__version__ >= "2.14"  # compared as versions; see _named
_FIRST_NUMBER = 10**9  # above any number that torch gives
_num_named = 0


@dataclass
class LeasedGroup:
    """A process group that only one optimizer uses, so that its collectives do not mix with others."""

    handle: Any
    serial: int  # in its pool; the same on all ranks
    token: str = ""  # the same on all ranks; tells it from a later group to which torch gives the same name
    num_collectives: int = 0
    is_broken: bool = False  # a collective failed, so it is never used again


@dataclass
class ProcessGroupPool:
    """The process groups over the ranks of a parent group. on_host: They send only host memory."""

    on_host: bool = False
    num_made: int = 0
    free: list[LeasedGroup] = field(default_factory=list)

    def lease(self, handle: Any, timeout: timedelta | None) -> LeasedGroup:
        """Return the free group with the lowest serial number on all ranks, or a new group. Collective.

        A group is not reused if ranks began different numbers of collectives on it, as after a broken backward.
        """
        free = {(leased.serial, leased.num_collectives): leased for leased in self.free}
        rows = gather_objects(handle, ([*free], self.num_made, num_groups(), secrets.token_hex(4)))
        common = set.intersection(*(set(known) for known, *_ in rows))
        if common:
            found = free[min(common)]
            self.free.remove(found)
            return found
        self.num_made = max(num_made for _, num_made, _, _ in rows) + 1
        ranks, most = dist.get_process_group_ranks(handle), max(groups for _, _, groups, _ in rows)
        return LeasedGroup(new_group(ranks, handle, timeout, most, self.on_host), self.num_made, rows[0][-1])

    def give_back(self, leased: LeasedGroup) -> None:
        """Take back a group after its optimizer is gone."""
        if not leased.is_broken:
            self.free.append(leased)


# By default group: when it is destroyed, its free groups go too, with their threads. Then by ranks, backends and
# timeout: if a parent replaces a destroyed one over the same ranks, it takes over its groups.
_pools: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], ProcessGroupPool]] = weakref.WeakKeyDictionary()


def pool_over(parent: Any, timeout: timedelta | None, on_host: bool = False) -> ProcessGroupPool:
    """Return the pool that all parents with these ranks, backends and timeout share, for this `on_host`."""
    made_of = tuple(dist.get_process_group_ranks(parent)), dist.get_backend_config(parent), timeout, on_host
    return _pools.setdefault(dist.group.WORLD, {}).setdefault(made_of, ProcessGroupPool(on_host))


@functools.cache
def _let_gloo_finish_at_exit() -> None:
    """Sleep at exit, because gloo's threads take the interpreter's lock to free tensors, and too late they abort."""
    atexit.register(time.sleep, 0.01)


def num_groups() -> int:
    """Return the number of groups that `_named` has named, on this rank or on ranks that were in a group with it."""
    return _num_named


def new_group(ranks: list[int], like: Any, timeout: timedelta | None, most_groups: int, on_host: bool = False) -> Any:
    """Make a group over these ranks, with another group's backends, and with gloo for CPU tensors beside NCCL.

    Collective over the ranks.

    Args:
        ranks: Ranks of the default group, in the order in which the new group numbers them.
        like: The group with the backends.
        timeout: Timeout of a collective.
        most_groups: The largest of these ranks' `num_groups()`.
        on_host: The group sends only host memory: by gloo, without an NCCL communicator.
    """
    # get_backend() alone would not do: after init_process_group() without a backend (NCCL, on a GPU) it is "undefined".
    has_nccl = "nccl" in process.backends_of(like).values()
    backend = dist.get_backend(like) if not has_nccl else "gloo" if on_host else "cpu:gloo,cuda:nccl"
    _let_gloo_finish_at_exit()
    in_order: dict[str, Any] = {} if ranks == sorted(ranks) else {"sort_ranks": False}  # of newer torch
    with _gloo_explained():
        if len(ranks) == dist.get_world_size():
            return dist.new_group(ranks, timeout=timeout, backend=backend, **in_order)
        # Only members call this for a smaller group.
        with _named(most_groups), _unbound():
            return dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=True, **in_order)


@contextmanager
def _gloo_explained() -> Iterator[None]:
    """If gloo cannot reach the other hosts, say which variable to set, because gloo does not read NCCL's."""
    try:
        yield
    except RuntimeError as error:
        text = (str(error).strip().splitlines() or [""])[0]
        if "gloo" not in text.lower() or "connect" not in text.lower():
            raise
        raise RuntimeError(
            f"{text}; gloo, which carries what hosts tell each other beside NCCL, too, did not reach them: set "
            f"GLOO_SOCKET_IFNAME to the network interface that they share (eth0, say)"
        ) from error


@contextmanager
def _named(most_groups: int) -> Iterator[None]:
    """Make torch give a group that only its members create a new name, the same on all of them.

    torch names it after its ranks and a number. Before 2.14 that is the number of this process's groups, so after a
    group was destroyed the name may be a living group's. From 2.14 on it is the number of calls. torch uses that number
    also for groups that every rank creates, so it is restored afterwards.
    """
    global _num_named
    c10d: Any = dist.distributed_c10d
    _num_named = most_groups + 1
    place, name = (c10d._world, "group_count") if _COUNTS_CALLS else (c10d, "_hash_ranks_to_str")
    number, thread = _FIRST_NUMBER + most_groups, threading.get_ident()
    before = getattr(place, name)

    def hashed(ranks: list[int]) -> str:
        if threading.get_ident() != thread:
            return str(before(ranks))
        return hashlib.sha1(f"{ranks} {number}".encode(), usedforsecurity=False).hexdigest()

    setattr(place, name, number if _COUNTS_CALLS else hashed)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextmanager
def _unbound() -> Iterator[None]:
    """Make NCCL connect only a smaller group's members.

    If init_process_group() was given a device_id, torch splits the default group's communicator instead. That is a
    collective over all of its ranks. Ranks outside the new group do not take part, so the members would hang.
    """
    everyone = dist.group.WORLD
    assert everyone is not None
    device, everyone.bound_device_id = everyone.bound_device_id, None
    try:
        yield
    finally:
        everyone.bound_device_id = device


def gather_objects(handle: Any, value: object) -> list[Any]:
    """Return every rank's small Python object, in rank order."""
    values: list[Any] = [None] * dist.get_world_size(handle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        dist.all_gather_object(values, value, group=handle)
    return values


def keep_forever(handle: Any) -> None:
    """Never destroy this group: a collective on it will not complete, and the destruction would wait for it."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle))


def timeout_of(group: Any) -> timedelta | None:
    """Return how long a collective of a process group may take."""
    device_type = next(iter(process.backends_of(group)))
    options = getattr(group._get_backend(torch.device(device_type)), "options", None)
    return None if options is None else options._timeout
