"""Gradients of all ranks, reduced into this rank's shards: the interface for callers and for step()."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from pyzero.comm.group import Group
from pyzero.comm.transport import Transport
from pyzero.comm.work import CollectiveError
from pyzero.gradients.amp import GradScalerProxy
from pyzero.gradients.grad_stats import GlobalGradStats, GradStatsExchange, LocalGradStats, Unsent, mixed_scale_error
from pyzero.gradients.interface import Gradients
from pyzero.gradients.norms import power_sum, powers_of
from pyzero.gradients.reduced.accumulation import InShards, ParamGrad
from pyzero.gradients.reduced.arrival_order import ArrivalOrder
from pyzero.gradients.reduced.deferred_factors import DeferredFactors
from pyzero.gradients.reduced.exchange import BucketExchange
from pyzero.gradients.reduced.records import GradRecords
from pyzero.gradients.reduced.rounds import Rounds
from pyzero.gradients.reduced.stage1_reducer import ReducerParts, Stage1Reducer
from pyzero.gradients.reduced.stage2_reducer import Stage2Reducer
from pyzero.gradients.reduced.unsent_scale import UnsentScale
from pyzero.gradients.stats_rows import clean_rows, flag_of
from pyzero.sharding.buckets import Bucket
from pyzero.sharding.gather import gather_param


@dataclass(frozen=True)
class ReductionOptions:
    """How gradients travel."""

    in_backward: bool  # stage 2: each backward makes a round
    overlap: bool  # send a full bucket while backward goes on
    dtype: torch.dtype | None  # dtype to send in; None: the weights'


class ReducedGradients(Gradients):
    """The mean of gradients over ranks. It lies in this rank's shards once the reducer has made a round.

    GradRecords holds each gradient's state, BucketExchange the buckets in flight, UnsentScale and DeferredFactors the
    factors that gradients still need. Rounds sends buckets, and the reducer decides when.
    """

    reduces = True

    def __init__(
        self,
        group: Group,
        stats_exchange: GradStatsExchange,
        transport: Transport,
        device: torch.device,
        options: ReductionOptions,
        arrival_order: ArrivalOrder,
        inv_scale: Tensor | None,
        grad_scaler_proxy: GradScalerProxy,
        backend: str,
    ) -> None:
        super().__init__(group, stats_exchange, device)
        self._exchange = BucketExchange(stats_exchange.names, transport, device)
        self._records = GradRecords(self._exchange, weakref.ref(self), backend)
        self._unsent_scale = UnsentScale(self._records, inv_scale)
        self._factors = DeferredFactors(self._records, device)
        self._rounds = Rounds(group, self._records, self._exchange, self._unsent_scale, options.dtype, device)
        parts = ReducerParts(
            group=group,
            device=device,
            records=self._records,
            exchange=self._exchange,
            rounds=self._rounds,
            unsent_scale=self._unsent_scale,
            factors=self._factors,
            grad_scaler_proxy=grad_scaler_proxy,
            name_of=stats_exchange.name_of,
        )
        self._reducer = (
            Stage2Reducer(parts, options.overlap, arrival_order) if options.in_backward else Stage1Reducer(parts)
        )
        self.hooks = self._reducer.hooks

    def add(self, bucket: Bucket) -> None:
        """Append a bucket and hook its parameters. Gradients that are in `.grad` already count as unsent."""
        self._exchange.receive_all()  # the transport may replace its memory
        self._records.add(bucket)
        self._reducer.add(bucket)

    def move_to(self, buckets: list[Bucket]) -> None:
        """See Gradients."""
        self._exchange.receive_all()
        self._records.move_to(buckets, self._group)
        self._reducer.move()

    # ---- backward --------------------------------------------------------------------------------------------------

    def watch(self, frozen: Iterable[Tensor], place_unfrozen: Callable[[], None]) -> None:
        """See Gradients."""
        self._reducer.watch(frozen, place_unfrozen)

    def no_sync(self) -> AbstractContextManager[None]:
        """See Gradients."""
        return self._reducer.no_sync()

    def in_backward(self) -> AbstractContextManager[None]:
        """See Gradients."""
        return self._reducer.in_backward()

    def finish_broken_round(self) -> None:
        """See Gradients."""
        self._reducer.finish_broken_round()

    def scaled_by(self, inv_scale: Tensor, epoch: int) -> AbstractContextManager[None]:
        """See Gradients."""
        return self._unsent_scale.arriving()

    def check_arrived(self) -> None:
        """See Gradients."""
        if any(record.was_reassigned_or_edited for record in self._records.by_number):
            raise RuntimeError(
                "expected gradients that backward adds to .grad in scaled_gradients(), got one that was assigned or "
                "edited, as zero-bubble schedules do; take a schedule of whole backwards (1F1B, GPipe), or one replica"
            )

    # ---- what the caller does to `.grad` ---------------------------------------------------------------------------

    @property
    def num_rounds(self) -> int:
        """See sharded_grad.GradOwner."""
        return self._rounds.num_finished

    @property
    def norm_before_clip(self) -> Tensor | None:
        """See Gradients."""
        return self._records.norm_before_clip

    @norm_before_clip.setter
    def norm_before_clip(self, norm: Tensor | None) -> None:
        self._records.norm_before_clip = norm

    def zero(self, record: ParamGrad) -> None:
        """See sharded_grad.GradOwner."""
        self._reducer.begin_edit()
        self._records.forget_norms()
        self._records.by_param[record.param][0].zero(record)

    @torch.no_grad()
    def scale(self, records: Sequence[ParamGrad], factor: Tensor | float, inverse: bool = False) -> None:
        """See sharded_grad.GradOwner."""
        self._reducer.begin_edit()
        self._factors.multiply(records, factor, inverse)

    def _multiply(self, factor: Tensor) -> None:
        self.scale(self._records.by_number, factor)

    @torch.no_grad()
    def unscale(self, factor: Tensor) -> None:
        """See Gradients."""
        self._reducer.begin_edit()
        self._factors.unscale(factor)

    def replace(self, bucket: Bucket, position: int, value: Tensor) -> None:
        """See Gradients. Writes into the shards. Not collective, but every rank must make the same call."""
        self._reducer.begin_edit()
        self._records.forget_norms()
        grads = self._records.buckets[bucket.index]
        record = grads.records[position]
        self._records.observe(grads, record)
        grads.write(record, value)
        record.mark_replaced()

    @torch.no_grad()
    def param_norm(self, record: ParamGrad, norm_type: float) -> Tensor:
        """See sharded_grad.GradOwner. Computes the norms of all parameters in one message, and keeps them."""
        if not self._stats_exchange.same_params:
            raise RuntimeError(
                "expected no norm of one .grad, of which other model-parallel ranks may hold parts, got one; call "
                "optimizer.clip_grad_norm_(max_norm), which knows them"
            )
        known = self._records.param_norms
        if known is None or known[0] != norm_type:
            self.collect(None, "a norm of .grad")
            self._factors.apply()
            powers = powers_of(self._records.parts(), norm_type, self._device)
            known = self._records.param_norms = (norm_type, self._stats_exchange.norm(powers, norm_type, None))
        return known[1][record.number].clone()  # the caller may add to it

    # ---- what a step asks ------------------------------------------------------------------------------------------

    def collect(self, scaler_found_inf: Tensor | None, purpose: str) -> GlobalGradStats:
        """See Gradients."""
        self._reducer.check_active()
        if torch.is_inference_mode_enabled():  # shards are also written outside of it
            with torch.inference_mode(False), torch.no_grad():
                return self.collect(scaler_found_inf, purpose)
        with self._telling_errors(purpose):
            self._reducer.make_due_round()
            mine = self._local_stats(scaler_found_inf, purpose)
        stats = self._gather(mine)
        if stats.has_unsent:
            with self._telling_errors(purpose):
                self._unsent_scale.is_carried = stats.unsent_is_scaled
                self._rounds.is_due = True
                self._reducer.make_due_round()
                mine = self._local_stats(scaler_found_inf, purpose)
            stats = self._gather(mine)
        return stats

    def tell_error(self, purpose: str) -> None:
        """See Gradients. Takes part in the others' round, with zeros if this rank cannot send its gradients."""
        with self._stats_exchange.lockstep(CollectiveError):
            try:
                self._reducer.make_due_round()
            except CollectiveError:
                raise
            except Exception:
                self._reducer.send_zeros()
            self._exchange.receive_all()
        nobody = [False] * len(self._records.by_number)
        rows = clean_rows(sum(len(grads.stats) for grads in self._records.buckets) or 1, self._device)
        self._gather(LocalGradStats(rows, nobody, purpose, num_rounds=self._rounds.num_finished, has_error=True))

    def _gather(self, mine: LocalGradStats) -> GlobalGradStats:
        known = self._stats_exchange.gather(mine, None)
        for record in self._records.by_number:
            if record.is_reduced and not known.used[record.number]:
                record.in_shards = InShards.ZEROS
        return known

    def _local_stats(self, scaler_found_inf: Tensor | None, purpose: str) -> LocalGradStats:
        self._exchange.receive_all()
        self._factors.apply_different()
        for grads in self._records.buckets:
            grads.refresh_stats()
        rows = torch.cat([grads.stats for grads in self._records.buckets] or [clean_rows(1, self._device)])
        if scaler_found_inf is not None:
            found = flag_of(rows[0])
            torch.maximum(found, scaler_found_inf, out=found)
        records = self._records.by_number
        products = [record.product for record in records]
        return LocalGradStats(
            rows,
            used=[record.is_used for record in records],
            purpose=purpose,
            edits=[record.num_edits for record in records],
            products=products if any(product != 1.0 for product in products) else (),
            unsent=self._unsent_scale.kind(),
            num_rounds=self._rounds.num_finished,
            half_edited=next((record.number for record in records if record.is_half_edited), None),
        )

    def unsent(self) -> Unsent:
        """See Gradients."""
        return self._reducer.unsent()

    def send_unsent(self, kinds: set[Unsent]) -> None:
        """See Gradients."""
        if {Unsent.PLAIN, Unsent.SCALED} <= kinds:
            raise mixed_scale_error()
        if kinds != {Unsent.NONE}:
            self._unsent_scale.is_carried = Unsent.SCALED in kinds
            self._reducer.make_round()
        self._exchange.receive_all()  # before buckets move

    def spans(self, bucket: Bucket) -> Iterator[tuple[int, Tensor]]:
        """See Gradients. Yields the shard: fp32, averaged over ranks, unscaled."""
        yield 0, self._shard(bucket)

    def _shard(self, bucket: Bucket) -> Tensor:
        shard = self._records.buckets[bucket.index].shard
        assert shard is not None
        return shard

    def factor(self) -> Tensor | None:
        """See Gradients. All reduced gradients have the same one, or none."""
        return self._factors.common()

    def whole(self, bucket: Bucket, position: int) -> Tensor:
        """See Gradients."""
        return gather_param(self._group, bucket, position, self._shard(bucket))

    def norm_power(self, norm_type: float) -> Tensor:
        """See Gradients."""
        parts = []
        for grads in self._records.buckets:
            for run in grads.bucket.runs:
                if run.key.in_norm and grads.shard is not None:
                    parts.append(grads.shard[run.low : run.high])
        return power_sum(parts, norm_type, self._device)

    def locate_nonfinite(self, always: bool) -> None:
        """See Gradients."""
        self._exchange.locates = always

    def after_step(self, used: Sequence[bool]) -> None:
        """See Gradients. A later step without a new gradient has another norm: that of the clipped ones."""
        self._reducer.after_step(used)
        self._records.norm_before_clip = None

    def has_pending_gradients(self) -> bool:
        """See Gradients."""
        return self._reducer.awaits_step and any(record.param.grad is not None for record in self._records.by_number)

    def reset(self) -> None:
        """See Gradients."""
        self._records.forget_norms()
        self._reducer.reset()
