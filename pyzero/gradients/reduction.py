"""Stage 1: gradients of all ranks reduced into this rank's shards when they are first read. Stage 2: overlap.py."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from pyzero.comm.group import CollectiveError, Group
from pyzero.comm.transport import Transport
from pyzero.gradients.accumulation import ParamGrad, sparse_error
from pyzero.gradients.amp import GradScalerProxy
from pyzero.gradients.backward import BackwardEnd, GradientHooks
from pyzero.gradients.deferred_factors import DeferredFactors
from pyzero.gradients.exchange import BucketExchange
from pyzero.gradients.grad_stats import GlobalGradStats, GradStatsExchange, LocalGradStats, Unsent, mixed_scale_error
from pyzero.gradients.interface import Gradients
from pyzero.gradients.norms import power_sum, powers_of
from pyzero.gradients.records import GradRecords
from pyzero.gradients.rounds import Rounds, nothing
from pyzero.gradients.stats_rows import clean_rows, flag_of
from pyzero.gradients.unsent_scale import UnsentScale
from pyzero.sharding.buckets import Bucket
from pyzero.sharding.gather import gather_param
from pyzero.sharding.local_param import user_param
from pyzero.sharding.modules import find_ddp_wrapper


@dataclass(frozen=True)
class ReductionOptions:
    """How gradients travel."""

    overlap: bool  # stage 2: a full bucket leaves while backward goes on
    dtype: torch.dtype | None  # to send in; None: that of the weights


class ReducedGradients(Gradients):
    """Reduces the gradients of all ranks into this rank's shards, in rounds (rounds.py)."""

    reduces = True

    def __init__(
        self,
        group: Group,
        stats_exchange: GradStatsExchange,
        transport: Transport,
        device: torch.device,
        options: ReductionOptions,
        inv_scale: Tensor | None,
        grad_scaler_proxy: GradScalerProxy,
        backend: str,
    ) -> None:
        super().__init__(group, stats_exchange, device, backend)
        self._options = options
        self._grad_scaler_proxy = grad_scaler_proxy
        self._bucket_exchange = BucketExchange(stats_exchange.names, transport, device)
        self._self = weakref.ref(self)
        self._records = GradRecords(self._bucket_exchange, self._self, backend)
        self._unsent_scale = UnsentScale(self._records, inv_scale)

        self._rounds = Rounds(group, self._records, self._bucket_exchange, self._unsent_scale, options.dtype, device)
        self._awaits_step = False  # a gradient has come since the last step
        self._factors = DeferredFactors(self._records, device)

        self._is_checked = False  # no DistributedDataParallel reduces these gradients too
        self._frozen: dict[Tensor, None] = {}  # parameters that lie in no bucket yet
        self._place_unfrozen: weakref.WeakMethod[Callable[[], None]] | None = None
        self._hooks = GradientHooks(
            self._before_gradient, self._after_gradient, self._without_gradient, self._missed_gradient
        )
        self._end = BackwardEnd(self._end_of_backward, self.finish_broken_round)

    def add(self, bucket: Bucket) -> None:
        """Append a bucket and hook its parameters; what `.grad` holds already counts as unsent."""
        self._bucket_exchange.receive_all()  # the transport may make room anew
        self._records.add(bucket)
        self._buckets.append(bucket)
        self._hooks.add(bucket.params)
        for param in bucket.params:
            self._frozen.pop(user_param(param), None)

    def watch(self, frozen: Iterable[Tensor], place_unfrozen: Callable[[], None]) -> None:
        """See Gradients."""
        known = {*self._frozen, *map(user_param, self._records.by_param)}  # what was frozen again has its bucket
        new = dict.fromkeys(param for param in frozen if param not in known)
        self._frozen |= new
        self._place_unfrozen = weakref.WeakMethod(place_unfrozen)
        self._hooks.watch(new, self._after_unfrozen)

    def move_to(self, buckets: list[Bucket]) -> None:
        """See Gradients."""
        self._bucket_exchange.receive_all()
        self._buckets = list(buckets)
        self._records.move_to(buckets, self._group)

    # ---- arrival ---------------------------------------------------------------------------------------------------

    def scaled_by(self, inv_scale: Tensor, epoch: int) -> AbstractContextManager[None]:
        """See Gradients."""
        return self._unsent_scale.arriving()

    def check_arrived(self) -> None:
        """See Gradients."""
        if any(record.is_touched for record in self._records.by_number):
            raise RuntimeError(
                "expected gradients that backward adds to .grad in scaled_gradients(), got one that was assigned or "
                "edited, as zero-bubble schedules do; take a schedule of whole backwards (1F1B, GPipe), or one replica"
            )

    def _before_gradient(self, param: Tensor) -> None:
        if not self._is_checked:
            self._check_unwrapped()
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"expected a backward that a CUDA graph can replay, got {self._group.size} ranks that reduce gradients "
                f"in it; run backward and step() eagerly"
            )
        grads, record = self._records.by_param[param]
        record.check_grad_dtype()
        self._begin_backward()
        self._awaits_step = True
        self._take_grad_scaler_factor()
        self._records.forget_norms()
        self._records.observe(grads, record)
        self._unsent_scale.before_gradient()
        record.before_arrival()

    def _begin_backward(self) -> None:
        """Called before each gradient; the first one ends a backward that was broken off."""
        self._end.begin()
        self._end.await_end()

    def _after_gradient(self, param: Tensor) -> None:
        _, record = self._records.by_param[param]
        grad = record.param.grad
        if grad is not None and grad.layout != torch.strided:
            record.param.grad = None
            raise sparse_error(record.param, self._stats_exchange.name_of(record.number))
        record.after_arrival()

    def _missed_gradient(self, param: Tensor) -> None:
        """The gradient has come unannounced: what `.grad` holds is this rank's sum, as if assigned."""
        grads, record = self._records.by_param[param]
        arrived = record.set_aside()
        try:
            self._before_gradient(param)
        finally:
            record.take_unannounced(arrived)
        self._records.observe(grads, record)

    def _without_gradient(self, param: Tensor) -> None:
        """The backward goes through the parameter, and leaves `.grad` alone."""
        self._begin_backward()

    def _after_unfrozen(self) -> None:
        self._end.begin()
        self._end.await_end()

    def _end_of_backward(self) -> None:
        self._end.forget()
        if self.sync:  # ranks may run backward unequally often in no_sync()
            self._join_unfrozen()
        for grads, record in self._records.by_param.values():
            if record.is_in_backward:
                self._records.observe(grads, record)
                record.is_in_backward = False
            record.show()

    def _join_unfrozen(self) -> None:
        """Have parameters that are no longer frozen placed; what `.grad` holds counts as unsent."""
        place_unfrozen = self._place_unfrozen and self._place_unfrozen()
        if place_unfrozen and any(param.requires_grad for param in self._frozen):
            place_unfrozen()
            self._records.observe_all()

    def finish_broken_round(self) -> None:
        """See Gradients. There is none: nothing is sent in a backward."""
        self._end.forget()
        for record in self._records.by_number:
            record.finish_arrival()
            record.is_in_backward = False

    @property
    def _is_unfinished(self) -> bool:
        """A backward runs, or was broken off and has not been finished."""
        return self._end.is_awaited

    def _check_unwrapped(self) -> None:
        wrapped = find_ddp_wrapper({user_param(param) for param in self._records.by_param})
        if wrapped is not None:
            raise RuntimeError(
                f"expected a model whose gradients nobody else reduces, got parameters of {wrapped} in "
                f"DistributedDataParallel; pass reduce_grads=False to the optimizer, or the bare model to the loop"
            )
        self._is_checked = True

    @property
    def norm_before_clip(self) -> Tensor | None:
        """See Gradients."""
        return self._records.norm_before_clip

    @norm_before_clip.setter
    def norm_before_clip(self, norm: Tensor | None) -> None:
        self._records.norm_before_clip = norm

    @property
    def num_rounds(self) -> int:
        """See sharded_grad.GradOwner."""
        return self._rounds.num_finished

    def _round(self, left_out: Callable[[ParamGrad], bool], sends_zeros: bool = False) -> None:
        """See Rounds.finish."""
        self._end.forget()
        self._rounds.finish(left_out, sends_zeros)

    # ---- what the caller does to `.grad` ---------------------------------------------------------------------------

    def _take_grad_scaler_factor(self) -> None:
        """Multiply reduced gradients by the factor that GradScaler's unscale_ has applied to its proxy."""
        factor = self._grad_scaler_proxy.take_factor()
        if factor is not None:
            self.unscale(factor)

    def _begin_edit(self) -> None:
        """Called before reduced gradients are edited: the shards are complete, norms of before no longer hold."""
        if self._is_unfinished and torch._C._current_graph_task_id() == -1:  # no backward runs: one was broken off
            self.finish_broken_round()
        self._bucket_exchange.receive_all()
        self._records.param_norms = None

    def unscale(self, factor: Tensor) -> None:
        """See Gradients. So is the norm from before they were clipped."""
        self.scale(self._records.by_number, factor)
        if self.norm_before_clip is not None:
            self.norm_before_clip = self.norm_before_clip * factor

    def zero(self, record: ParamGrad) -> None:
        """See sharded_grad.GradOwner."""
        self._begin_edit()
        self._records.forget_norms()
        self._records.by_param[record.param][0].zero(record)

    @torch.no_grad()
    def scale(self, records: Sequence[ParamGrad], factor: Tensor | float, inverse: bool = False) -> None:
        """See sharded_grad.GradOwner."""
        self._begin_edit()
        self._factors.multiply(records, factor, inverse)

    @torch.no_grad()
    def param_norm(self, record: ParamGrad, norm_type: float) -> Tensor:
        """See sharded_grad.GradOwner. The norms of all parameters come in one message, and are kept."""
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
        if torch.is_inference_mode_enabled():  # shards are written outside it too
            with torch.inference_mode(False), torch.no_grad():
                return self.collect(scaler_found_inf, purpose)
        with self._telling_errors(purpose):
            self._make_due_round()
            mine = self._local_stats(scaler_found_inf, purpose)
        stats = self._gather(mine)
        if stats.has_unsent:
            with self._telling_errors(purpose):
                self._unsent_scale.is_carried = stats.unsent_is_scaled
                self._rounds.is_due = True
                self._make_due_round()
                mine = self._local_stats(scaler_found_inf, purpose)
            stats = self._gather(mine)
        return stats

    def tell_error(self, purpose: str) -> None:
        """See Gradients. The round that the others make is made, of zeros where this rank cannot send what it holds."""
        with self._stats_exchange.lockstep(CollectiveError):
            try:
                self._make_due_round()
            except CollectiveError:
                raise
            except Exception:
                self._send_zeros()
            self._bucket_exchange.receive_all()
        nobody = [False] * len(self._records.by_number)
        rows = clean_rows(sum(len(grads.stats) for grads in self._records.buckets) or 1, self._device)
        self._gather(LocalGradStats(rows, nobody, purpose, num_rounds=self._rounds.num_finished, has_error=True))

    def _make_due_round(self) -> None:
        """See what the caller has done to gradients, and make the round that a read of them asks for, if it does."""
        self._take_grad_scaler_factor()
        self.finish_broken_round()
        self._rounds.note_read()
        self._records.observe_all()
        if self._rounds.is_due:
            self._round(nothing)

    def _send_zeros(self) -> None:
        """As `_make_due_round`, without a look at gradients."""
        self._rounds.note_read()
        if self._rounds.is_due:
            self._round(nothing, sends_zeros=True)

    def _gather(self, mine: LocalGradStats) -> GlobalGradStats:
        known = self._stats_exchange.gather(mine, None)
        for record in self._records.by_number:
            record.is_zero |= not known.used[record.number]
        return known

    def _local_stats(self, scaler_found_inf: Tensor | None, purpose: str) -> LocalGradStats:
        self._bucket_exchange.receive_all()
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
        if self._unsent_scale.inv_scale is None:
            return Unsent.NONE
        self._records.observe_all()
        return self._unsent_scale.kind()

    def send_unsent(self, kinds: set[Unsent]) -> None:
        """See Gradients."""
        if {Unsent.PLAIN, Unsent.SCALED} <= kinds:
            raise mixed_scale_error()
        if kinds != {Unsent.NONE}:
            self._unsent_scale.is_carried = Unsent.SCALED in kinds
            self._round(nothing)
        self._bucket_exchange.receive_all()  # before buckets move

    def spans(self, bucket: Bucket) -> Iterator[tuple[int, Tensor]]:
        """See Gradients. In fp32, averaged over ranks, unscaled."""
        yield 0, self._shard(bucket)

    def _shard(self, bucket: Bucket) -> Tensor:
        shard = self._records.buckets[bucket.index].shard
        assert shard is not None
        return shard

    def factor(self) -> Tensor | None:
        """See Gradients. All reduced gradients have the same one, or none."""
        return self._factors.common()

    def _multiply(self, factor: Tensor) -> None:
        self.scale(self._records.by_number, factor)

    def whole(self, bucket: Bucket, position: int) -> Tensor:
        """See Gradients."""
        return gather_param(self._group, bucket, position, self._shard(bucket))

    def replace(self, bucket: Bucket, position: int, value: Tensor) -> None:
        """See Gradients. Writes into the shards; not collective, but every rank must do the same."""
        self._begin_edit()
        self._records.forget_norms()
        grads = self._records.buckets[bucket.index]
        record = grads.records[position]
        self._records.observe(grads, record)
        grads.replace(record, value)

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
        self._bucket_exchange.locates = always

    def after_step(self, used: Sequence[bool]) -> None:
        """See Gradients."""
        self._rounds.after_step()
        self._awaits_step = False

    def has_pending_gradients(self) -> bool:
        """See Gradients."""
        return self._awaits_step and any(record.param.grad is not None for record in self._records.by_number)

    def reset(self) -> None:
        """See Gradients."""
        self._records.observe_all()
        self._bucket_exchange.receive_all()
