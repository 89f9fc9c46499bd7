"""What each rank waits for, as text that the others can read: in the store of the default process group."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_PATIENCE_S = 2.0  # a store answers in some ms if its host runs
_GAVE_UP = -1  # stands instead of a collective's number
_AWAITED, _TROUBLE = "awaited", "trouble"  # keys beside those of the ranks


class WaitRecord(NamedTuple):
    """What a rank waits for, or why it sends nothing more."""

    number: int  # of the collective, among the group's
    what: str  # its name, or the reason
    where: str  # the optimizer's phase

    @property
    def gave_up(self) -> bool:
        """Whether the rank sends nothing more."""
        return self.number == _GAVE_UP


class WaitRecords:
    """The records of a group's ranks.

    A rank asks about few keys, however many ranks there are. It reads all records only once a rank has found a
    difference or has given up. A thread asks, because torch's stores set no limit to how long an answer takes: the host
    of the store may have stalled.

    Args:
        store: A store of torch.distributed that only these ranks use.
        rank: This rank in the group.
        everyones: A store that all groups use, for what a process waits for in any of them.
        members: The ranks of this group, as `everyones` numbers processes.
        name: Of this group, in `everyones`.
    """

    def __init__(self, store: Any, rank: int, everyones: Any, members: Sequence[int], name: str) -> None:
        self._store = store
        self._rank = rank
        self._everyones = everyones
        self._members = members
        self._name = name
        self._asking: threading.Thread | None = None
        self._seen: dict[int, WaitRecord] = {}
        self._error: Exception | None = None

    def exchange(self, record: WaitRecord) -> dict[int, WaitRecord]:
        """Write this rank's record. Return all records by rank if the ranks may wait in vain; otherwise none.

        Returns none either if the store does not answer soon. A later call returns a late answer.

        Raises:
            RuntimeError: The store has failed.
        """
        self._ask(lambda: self._exchange(record))
        if self._error is not None:
            raise RuntimeError(f"the store of the process group failed: {self._error}") from self._error
        return self._seen

    def give_up(self, reason: str, where: str) -> None:
        """Write that this rank sends nothing more, if the store answers soon."""
        self._ask(lambda: self._give_up(WaitRecord(_GAVE_UP, reason, where)))

    def arrived(self) -> None:
        """Write that this process no longer waits, after a wait that was recorded.

        The record of a wait that failed stays: the other ranks may time out a moment later, and read it.
        """
        self._ask(lambda: self._note(None))

    def elsewhere(self) -> dict[int, WaitRecord]:
        """Return by rank what ranks wait for in other groups, as far as the store answers soon."""
        found: dict[int, WaitRecord] = {}
        self._ask(lambda: found.update(self._elsewhere()))
        return dict(found)

    def _ask(self, question: Callable[[], None]) -> None:
        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=self._answer, args=(question,), name="pyzero-store", daemon=True)
            self._asking.start()
        self._asking.join(_PATIENCE_S)

    def _answer(self, question: Callable[[], None]) -> None:
        try:
            question()
        except Exception as error:  # of the store
            self._error = error

    def _exchange(self, record: WaitRecord) -> None:
        self._write(str(self._rank), record)
        self._note(record)
        latest = self._read(_AWAITED)
        differs = latest is not None and latest.number == record.number and latest.what != record.what
        if differs:
            self._store.set(_TROUBLE, "1")
        if differs or self._store.check([_TROUBLE]):
            records = {rank: self._read(str(rank)) for rank in range(len(self._members))}
            self._seen = {rank: theirs for rank, theirs in records.items() if theirs is not None}
        elif latest is None or latest.number < record.number:
            self._write(_AWAITED, record)

    def _give_up(self, record: WaitRecord) -> None:
        with contextlib.suppress(RuntimeError, ValueError):  # without the store the other ranks are gone too
            self._write(str(self._rank), record)
            self._store.set(_TROUBLE, "1")

    def _note(self, record: WaitRecord | None) -> None:
        self._everyones.set(str(self._members[self._rank]), json.dumps([self._name, record]))

    def _elsewhere(self) -> dict[int, WaitRecord]:
        found = {}
        for rank, member in enumerate(self._members):
            if rank != self._rank and self._everyones.check([str(member)]):
                name, record = json.loads(self._everyones.get(str(member)))
                if record is not None and name != self._name:
                    found[rank] = WaitRecord(*record)
        return found

    def _write(self, key: str, record: WaitRecord) -> None:
        self._store.set(key, json.dumps(record))

    def _read(self, key: str) -> WaitRecord | None:
        return WaitRecord(*json.loads(self._store.get(key))) if self._store.check([key]) else None
