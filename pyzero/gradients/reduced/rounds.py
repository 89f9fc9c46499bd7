"""Rounds: in each, every bucket is sent once, in the same order on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyzero.comm.group import Group
from pyzero.gradients.reduced.accumulation import ParamGrad
from pyzero.gradients.reduced.exchange import BucketExchange
from pyzero.gradients.reduced.records import GradRecords
from pyzero.gradients.reduced.unsent_scale import UnsentScale
from pyzero.gradients.stats_rows import clean_rows

_LeftOut = Callable[[ParamGrad], bool]  # whether a round sends zeros for a gradient; the same on all ranks


class Rounds:
    """Sends this rank's gradients in rounds, with zeros for parameters without one.

    Whether there is a round never depends on facts that only this rank knows. A backward makes one (stage 2). A read of
    gradients makes one if none was made since the last step, or if any rank says in the step's message that it holds
    unsent gradients. With a loss scale only the message tells, because ranks must agree first whether unsent gradients
    carry the scale.

    Args:
        dtype: dtype to send in; None: the weights'.
    """

    def __init__(
        self,
        group: Group,
        records: GradRecords,
        exchange: BucketExchange,
        unsent_scale: UnsentScale,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self.num_finished = 0  # since the optimizer was built: the same on all ranks
        self.next = 0  # the bucket to send next
        self.is_due = False  # the other ranks make a round that this rank has not finished
        self._num_used = 0  # rounds that the last step has used
        self._num_steps = 0
        self._clean_rows = clean_rows(0, device)  # of all buckets' runs
        self._stats: Sequence[Tensor] = ()  # by bucket: rows for this round
        self._group = group
        self._records = records
        self._exchange = exchange
        self._unsent_scale = unsent_scale
        self._dtype = dtype

    def note_read(self) -> None:
        """Called when all ranks read gradients: a round is due if none was made since the last step."""
        self.is_due |= self.num_finished == self._num_used and self._unsent_scale.inv_scale is None

    def after_step(self) -> None:
        """Called after a step, which has used all gradients that were sent."""
        self._num_steps += 1
        self._num_used = self.num_finished
        self._group.where = f"in or after step {self._num_steps}"

    def finish(self, left_out: _LeftOut, sends_zeros: bool = False) -> None:
        """Send the buckets that this round has not sent yet. Collective.

        sends_zeros: Send zeros instead of this rank's gradients. A later round sends those.
        """
        while self.next < len(self._records.buckets):
            self.send_next(left_out, sends_zeros)
        self.next = 0
        self.num_finished += 1
        self.is_due = False
        self._unsent_scale.after_round()
        self._group.where = f"after {self.num_finished - self._num_used} backwards since step {self._num_steps}"

    def send_next(self, left_out: _LeftOut, sends_zeros: bool = False) -> None:
        """Send one bucket. Collective."""
        grads = self._records.buckets[self.next]
        what = f"the reduce-scatter of gradient bucket {self.next}"
        if self.next == 0 or len(self._stats) < len(self._records.buckets):
            self._stats = self._new_stats()
        stats = self._stats[self.next]
        self._records.forget_norms()  # on all ranks alike: a gradient has come on some
        for record in [] if sends_zeros else grads.records:
            self._records.observe(grads, record)
        is_skipped = all(left_out(record) for record in grads.records)  # on all ranks
        if sends_zeros:
            left_out = everything

        def count() -> None:
            grads.mark_sent(left_out)
            self.next += 1

        if is_skipped:
            count()
            return
        dtype = self._dtype or grads.bucket.dtype
        scale = self._unsent_scale.mean_factor(self._group.size)
        self._exchange.send(grads, dtype, scale, left_out, count, what, stats)

    def _new_stats(self) -> Sequence[Tensor]:
        """Make clean rows of statistics for all buckets of a round, in one launch."""
        counts = [len(grads.bucket.layout.runs) for grads in self._records.buckets]
        if len(self._clean_rows) != sum(counts):
            self._clean_rows = clean_rows(sum(counts), self._clean_rows.device)
        rows: Sequence[Tensor] = self._clean_rows.clone().split(counts)
        return rows


def nothing(record: ParamGrad) -> bool:
    """Leave nothing out of a round: a `left_out` for rounds that a read asks for."""
    return False


def everything(record: ParamGrad) -> bool:
    """Leave everything out of a round: a `left_out` if nothing can be sent."""
    return True
