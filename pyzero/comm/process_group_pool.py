"""Process groups that optimizers have for themselves: made when wanted, and used again when their optimizer is gone."""

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
_FIRST_NUMBER = 10**9  # above any that torch gives
_num_named = 0


@dataclass
class LeasedGroup:
    """A process group that one optimizer has for itself, so that its collectives meet nobody else's."""

    handle: Any
    serial: int  # among those of one record; the same on all ranks
    token: str = ""  # the same on all ranks: torch may give its name to another group later
    num_collectives: int = 0
    is_broken: bool = False  # a collective failed: it is never used again


@dataclass
class ProcessGroupPool:
    """Those over the ranks of a parent group; on_host: that send memory of the host alone."""

    on_host: bool = False
    num_made: int = 0
    free: list[LeasedGroup] = field(default_factory=list)

    def lease(self, handle: Any, timeout: timedelta | None) -> LeasedGroup:
        """Collective: the free group of the lowest serial number on all ranks, or a new one.

        Where ranks began unequally many collectives on one, as in a backward that broke off on some, it stays unused.
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
        """Its optimizer is gone."""
        if not leased.is_broken:
            self.free.append(leased)


# By default group: when that is destroyed its free groups go too, and their threads with them. Then by what they are
# made of: a parent that takes the place of a destroyed one over the same ranks takes its groups too.
_pools: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], ProcessGroupPool]] = weakref.WeakKeyDictionary()


def pool_over(parent: Any, timeout: timedelta | None, on_host: bool = False) -> ProcessGroupPool:
    """The one record of all parents with these ranks, backends and timeout, of either kind."""
    made_of = tuple(dist.get_process_group_ranks(parent)), dist.get_backend_config(parent), timeout, on_host
    return _pools.setdefault(dist.group.WORLD, {}).setdefault(made_of, ProcessGroupPool(on_host))


@functools.cache  # once
def _let_gloo_finish_at_exit() -> None:
    """Sleep at exit: gloo's threads take the interpreter's lock to free tensors, and one that is too late aborts it."""
    atexit.register(time.sleep, 0.01)


def num_groups() -> int:
    """How many process groups `_named` has named, here or on ranks that it was used with."""
    return _num_named


def new_group(ranks: list[int], like: Any, timeout: timedelta | None, most_groups: int, on_host: bool = False) -> Any:
    """A group over these ranks, with the backends of another, and gloo for CPU tensors beside NCCL. Collective.

    Args:
        ranks: Of the default group, in the order in which the group is to number them.
        like: The other.
        timeout: Of a collective.
        most_groups: The largest of these ranks' `num_groups()`.
        on_host: It sends memory of the host alone: by gloo, without a communicator of NCCL.
    """
    # Not by get_backend() alone, which is "undefined" after init_process_group() without a backend: NCCL, on a GPU.
    has_nccl = "nccl" in process.backends_of(like).values()
    backend = dist.get_backend(like) if not has_nccl else "gloo" if on_host else "cpu:gloo,cuda:nccl"
    _let_gloo_finish_at_exit()
    in_order: dict[str, Any] = {} if ranks == sorted(ranks) else {"sort_ranks": False}  # of newer torch
    with _gloo_explained():
        if len(ranks) == dist.get_world_size():
            return dist.new_group(ranks, timeout=timeout, backend=backend, **in_order)
        # Only members may be asked for a smaller group.
        with _named(most_groups), _unbound():
            return dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=True, **in_order)


@contextmanager
def _gloo_explained() -> Iterator[None]:
    """Say how gloo finds the other hosts, where it does not: NCCL's variables are not gloo's."""
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
    """Have torch give a group of which only members are asked a name that is new, and the same on all of them.

    It names it after its ranks and a number: of the groups that this process has, which may be a living one's where one
    was destroyed, or, from 2.14 on, of all calls for a group. After the latter it names groups of which every rank is
    asked, too, so it must not change here.
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
    """Have NCCL connect a smaller group's members alone.

    Where init_process_group() was told a device_id, torch splits the default group's communicator instead: a collective
    over all of its ranks, in which those outside the new group take no part, so that the members would hang.
    """
    everyone = dist.group.WORLD
    assert everyone is not None
    device, everyone.bound_device_id = everyone.bound_device_id, None
    try:
        yield
    finally:
        everyone.bound_device_id = device


def gather_objects(handle: Any, value: object) -> list[Any]:
    """Every rank's small python object, in rank order."""
    values: list[Any] = [None] * dist.get_world_size(handle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        dist.all_gather_object(values, value, group=handle)
    return values


def keep_forever(handle: Any) -> None:
    """Never destroy a group with a collective that will not complete: that would wait for it, up to the timeout."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle))


def timeout_of(group: Any) -> timedelta | None:
    """How long a collective of a process group may take."""
    device_type = next(iter(process.backends_of(group)))
    options = getattr(group._get_backend(torch.device(device_type)), "options", None)
    return None if options is None else options._timeout
