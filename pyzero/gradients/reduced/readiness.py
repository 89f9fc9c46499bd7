"""Which buckets a backward has filled, so that they can be sent while it goes on."""

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
    num_awaited: int  # parameters whose gradients have not come in this round
    waits_for_end: bool  # sent at the end of backward: in an earlier round a gradient came after it was sent


class Readiness:
    """Counts the gradients that arrive in a round.

    Parameters that no rank used in the last step are deferred: no bucket waits for them in backward, and what gradients
    they get are sent when gradients are read.
    """

    def __init__(self, records: GradRecords) -> None:
        self._records = records
        self._fills: list[_Fill] = []  # by bucket
        self._arrived: set[ParamGrad] = set()  # in this round
        self._deferred: set[ParamGrad] = set()  # unused in the last step on all ranks
        self._undeferrable: set[ParamGrad] = set()  # got a gradient once while they were deferred

    def add(self) -> None:
        """Called where a bucket has been appended."""
        self._fills += [_Fill(grads, len(grads.records), False) for grads in self._records.buckets[len(self._fills) :]]

    def move(self) -> None:
        """Called where the gradients have moved to other buckets."""
        waiting = {record for fill in self._fills if fill.waits_for_end for record in fill.grads.records}
        self._fills = [
            _Fill(grads, len(grads.records), any(record in waiting for record in grads.records))
            for grads in self._records.buckets
        ]

    def is_deferred(self, record: ParamGrad) -> bool:
        """No rank used it in the last step."""
        return record in self._deferred

    def note(self, grads: BucketGrads, record: ParamGrad) -> None:
        """Called when a gradient has arrived."""
        if record not in self._arrived:
            self._arrived.add(record)
            self._fills[grads.bucket.index].num_awaited -= 1

    def note_late(self, grads: BucketGrads) -> None:
        """Called when a gradient has arrived after its bucket was sent. From now on that waits for the end."""
        self._fills[grads.bucket.index].waits_for_end = True

    def is_full(self, index: int) -> bool:
        """Whether there is such a bucket, which can be sent."""
        return index < len(self._fills) and self._fills[index].num_awaited == 0 and not self.waits_for_end(index)

    def waits_for_end(self, index: int) -> bool:
        """Whether this bucket is sent at the end of backward alone."""
        return self._fills[index].waits_for_end

    def begin_round(self) -> None:
        """No gradient has arrived."""
        self._arrived.clear()
        for fill in self._fills:
            fill.num_awaited = sum(record not in self._deferred for record in fill.grads.records)

    def after_step(self, used: Sequence[bool]) -> None:
        """Called after a step: defers what no rank used, by parameter number."""
        self._undeferrable |= {record for record in self._deferred if used[record.number]}
        unused = {record for record in self._records.by_number if not used[record.number]}
        self._deferred = unused - self._undeferrable if any(used) else set()
        self.begin_round()
