"""The gradients of one bucket: a record for each parameter, and this rank's shard of their mean."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from pyzero import memory, ops
from pyzero.gradients import nonfinite
from pyzero.gradients.pieces import Pieces
from pyzero.gradients.reduced.accumulation import InShards, ParamGrad
from pyzero.gradients.stats_rows import FIRST_BAD, clean_rows, first_bad_of, flag_of, sumsq_of
from pyzero.sharding.buckets import Bucket
from pyzero.sharding.layout import ShardRun


class BucketGrads:
    """The gradients of one bucket: a record for each parameter, and this rank's shard of their mean.

    In a shard, the parts of parameters without a reduced gradient are zero. Without a shard, all are zero.
    """

    def __init__(self, bucket: Bucket, records: list[ParamGrad], backend: str) -> None:
        self.bucket = bucket
        self.records = records  # by position in the bucket
        self.shard: Tensor | None = None  # (shard_numel,) fp32, averaged over ranks and unscaled, without `factor`
        self._shard_pages = memory.PagePool.of_one(bucket.layout.shard_numel, torch.float32)
        # (num_runs, 3): the shard's overflow flag and first bad parameter in the first row; sums of squares by run.
        self.stats = clean_rows(len(bucket.layout.runs), bucket.device)
        self._stats_are_stale = False  # the shard has changed since flag and squares were computed
        self._pieces = Pieces(bucket, 0, bucket.layout.numel)
        self._backend = backend

    @property
    def found_inf(self) -> Tensor:
        """The shard's overflow flag: (1,) fp32."""
        return flag_of(self.stats[0])

    @property
    def first_bad(self) -> Tensor:
        """The code of the first bad parameter in all received slices: (1,) fp64."""
        return first_bad_of(self.stats[0])

    @property
    def is_reduced(self) -> bool:
        """Whether the shard holds a part of some gradient."""
        return any(record.is_reduced for record in self.records)

    def clear_stale(self) -> None:
        """Zero the parts of all of the bucket's cleared gradients. If no gradient is left, drop the shard."""
        stale = [record for record in self.records if record.observe() or record.shard_is_stale]
        if self.is_reduced:
            for record in stale:
                self._zero_part(record)
        else:
            self.shard = None
            self.first_bad.fill_(nonfinite.NOT_FOUND)
            self._clear_flag_and_squares()
            self._stats_are_stale = False
        for record in stale:
            record.shard_is_stale = False

    def write(self, record: ParamGrad, value: Tensor) -> None:
        """Write this rank's part of (numel,) `value`, in memory order, into the shard."""
        if self.shard is None:
            self.shard = torch.zeros(self.bucket.layout.shard_numel, dtype=torch.float32, device=self.bucket.device)
        _, in_param = self.bucket.shard_part(record.position)
        self._zero_part(record)
        self.part(record).copy_(value[in_param])

    def part(self, record: ParamGrad) -> Tensor:
        """Return this rank's part of one parameter's reduced gradient, a view of the shard."""
        assert self.shard is not None
        in_shard, _ = self.bucket.shard_part(record.position)
        return self.shard[in_shard]

    def _zero_part(self, record: ParamGrad) -> None:
        """Zero this rank's part and the gap behind it, because a NaN factor may have made the gap NaN."""
        if self.shard is not None:
            self.shard[self.bucket.shard_slot(record.position)].zero_()
            self._stats_are_stale = True

    def zero(self, record: ParamGrad) -> None:
        """Fill one reduced gradient with zeros."""
        if record.is_reduced:
            record.factor = None
            record.count_clear()
            record.in_shards = InShards.ZEROS
            self._zero_part(record)

    def pack(self, send: Tensor, left_out: Callable[[ParamGrad], bool]) -> Tensor:
        """Pack local gradients into (numel,) `send`, with zeros for parameters without one."""
        grads = [None if left_out(record) else record.local_sum() for record in self.records]
        layout = self.bucket.layout
        missing = [slot for slot, grad in zip(layout.param_slots, grads, strict=True) if grad is None]
        if missing:
            torch._foreach_zero_([send[slot.offset : slot.offset + slot.numel] for slot in missing])
        pieces = self._pieces.as_they_lie(grads) or self._pieces.of(grads)
        ops.pack_(send, pieces.tensors, offsets=pieces.offsets, backend=self._backend)
        return send

    def mark_sent(self, left_out: Callable[[ParamGrad], bool]) -> None:
        """Mark each record as sent (its `.grad` becomes a ShardedGrad), or as left out of this round."""
        for record in self.records:
            if left_out(record):
                record.mark_sent_as_zeros()
            else:
                record.mark_reduced()

    def shard_memory(self) -> Tensor:
        """Return the shard, or memory for one."""
        if self.shard is not None:
            return self.shard
        return self._shard_pages.empty(self.bucket.layout.shard_numel, torch.float32, self.bucket.device)

    def reduce_slices(
        self, shard: Tensor, slices: list[Tensor], scale: float | Tensor, accumulate: bool, stats: Tensor
    ) -> None:
        """Sum all ranks' slices into the shard.

        Args:
            shard: From `shard_memory`.
            slices: (shard_numel,) each, see comm/transport.py's Exchange.
            scale: Factor for the sum.
            accumulate: Add to the shard, if there is one, instead of replacing it.
            stats: (num_runs, 3) clean rows. They become the shard's statistics.
        """
        accumulate &= self.shard is not None
        before, self.stats = self.first_bad, stats
        if accumulate:
            self.first_bad.copy_(before)
        self.shard = shard
        found_inf = self.found_inf
        for run in self.bucket.runs:
            ops.reduce_scatter_(
                shard[run.low : run.high],
                [piece[run.low : run.high] for piece in slices],
                scale=scale,
                accumulate=accumulate,
                found_inf=found_inf,
                sumsq=self._squares(run),
                backend=self._backend,
            )
        self._stats_are_stale = False

    def apply_factors(self) -> None:
        """Multiply the factors that clipping and GradScaler have left into the shard.

        Neighbours with the same factor take one launch. Known zeros stay zeros, because the factor may be NaN.
        """
        factors = [record.factor if record.has_reduced_values else None for record in self.records]
        for _, neighbours in groupby(range(len(factors)), key=lambda position: id(factors[position])):
            first, *rest = neighbours
            factor, last = factors[first], (rest or [first])[-1]
            if factor is not None and self.shard is not None:
                begin, end = self.bucket.shard_slot(first).start, self.bucket.shard_slot(last).stop
                self.shard[begin:end].mul_(factor)
                self._stats_are_stale = True
        for record in self.records:
            record.factor = None

    def refresh_stats(self) -> None:
        """Recompute flag and squares if the shard has changed since."""
        if not self._stats_are_stale or self.shard is None:
            return
        found_inf = self.found_inf
        self._clear_flag_and_squares()
        for run in self.bucket.runs:
            part = [self.shard[run.low : run.high]]
            ops.unscale_(part, 1.0, found_inf=found_inf, sumsq=self._squares(run), backend=self._backend)
        self._stats_are_stale = False

    def _squares(self, run: ShardRun) -> Tensor | None:
        """Return the place for a run's sum of squares, (1,) fp64; None if it does not count for the norm."""
        return sumsq_of(self.stats[run.index]) if run.key.in_norm else None

    def _clear_flag_and_squares(self) -> None:
        self.stats[:, :FIRST_BAD].zero_()
