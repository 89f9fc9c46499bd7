"""The ranks of one host: memory that all of them have mapped, counters to wait for, and who is still alive.

The memory has no name anywhere (memfd): it goes with the last process that maps it, however that ends, and the size of
/dev/shm is no limit to it.
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

from pyzero.comm import futex
from pyzero.comm.futex import Counter
from pyzero.comm.shared_pages import SharedPages
from pyzero.ops.rounding import round_up

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_LINE = 64  # bytes of a cache line, which a counter has for itself
_CONTROL_BYTES = mmap.PAGESIZE
_TOKEN_BYTES = 32
_LOOK_S = 0.05  # how often a rank that waits looks whether the others are alive

Gather = Callable[[object], list[Any]]  # every rank's small object, in rank order: a collective


class HostError(RuntimeError):
    """The ranks cannot share memory; says why, the same on each."""


class _Offer(NamedTuple):
    """Where the other ranks find a rank's pages, and what they must see there."""

    pid: int
    descriptor: int
    token: bytes

    @staticmethod
    def make(num_bytes: int) -> _Offer:
        """Make zeroed pages, with a token after their end."""
        import fcntl  # not where there are no futexes

        descriptor = os.memfd_create("pyzero", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        token = secrets.token_bytes(_TOKEN_BYTES)
        try:
            os.fchmod(descriptor, 0o600)
            os.posix_fallocate(descriptor, 0, num_bytes)  # pages that are there can be made huge
            os.pwrite(descriptor, token, num_bytes)
            # Nobody can cut the file short under those who have mapped it.
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(descriptor)
            raise
        return _Offer(os.getpid(), descriptor, token)

    def map(self, rank: int, num_bytes: int) -> SharedPages:
        """That rank's pages.

        Raises:
            HostError: It runs in a container with processes of its own.
            OSError: They cannot be opened or mapped.
        """
        descriptor = os.open(f"/proc/{self.pid}/fd/{self.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.pread(descriptor, _TOKEN_BYTES, num_bytes) != self.token:
                raise HostError(f"process {self.pid} is not rank {rank}, which runs in another container")
            return SharedPages(descriptor, num_bytes)
        finally:
            os.close(descriptor)


def find_hosts(gather: Gather) -> list[list[int]]:
    """The ranks of each host, in rank order. Collective."""
    boot_id = ""
    with contextlib.suppress(OSError), open(_BOOT_ID) as file:
        boot_id = file.read().strip()
    hosts: dict[str, list[int]] = {}
    for rank, theirs in enumerate(gather(boot_id)):
        hosts.setdefault(theirs, []).append(rank)
    return list(hosts.values())


def raise_first(problems: Sequence[str | None]) -> None:
    """Raise HostError for the first rank that has a problem: alike on all, which have gathered them."""
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise HostError(f"on rank {rank}: {problem}")


def _share(gather: Gather, ranks: Sequence[int], num_bytes: int) -> tuple[dict[int, SharedPages], dict[int, int]]:
    """Map `num_bytes` zeroed bytes of each of these ranks; returns them, and process ids. Collective over all hosts.

    Raises:
        HostError: Some rank cannot map them.
    """
    offer, problem = None, futex.unsupported_reason()
    mapped: dict[int, SharedPages] = {}
    try:
        if problem is None:
            try:
                offer = _Offer.make(num_bytes)
            except OSError as error:
                problem = f"no memory can be shared: {error}"
        offers = dict(enumerate(gather(offer)))
        if all(offers[rank] is not None for rank in ranks):
            try:
                mapped = {rank: offers[rank].map(rank, num_bytes) for rank in ranks}
            except (OSError, HostError) as error:
                problem = str(error)
        problems = gather(problem)  # from here on nobody opens anything
    finally:
        if offer is not None:
            os.close(offer.descriptor)
    raise_first(problems)
    return mapped, {rank: offers[rank].pid for rank in ranks}


class _Word(IntEnum):
    """The counters of a rank, by their place in its page."""

    POSTED = 0
    READ = 1
    MESSAGE = 2
    GAVE_UP = 3


class SharedMemory:
    """The ranks of a group that share memory: a ring of bytes for each, and counters of what lies there.

    Args:
        rank: This one, in the group.
        ranks: Those of its host, in order.
        gather: See Gather; over all hosts, on each of which this is done alike.
        timeout: How long another rank may take; None: any time.

    Raises:
        HostError: They cannot.
    """

    def __init__(self, rank: int, ranks: Sequence[int], gather: Gather, timeout: timedelta | None) -> None:
        self.rank = rank
        self.ranks = ranks
        self._timeout_s = math.inf if timeout is None else timeout.total_seconds()
        control, pids = _share(gather, ranks, _CONTROL_BYTES)
        self._words = {
            word: {rank: Counter(shared.pages, word * _LINE) for rank, shared in control.items()} for word in _Word
        }
        self._lives = {rank: _Life(pid) for rank, pid in pids.items()}
        self._pid = os.getpid()
        self._mapped: dict[int, SharedPages] = {}
        self._ring_at = self.ring_bytes = self._message_bytes = 0
        self._num_messages = 0
        self._gave_up_because: str | None = None

    def reserve(self, ring_bytes: int, message_bytes: int, gather: Gather) -> bool:
        """Have at least so many bytes; returns whether they were made anew. Collective; nothing may be under way.

        Raises:
            HostError: Some rank cannot map them.
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
        """(numel,) in a rank's ring."""
        self._check_process()
        return self._mapped[rank].tensor(self._ring_at + offset, numel, dtype)

    def post(self) -> None:
        """The next chunk in this rank's ring may be read."""
        self._advance(_Word.POSTED)

    def mark_read(self) -> None:
        """This rank has read the next chunk of every rank's ring."""
        self._advance(_Word.READ)

    def has_read(self, number: int) -> bool:
        """Whether this rank has read that chunk."""
        return self._words[_Word.READ][self.rank].has_reached(number)

    def posted(self, number: int) -> Arrival:
        """When every rank has posted the chunk of that number."""
        return Arrival(self, self._words[_Word.POSTED], number, self._timeout_s)

    def read(self, number: int) -> Arrival:
        """When every rank has read the chunk of that number, whose bytes may then be written over."""
        return Arrival(self, self._words[_Word.READ], number, self._timeout_s)

    def _advance(self, word: _Word) -> None:
        self._check_process()
        self._words[word][self.rank].advance()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                "expected the process that built the optimizer, got a fork of it; build another one in the child"
            )

    # ---- messages ---------------------------------------------------------------------------------------------------

    def can_send(self, row: Tensor) -> bool:
        """Whether a message of that size fits."""
        return row.device.type == "cpu" and row.nbytes <= self._message_bytes

    def send(self, row: Tensor) -> Arrival:
        """Send a message to all, of one size and dtype on each rank; returns the arrival of every rank's.

        Two places take turns: a rank that sends the next message but one has read this one.
        """
        self._num_messages += 1
        self._message(self.rank, row).copy_(row)
        self._advance(_Word.MESSAGE)
        return Arrival(self, self._words[_Word.MESSAGE], self._num_messages, self._timeout_s)

    def messages(self, row: Tensor) -> Tensor:
        """(num_ranks * k,): each rank's last message, in rank order; `row` is this rank's."""
        return torch.cat([self._message(rank, row) for rank in self.ranks])

    def _message(self, rank: int, row: Tensor) -> Tensor:
        self._check_process()
        return self._mapped[rank].tensor(self._num_messages % 2 * self._message_bytes, row.numel(), row.dtype)

    # ---- failure ----------------------------------------------------------------------------------------------------

    def give_up(self, why: str) -> str:
        """Make every rank fail that waits for this one, now or later; returns the first reason given."""
        if self._gave_up_because is None:
            self._gave_up_because = why
            if os.getpid() == self._pid:  # a fork's failure is none of this rank's
                self._words[_Word.GAVE_UP][self.rank].advance()
        return self._gave_up_because

    @property
    def has_given_up(self) -> bool:
        """Whether this rank has given up."""
        return self._gave_up_because is not None

    def who_gave_up(self) -> int | None:
        """A rank that has given up, or None."""
        return next((rank for rank, word in self._words[_Word.GAVE_UP].items() if word.has_reached(1)), None)

    def has_ended(self, rank: int) -> bool:
        """Whether the process of that rank has ended."""
        return self._lives[rank].has_ended()


def _pages(num_bytes: int) -> int:
    return round_up(num_bytes, mmap.PAGESIZE)


class _Life:
    """Whether a process runs, as far as the kernel tells: from Linux 5.3 on."""

    def __init__(self, pid: int) -> None:
        self._poll = select.poll()
        self._descriptor = -1
        with contextlib.suppress(OSError):
            self._descriptor = os.pidfd_open(pid)
            self._poll.register(self._descriptor, select.POLLIN)

    def has_ended(self) -> bool:
        return bool(self._poll.poll(0))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._descriptor >= 0:
            close(self._descriptor)


class Arrival:
    """Every rank's counter on its way to a number; a Handle of comm/group.py."""

    def __init__(self, host: SharedMemory, words: Mapping[int, Counter], number: int, timeout_s: float) -> None:
        self._host = host
        self._words = words
        self._number = number
        self._give_up_at = time.monotonic() + timeout_s

    def is_completed(self) -> bool:
        """Whether all counters are there, or never will be."""
        return self._host.has_given_up or all(word.has_reached(self._number) for word in self._words.values())

    def wait(self, timeout: timedelta | None = None) -> None:
        """Return when all are there.

        Raises:
            RuntimeError: The time is up: `timeout`, or the group's, after which it has failed. Or a rank has ended or
                failed itself.
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
