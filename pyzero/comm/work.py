"""A collective under way: how a group launches it and waits for it, and what a failure does to the group."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

from pyzero.comm import process, process_group_pool
from pyzero.comm.shared_memory import SharedMemory
from pyzero.comm.wait_records import WaitRecord, WaitRecords

_ASKS_AFTER_S = 5.0  # after this wait a rank asks the others what they are waiting for


class CollectiveError(RuntimeError):
    """A collective did not complete, because another rank died, stalled, or took part in another one."""


class Handle(Protocol):
    """What a Work waits for: a work of torch.distributed, or a transport's own."""

    def is_completed(self) -> bool:
        """Whether it has ended, successfully or not. Does not wait."""

    def wait(self, timeout: timedelta = ..., /) -> object:
        """Return when it is done. Raises RuntimeError if it failed, or is not done in time."""


class Work:
    """A collective or a copy under way. On a GPU `wait` makes the current stream wait; on a CPU it blocks."""

    def __init__(
        self,
        handle: Handle | None,
        group: WorkGroup,
        what: str,
        number: int = 0,
        then: Callable[[], None] | None = None,
        blocks: bool = False,
    ) -> None:
        self._handle = handle
        self._group = group
        self._what = what
        self._number = number  # among the group's collectives
        self._then = then  # called once it has arrived
        self._blocks = blocks  # the handle's wait returns with the result, on the host

    def wait(self) -> None:
        """Return when the code after it may use the result.

        Raises:
            CollectiveError: It failed, took longer than the group's timeout, or another rank waits for another
                collective instead.
        """
        if self._handle is not None:
            self._group.wait(self._handle, self._what, self._number, self._blocks)
            if self._then is not None:
                self._then()
            self._handle = None  # last, so that an interrupted wait can be repeated

    def is_done(self, patience_s: float) -> bool:
        """Whether `wait` would return at once. Waits at most `patience_s` to see."""
        return self._handle is None or self._group.is_done(self._handle, patience_s, self._blocks)


