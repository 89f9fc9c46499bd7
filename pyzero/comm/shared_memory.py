"""Shared memory of one host's ranks, counters to wait for, and which ranks are still alive.

The memory has no name (memfd). It is freed when the last process that maps it ends, in whatever way, and the size of
/dev/shm does not limit it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import secrets
import select
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyzero.comm import futex, process
from pyzero.comm.futex import Counter
from pyzero.comm.shared_pages import SharedPages
from pyzero.ops.rounding import round_up

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_LINE = 64  # bytes of a cache line; each counter has its own
_CONTROL_BYTES = mmap.PAGESIZE
_TOKEN_BYTES = 32
_LOOK_S = 0.05  # interval at which a waiting rank checks that the others are alive

Gather = Callable[[object], list[Any]]  # every rank's small object, in rank order: a collective


class HostError(RuntimeError):
    """The ranks cannot share memory. The message says why, and is the same on each."""


class _Offer(NamedTuple):
    """Where the other ranks find a rank's pages, and the token that they must see there."""

    pid: int
    descriptor: int
    token: bytes

    @staticmethod
    def make(num_bytes: int) -> _Offer:
        """Make zeroed pages, with a token after their end."""
        import fcntl  # not on systems without futexes

        descriptor = os.memfd_create("pyzero", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        token = secrets.token_bytes(_TOKEN_BYTES)
        try:
            os.fchmod(descriptor, 0o600)
            os.posix_fallocate(descriptor, 0, num_bytes)  # only allocated pages can be made huge
            os.pwrite(descriptor, token, num_bytes)
            # Seal the size, so that nobody can cut the file short while others have it mapped.
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(descriptor)
            raise
        return _Offer(os.getpid(), descriptor, token)

    def map(self, rank: int, num_bytes: int) -> SharedPages:
        """Map a rank's pages.

        Raises:
            HostError: The rank runs in another container, with other process ids.
            OSError: The pages cannot be opened or mapped.
        """
        descriptor = os.open(f"/proc/{self.pid}/fd/{self.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.pread(descriptor, _TOKEN_BYTES, num_bytes) != self.token:
                raise HostError(f"process {self.pid} is not rank {rank}, which runs in another container")
            return SharedPages(descriptor, num_bytes)
        finally:
            os.close(descriptor)


def find_hosts(gather: Gather) -> list[list[int]]:
    """Return the ranks of each host, in rank order. Collective."""
    boot_id = ""
    with contextlib.suppress(OSError), open(_BOOT_ID) as file:
        boot_id = file.read().strip()
    hosts: dict[str, list[int]] = {}
    for rank, theirs in enumerate(gather(boot_id)):
        hosts.setdefault(theirs, []).append(rank)
    return list(hosts.values())


def raise_first(problems: Sequence[str | None]) -> None:
    """Raise HostError for the first rank with a problem. All ranks pass the gathered problems, and raise the same."""
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise HostError(f"on rank {rank}: {problem}")


def _share(gather: Gather, ranks: Sequence[int], num_bytes: int) -> tuple[dict[int, SharedPages], dict[int, int]]:
    """Map `num_bytes` zeroed bytes of each of these ranks. Return them, and process ids. Collective over all hosts.

    Raises:
        HostError: Some rank cannot map them.
    """
    offer, problem = None, futex.unsupported_reason()
    mapped: dict[int, SharedPages] = {}
    try:
        if problem is None:
            try:
                offer = _Offer.make(num_bytes)
            except (OSError, AttributeError) as error:  # a Python built for an old libc lacks memfd_create
                problem = f"no memory can be shared: {error}"
        offers = dict(enumerate(gather(offer)))
        if all(offers[rank] is not None for rank in ranks):
            try:
                mapped = {rank: offers[rank].map(rank, num_bytes) for rank in ranks}
            except (OSError, HostError) as error:
                problem = str(error)
        problems = gather(problem)  # after it no rank opens anything any more
    finally:
        if offer is not None:
            os.close(offer.descriptor)
    raise_first(problems)
    return mapped, {rank: offers[rank].pid for rank in ranks}


class _CounterSlot(IntEnum):
    """The counters of a rank, by their place in its page."""

    POSTED = 0
    READ = 1
    MESSAGE = 2
    GAVE_UP = 3


class SharedMemory:
    """The memory that ranks of a group share: each rank's ring of bytes, and counters of its chunks. Collective.

    Args:
        rank: This rank, in the group.
        ranks: The ranks of its host, in order.
        gather: See Gather. Over the ranks of all hosts, which must all make the same calls.
        timeout: How long another rank may take; None: without a limit.

    Raises:
        HostError: The ranks cannot share memory.
    """

    def __init__(self, rank: int, ranks: Sequence[int], gather: Gather, timeout: timedelta | None) -> None:
        self.rank = rank
        self.ranks = ranks
        self._timeout_s = math.inf if timeout is None else timeout.total_seconds()
        control, pids = _share(gather, ranks, _CONTROL_BYTES)
        self._words = {
            word: {rank: Counter(shared.pages, word * _LINE) for rank, shared in control.items()}
            for word in _CounterSlot
        }
        self._process_watches = {rank: _ProcessWatch(pid) for rank, pid in pids.items()}
        self._pid = os.getpid()
        self._mapped: dict[int, SharedPages] = {}
        self._ring_at = self.ring_bytes = self._message_bytes = 0
        self._num_messages = 0
        self._gave_up_because: str | None = None

    def reserve(self, ring_bytes: int, message_bytes: int, gather: Gather) -> bool:
        """Make room of at least this size. Return whether it is new. Collective; nothing may be under way.

        Raises:
            HostError: Some rank cannot map it.
        """
        if ring_bytes <= self.ring_bytes and message_bytes <= self._message_bytes:
            return False
        ring_bytes = max(ring_bytes, self.ring_bytes)
        message_bytes = max(_pages(message_bytes), self._message_bytes)
        self._mapped, _ = _share(gather, self.ranks, 2 * message_bytes + _pages(ring_bytes))
        self.ring_bytes, self._message_bytes, self._ring_at = ring_bytes, message_bytes, 2 * message_bytes
        return True

    # ---- the ring ---------------------------------------------------------------------------------------------------

    def tensor(self, rank: int, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a (numel,) tensor in a rank's ring."""
        process.check_built_here(self._pid)
        return self._mapped[rank].tensor(self._ring_at + offset, numel, dtype)

    def post(self) -> None:
        """Tell the others that they may read the next chunk in this rank's ring."""
        self._advance(_CounterSlot.POSTED)

    def mark_read(self) -> None:
        """Tell the others that this rank has read the next chunk of every rank's ring."""
        self._advance(_CounterSlot.READ)

    def has_read(self, number: int) -> bool:
        """Whether this rank has read the chunk of that number."""
        return self._words[_CounterSlot.READ][self.rank].has_reached(number)

    def posted(self, number: int) -> Arrival:
        """Return a handle that is done when every rank has posted the chunk of that number."""
        return Arrival(self, self._words[_CounterSlot.POSTED], number, self._timeout_s)

    def read(self, number: int) -> Arrival:
        """Return a handle that is done when every rank has read the chunk of that number. Its bytes are then free."""
        return Arrival(self, self._words[_CounterSlot.READ], number, self._timeout_s)

    def _advance(self, word: _CounterSlot) -> None:
        process.check_built_here(self._pid)
        self._words[word][self.rank].advance()

    # ---- messages ---------------------------------------------------------------------------------------------------

    def can_send(self, row: Tensor) -> bool:
        """Whether this message fits: it is on the CPU, and not too large."""
        return row.device.type == "cpu" and row.nbytes <= self._message_bytes

    def send(self, row: Tensor) -> Arrival:
        """Send a message to all ranks, of one size and dtype on each. Return a handle for the arrival of all messages.

        Two places take turns: when a rank sends the next message but one, all have read this one.
        """
        self._num_messages += 1
        self._message(self.rank, row).copy_(row)
        self._advance(_CounterSlot.MESSAGE)
        return Arrival(self, self._words[_CounterSlot.MESSAGE], self._num_messages, self._timeout_s)

    def messages(self, row: Tensor) -> Tensor:
        """Return each rank's last message, in rank order: (num_ranks * k,). `row` is this rank's."""
        return torch.cat([self._message(rank, row) for rank in self.ranks])

    def _message(self, rank: int, row: Tensor) -> Tensor:
        process.check_built_here(self._pid)
        return self._mapped[rank].tensor(self._num_messages % 2 * self._message_bytes, row.numel(), row.dtype)

    # ---- failure ----------------------------------------------------------------------------------------------------

    def give_up(self, why: str) -> str:
        """Make every rank fail that waits for this one, now or later. Return the first reason that was given."""
        if self._gave_up_because is None:
            self._gave_up_because = why
            if os.getpid() == self._pid:  # a forked child's failure is not this rank's
                self._words[_CounterSlot.GAVE_UP][self.rank].advance()
        return self._gave_up_because

    @property
    def has_given_up(self) -> bool:
        """Whether this rank has given up."""
        return self._gave_up_because is not None

    def who_gave_up(self) -> int | None:
        """Return a rank that has given up, or None."""
        return next((rank for rank, word in self._words[_CounterSlot.GAVE_UP].items() if word.has_reached(1)), None)

    def has_ended(self, rank: int) -> bool:
        """Whether the process of that rank has ended."""
        return self._process_watches[rank].has_ended()


def _pages(num_bytes: int) -> int:
    return round_up(num_bytes, mmap.PAGESIZE)


class _ProcessWatch:
    """Whether a process still runs. Linux tells it from 5.3 on."""

    def __init__(self, pid: int) -> None:
        self._poll = select.poll()
        self._descriptor = -1
        with contextlib.suppress(OSError, AttributeError):  # a Python built for an old libc lacks it
            self._descriptor = os.pidfd_open(pid)
            self._poll.register(self._descriptor, select.POLLIN)

    def has_ended(self) -> bool:
        return bool(self._poll.poll(0))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._descriptor >= 0:
            close(self._descriptor)


class Arrival:
    """A Handle (comm/work.py) that is done when every rank's counter has reached a number."""

    def __init__(self, host: SharedMemory, words: Mapping[int, Counter], number: int, timeout_s: float) -> None:
        self._host = host
        self._words = words
        self._number = number
        self._give_up_at = time.monotonic() + timeout_s

    def is_completed(self) -> bool:
        """Whether all counters have reached the number, or this rank has given up."""
        return self._host.has_given_up or all(word.has_reached(self._number) for word in self._words.values())

    def wait(self, timeout: timedelta | None = None) -> None:
        """Return when all counters have reached the number.

        Raises:
            RuntimeError: `timeout` is over; the group's timeout is over, and it has failed for good; or a rank has
                ended or given up.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout.total_seconds()
        for rank, word in self._words.items():
            while not word.has_reached(self._number):
                self._check()
                if self._host.has_ended(rank) and not word.has_reached(self._number):
                    self._fail(f"rank {rank} has ended")
                now = time.monotonic()
                if now >= self._give_up_at:
                    self._fail(f"timed out waiting for rank {rank}")
                if now >= until:
                    raise RuntimeError(f"rank {rank} is not there yet")
                word.wait(self._number, min(_LOOK_S, until - now, self._give_up_at - now))
        self._check()

    def _check(self) -> None:
        gone = self._host.who_gave_up()
        if gone is not None:
            self._fail(f"rank {gone} has given up")

    def _fail(self, why: str) -> None:
        raise RuntimeError(self._host.give_up(why))
