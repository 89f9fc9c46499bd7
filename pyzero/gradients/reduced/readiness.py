"""Tracks which buckets a backward has filled, so that they can be sent while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyzero.gradients.reduced.accumulation import ParamGrad
from pyzero.gradients.reduced.bucket_grads import BucketGrads
from pyzero.gradients.reduced.records import GradRecords


@dataclass
class _Fill:
    """How full a bucket is."""

    grads: BucketGrads
    num_awaited: int  # parameters without a gradient so far in this round
    waits_for_end: bool  # send at the end of backward, because in an earlier round a gradient came after the bucket


class Readiness:
    """Counts the gradients that arrive in a round.

    Parameters that no rank used in the last step are deferred: no bucket waits for them in backward, and their
    gradients are sent when gradients are read. That takes a second round of all buckets, so it happens once to each:
    then the bucket waits for it in every step.
    """

    def __init__(self, records: GradRecords) -> None:
        self._records = records
        self._fills: list[_Fill] = []  # by bucket
        self._arrived: set[ParamGrad] = set()  # in this round
        self._deferred: set[ParamGrad] = set()  # unused in the last step on all ranks
        self._undeferrable: set[ParamGrad] = set()  # once got a gradient while deferred

    def add(self) -> None:
        """Called after a bucket was appended."""
        self._fills += [_Fill(grads, len(grads.records), False) for grads in self._records.buckets[len(self._fills) :]]

    def move(self) -> None:
        """Called after the gradients have moved to other buckets."""
        waiting = {record for fill in self._fills if fill.waits_for_end for record in fill.grads.records}
        self._fills = [
            _Fill(grads, len(grads.records), any(record in waiting for record in grads.records))
            for grads in self._records.buckets
        ]

    def is_deferred(self, record: ParamGrad) -> bool:
        """Whether the parameter is deferred."""
        return record in self._deferred

    def note(self, grads: BucketGrads, record: ParamGrad) -> None:
        """Note that a gradient has arrived."""
        if record not in self._arrived:
            self._arrived.add(record)
            self._fills[grads.bucket.index].num_awaited -= 1

    def note_late(self, grads: BucketGrads) -> None:
        """Note a gradient that arrived after its bucket was sent. From now on the bucket waits for the end."""
        self._fills[grads.bucket.index].waits_for_end = True

    def is_full(self, index: int) -> bool:
        """Whether there is such a bucket, and it can be sent."""
        return index < len(self._fills) and self._fills[index].num_awaited == 0 and not self.waits_for_end(index)

    def waits_for_end(self, index: int) -> bool:
        """Whether this bucket is sent only at the end of backward."""
        return self._fills[index].waits_for_end

    def begin_round(self) -> None:
        """Begin a round, without any gradients so far."""
        self._arrived.clear()
        for fill in self._fills:
            fill.num_awaited = sum(record not in self._deferred for record in fill.grads.records)

    def after_step(self, used: Sequence[bool]) -> None:
        """Defer parameters that no rank has used. used: By parameter number. Called after a step."""
        self._undeferrable |= {record for record in self._deferred if used[record.number]}
        unused = {record for record in self._records.by_number if not used[record.number]}
        self._deferred = unused - self._undeferrable if any(used) else set()
        self.begin_round()