class WorkGroup:
    """The ranks of a Group, its process group, and the collectives that were launched in it."""

    def __init__(self, process_group: Any = None, *, is_alone: bool = False, on_host: bool = False) -> None:
        """Make a group of the ranks of a process group. Collective over them.

        Args:
            process_group: A ProcessGroup, or a DeviceMesh of one dimension; None: the default group.
            is_alone: Make a group of one rank, even if torch.distributed is initialised.
            on_host: The group sends only host memory.
        """
        process_group = process.process_group_of(process_group)
        initialized = not is_alone and dist.is_available() and dist.is_initialized()
        if not initialized and not is_alone:
            process.check_alone(process_group)
        parent = (process_group or dist.group.WORLD) if initialized else None
        if parent is not None and dist.get_rank(parent) < 0:
            raise ValueError(
                f"expected a process group that this process is in, got one that rank {dist.get_rank()} is not in; "
                f"build the optimizer on the group's ranks only"
            )
        self.size: int = dist.get_world_size(parent) if initialized else 1
        self.rank: int = dist.get_rank(parent) if initialized else 0
        self.where = "before the first backward"  # for messages: the optimizer's present phase
        self.handle: Any = None
        self._pid = os.getpid()
        self._lease = process_group_pool.LeasedGroup(None, serial=0)  # for one rank: sends nothing
        self._timeout: timedelta | None = None
        self._blocks = False
        self._records: WaitRecords | None = None  # made when a wait is long
        self.shared_memory: SharedMemory | None = None
        if self.size > 1:
            process.check_made_here(parent)
            self._timeout = process_group_pool.timeout_of(parent)
            is_gloo = on_host or set(process.backends_of(parent).values()) == {"gloo"}
            self._blocks = is_gloo  # wait() returns with the result
            leased_from = process_group_pool.pool_over(parent, self._timeout, on_host)
            with self.error_context("the lease of a process group"):
                self._lease = leased_from.lease(parent, self._timeout)
            self.handle = self._lease.handle
            weakref.finalize(self, leased_from.give_back, self._lease)

    def members(self) -> list[int]:
        """Return its ranks, as the default group numbers them. Raises as check_exists."""
        if self.size == 1:
            return [process.rank_and_size()[0]]
        self.check_exists()
        return dist.get_process_group_ranks(self.handle)

    def check_exists(self, what: str = "a save or a load", instead: str = "") -> None:
        """Raise RuntimeError if the process group was destroyed.

        what: What needs it. instead: What else the caller may do.
        """
        if self.size > 1 and not (dist.is_initialized() and self.handle in dist.distributed_c10d._world.pg_map):
            raise RuntimeError(
                f"expected the process group for {what}, got it destroyed; save and load before "
                f"torch.distributed.destroy_process_group(){instead}"
            )

    @contextmanager
    def error_context(self, what: str) -> Iterator[None]:
        """A context in which a RuntimeError becomes a CollectiveError with the collective's name and its timeout.

        That of a signal handler stays what it is.
        """
        try:
            yield
        except CollectiveError:
            raise
        except RuntimeError as error:
            if process.is_of_signal_handler(error):
                raise
            reason = _reason_of(error)
            self._give_up(reason)
            reason += self._others_elsewhere()
            raise CollectiveError(
                f"{what} failed on rank {self.rank} of {self.size}: {reason}. Every rank must take part within "
                f"{self.timeout()}: one has died or stalled, runs backward or step a different number of times, or "
                f"trains other parameters. See the other ranks' output; where they are only slow, raise the timeout of "
                f"init_process_group"
            ) from error

    def _others_elsewhere(self) -> str:
        """Return which ranks wait in other groups meanwhile, as text for messages; empty if none was seen to."""
        elsewhere = {}
        if self._records is not None:  # this rank has waited for long
            with contextlib.suppress(ValueError):  # the default group was destroyed, and its store with it
                elsewhere = self._records.elsewhere()
        return "".join(
            f"; rank {rank}, {record.where}, waits in another process group, for {record.what}: if that group is "
            f"another optimizer's or a checkpoint's, make these calls in the same order on every rank"
            for rank, record in [*elsewhere.items()][:1]
        )

    def _give_up(self, reason: str) -> None:
        """Mark the group as broken, so that it sends nothing more, and tell the ranks that share memory."""
        self._lease.is_broken = True
        if self.shared_memory is not None:
            self.shared_memory.give_up(reason)

    @property
    def _wait_records(self) -> WaitRecords:
        if self._records is None:
            everyones = dist.distributed_c10d._get_default_store()
            name = f"{self.handle.group_name}/{self._lease.token}"
            own, of_all = (
                dist.distributed_c10d.PrefixStore(prefix, everyones) for prefix in (f"pyzero/{name}", "pyzero-waits")
            )
            members = dist.get_process_group_ranks(self.handle)
            self._records = WaitRecords(own, self.rank, of_all, members, name)
        return self._records

    def timeout(self) -> str:
        """Return how long a collective may take, as text for messages."""
        return "its timeout" if self._timeout is None else f"{self._timeout.total_seconds():g} s"

    def timeout_ms(self) -> int:
        """Return how long a collective may take, in milliseconds; 0: without a limit."""
        return 0 if self._timeout is None else int(self._timeout.total_seconds() * 1000)

    def start(self, what: str, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Work:
        """Launch a collective of torch.distributed. `what` names it in errors, and is the same on every rank.

        args: The first is a tensor. A host tensor goes by gloo, even if the group has NCCL too.
        """
        on_host = args[0].device.type == "cpu"
        return self.launch(what, lambda: collective(*args, group=self.handle, async_op=True, **kwargs), blocks=on_host)

    @contextmanager
    def broken_unless_finished(self) -> Iterator[None]:
        """A context that ranks must leave alike. If an interrupt breaks it off, the group sends nothing more."""
        was_broken, self._lease.is_broken = self._lease.is_broken, True
        yield
        self._lease.is_broken = was_broken

    @contextmanager
    def lockstep(
        self,
        model_groups: Sequence[WorkGroup] = (),
        what: str = "a step",
        but: type[BaseException] | tuple[type[BaseException], ...] = (),
    ) -> Iterator[None]:
        """A context that every rank must finish. If an exception leaves it here, the group sends nothing more.

        model_groups: Groups of ranks with other parts of the model, which must finish it too.
        but: Exceptions that every rank raises by itself, so that the group stays usable.
        """
        try:
            yield
        except but:
            raise
        except BaseException as error:
            self.break_off(error, what, model_groups)
            raise

    def break_off(self, error: BaseException, what: str, model_groups: Sequence[WorkGroup] = ()) -> None:
        """Send nothing more in this group and in model_groups, because something that all must finish failed here.

        A rank that waits long for this one finds the reason in the store. A failed collective fails there by itself.
        """
        reason = f"{what} was broken off by {type(error).__name__}"
        is_fork = os.getpid() != self._pid  # what fails in a forked child is not this rank's failure
        for group in (self, *model_groups):
            group._give_up(reason)
            if group.handle is not None and not isinstance(error, CollectiveError) and not is_fork:
                process_group_pool.keep_forever(group.handle)  # it may have been waited for: see there
                with contextlib.suppress(ValueError):  # the default group was destroyed, and its store with it
                    group._wait_records.give_up(reason, group.where)

    def awaited(self, what: str) -> AbstractContextManager[None]:
        """A context around a launch and its wait. If it is broken off, only this rank lacks the result."""
        return self.lockstep(what=what, but=CollectiveError)

    @property
    def num_launched(self) -> int:
        """The number of collectives launched so far."""
        return self._lease.num_collectives

    @property
    def is_broken(self) -> bool:
        """Whether it sends nothing more, because a collective has failed or was interrupted."""
        return self._lease.is_broken

    def check_unbroken(self, what: str) -> None:
        """Raise CollectiveError if the group is broken and sends nothing more."""
        if self.size > 1 and self.is_broken:
            with self.error_context(what):
                raise RuntimeError("another collective of this optimizer has failed, or was interrupted, before")

    def launch(
        self,
        what: str,
        begin: Callable[[], Handle],
        then: Callable[[], None] | None = None,
        blocks: bool = False,
    ) -> Work:
        """Launch a collective by `begin`. `then` is called once, after the wait for its handle.

        blocks: The wait blocks the host, even if those for the group's other collectives do not.
        """
        process.check_built_here(self._pid)
        self.check_unbroken(what)
        with self.error_context(what):
            self._lease.num_collectives += 1
            with self.broken_unless_finished():
                handle = begin()
        return Work(handle, self, what, self._lease.num_collectives, then, blocks or self._blocks)

    def wait(self, handle: Handle, what: str, number: int, blocks: bool) -> None:
        """Wait for a collective; see Work."""
        process.check_built_here(self._pid)
        with self.error_context(what):
            was_noted = False
            while blocks:
                began = time.monotonic()
                try:
                    handle.wait(timedelta(seconds=_ASKS_AFTER_S))
                    if was_noted:
                        self._wait_records.arrived()
                    return
                except RuntimeError as error:
                    if process.is_of_signal_handler(error):
                        raise
                    # It failed, or has just arrived; otherwise it is slow. gloo's reduce-scatter is never completed.
                    if handle.is_completed() or time.monotonic() - began < _ASKS_AFTER_S / 2:
                        break
                self._compare(what, number)
                was_noted = True
            handle.wait()
            if was_noted:
                self._wait_records.arrived()

    def is_done(self, handle: Handle, patience_s: float, blocks: bool) -> bool:
        """Whether a collective is done within `patience_s` seconds; see Work."""
        if not blocks or handle.is_completed():
            return True
        process.check_built_here(self._pid)
        try:
            handle.wait(timedelta(seconds=patience_s))
        except RuntimeError as error:  # too slow, or failed: then wait() raises
            if process.is_of_signal_handler(error):
                raise
            return bool(handle.is_completed())
        return True

    def _compare(self, what: str, number: int) -> None:
        """Tell the others what this rank waits for. Raise if another rank waits for another collective instead."""
        seen = self._wait_records.exchange(WaitRecord(number, what, self.where))
        gave_up = {rank: record.what for rank, record in seen.items() if record.gave_up}
        is_other = any(record.number == number and record.what != what for record in seen.values())
        if gave_up or is_other:
            self._lease.is_broken = True
            process_group_pool.keep_forever(self.handle)
        for rank, reason in gave_up.items():
            raise CollectiveError(
                f"{what} failed on rank {self.rank} of {self.size}: rank {rank} sends nothing more, for {reason}; see "
                f"its output"
            )
        if is_other:
            places = "; ".join(f"rank {rank}, {it.where}, waits for {it.what}" for rank, it in sorted(seen.items()))
            raise CollectiveError(
                f"the ranks wait for different collectives: {places}. Run backward and step, save, and read norms and "
                f"whole tensors, equally often and in the same order on every rank; no_sync() in stage 2 needs the same"
            )


def _reason_of(error: RuntimeError) -> str:
    """Return the lines of an error of torch.distributed as one, without the stack that torch may append."""
    lines = map(str.strip, str(error).partition("Exception raised from")[0].splitlines())
    return "; ".join(filter(None, lines)) or type(error).__name__
