"""The reducer of stage 1: follows gradients through backward, and sends them when they are first read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pyzero.comm.group import Group
from pyzero.gradients.amp import GradScalerProxy
from pyzero.gradients.backward_end import BackwardEnd
from pyzero.gradients.grad_stats import Unsent
from pyzero.gradients.hooks import GradientHooks
from pyzero.gradients.interface import sparse_error
from pyzero.gradients.reduced.accumulation import ParamGrad
from pyzero.gradients.reduced.deferred_factors import DeferredFactors
from pyzero.gradients.reduced.exchange import BucketExchange
from pyzero.gradients.reduced.records import GradRecords
from pyzero.gradients.reduced.rounds import Rounds, nothing
from pyzero.gradients.reduced.unsent_scale import UnsentScale
from pyzero.sharding.buckets import Bucket
from pyzero.sharding.local_param import user_param
from pyzero.sharding.modules import find_ddp_wrapper


@dataclass(frozen=True)
class ReducerParts:
    """The objects that a reducer works with."""

    group: Group
    device: torch.device
    records: GradRecords
    exchange: BucketExchange
    rounds: Rounds
    unsent_scale: UnsentScale
    factors: DeferredFactors
    grad_scaler_proxy: GradScalerProxy
    name_of: Callable[[int], str]  # a parameter's name for messages, by its number


class Stage1Reducer:
    """Follows gradients from the hooks on their parameters to the rounds that send them.

    In a backward it only notes which gradients have come. A read of gradients makes a round, if one is due.
    """

    def __init__(self, parts: ReducerParts) -> None:
        self.awaits_step = False  # a gradient has come since the last step
        self._sync = True  # False inside no_sync
        self._group = parts.group
        self._device = parts.device
        self._records = parts.records
        self._exchange = parts.exchange
        self._rounds = parts.rounds
        self._unsent_scale = parts.unsent_scale
        self._factors = parts.factors
        self._grad_scaler_proxy = parts.grad_scaler_proxy
        self._name_of = parts.name_of
        self._is_checked = False  # that no DistributedDataParallel reduces these gradients too
        self._frozen: dict[Tensor, None] = {}  # parameters that lie in no bucket yet
        self._place_unfrozen: weakref.WeakMethod[Callable[[], None]] | None = None
        self.hooks = GradientHooks(self)
        self._end = BackwardEnd(self._end_of_backward, self.finish_broken_round)

    def add(self, bucket: Bucket) -> None:
        """Hook the parameters of a bucket that has been appended."""
        self.hooks.add(bucket.params)
        for param in bucket.params:
            self._frozen.pop(user_param(param), None)

    def move(self) -> None:
        """Called after the gradients have moved to other buckets."""

    def watch(self, frozen: Iterable[Tensor], place_unfrozen: Callable[[], None]) -> None:
        """See Gradients."""
        known = {*self._frozen, *map(user_param, self._records.by_param)}  # one that was frozen again keeps its bucket
        new = dict.fromkeys(param for param in frozen if param not in known)
        self._frozen |= new
        self._place_unfrozen = weakref.WeakMethod(place_unfrozen)
        self.hooks.watch(new)

    # ---- a backward ------------------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """See Gradients."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def in_backward(self) -> AbstractContextManager[None]:
        """See Gradients."""
        return nullcontext()

    def before_gradient(self, param: Tensor) -> None:
        """See GradientListener."""
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
        self.awaits_step = True
        self._take_grad_scaler_factor()
        self._records.forget_norms()
        self._records.observe(grads, record)
        self._unsent_scale.before_gradient()
        record.before_arrival()

    def _check_unwrapped(self) -> None:
        wrapped = find_ddp_wrapper({user_param(param) for param in self._records.by_param})
        if wrapped is not None:
            raise RuntimeError(
                f"expected a model whose gradients nobody else reduces, got parameters of {wrapped} in "
                f"DistributedDataParallel; pass reduce_grads=False to the optimizer, or the bare model to the loop"
            )
        self._is_checked = True

    def _begin_backward(self) -> None:
        """Called before each gradient. The first one ends a backward that was broken off."""
        self._end.begin()

    def after_gradient(self, param: Tensor) -> None:
        """See GradientListener."""
        _, record = self._records.by_param[param]
        if record.has_sparse_grad:
            record.param.grad = None
            raise sparse_error(record.param, self._name_of(record.number))
        record.after_arrival()
        if self._end.is_unseen:
            record.publish()

    def missed_gradient(self, param: Tensor) -> None:
        """Take a gradient that came without the hook before it: `.grad` is this rank's sum, as if assigned."""
        grads, record = self._records.by_param[param]
        arrived = record.set_aside()
        try:
            self.before_gradient(param)
        finally:
            record.take_unannounced(arrived)
        self._records.observe(grads, record)

    def without_gradient(self, param: Tensor) -> None:
        """Called if the backward reaches the parameter without a gradient."""
        self._begin_backward()

    def after_unfrozen(self) -> None:
        """See GradientListener."""
        self._end.begin()

    def _end_of_backward(self) -> None:
        self._end.forget()
        if self._sync:  # ranks may run backward unequally often in no_sync()
            self._join_unfrozen()
        for grads, record in self._records.by_param.values():
            if record.is_in_backward:
                self._records.observe(grads, record)
                record.is_in_backward = False
            record.publish()

    def _join_unfrozen(self) -> None:
        """Place parameters that are no longer frozen. Their gradients in `.grad` count as unsent."""
        place_unfrozen = self._place_unfrozen and self._place_unfrozen()
        if place_unfrozen and any(param.requires_grad for param in self._frozen):
            place_unfrozen()
            self._records.observe_all()

    @property
    def _is_unfinished(self) -> bool:
        """Whether a backward runs, or was broken off and has not been finished."""
        return self._end.is_awaited

    def finish_broken_round(self) -> None:
        """See Gradients. Finishes the records only, because nothing is sent in a backward."""
        self._end.forget()
        for record in self._records.by_number:
            record.finish_arrival()
            record.is_in_backward = False

    # ---- between backwards -----------------------------------------------------------------------------------------

    def begin_edit(self) -> None:
        """Called before reduced gradients are edited. Complete the shards, and forget earlier norms."""
        if self._is_unfinished and torch._C._current_graph_task_id() == -1:  # no backward runs: one was broken off
            self.finish_broken_round()
        self._exchange.receive_all()
        self._records.param_norms = None

    def _take_grad_scaler_factor(self) -> None:
        """Multiply reduced gradients by the factor that GradScaler's unscale_ has applied to its proxy."""
        factor = self._grad_scaler_proxy.take_factor()
        if factor is not None:
            self.begin_edit()
            self._factors.unscale(factor)

    def make_due_round(self) -> None:
        """Follow what the caller has done to gradients, and make the round if the read of them needs one."""
        self._take_grad_scaler_factor()
        self.finish_broken_round()
        self._rounds.note_read()
        self._records.observe_all()
        if self._rounds.is_due:
            self.make_round()

    def send_zeros(self) -> None:
        """Make the due round with zeros, and do not look at gradients. A later round sends them."""
        self._rounds.note_read()
        if self._rounds.is_due:
            self.make_round(sends_zeros=True)

    def make_round(self, left_out: Callable[[ParamGrad], bool] = nothing, sends_zeros: bool = False) -> None:
        """See Rounds.finish."""
        self._end.forget()
        self._rounds.finish(left_out, sends_zeros)

    def check_active(self) -> None:
        """Raise RuntimeError if another optimizer reduces these gradients now."""

    def unsent(self) -> Unsent:
        """See Gradients."""
        if self._unsent_scale.inv_scale is None:
            return Unsent.NONE
        self._records.observe_all()
        return self._unsent_scale.kind()

    def after_step(self, used: Sequence[bool]) -> None:
        """See Gradients."""
        self._rounds.after_step()
        self.awaits_step = False

    def reset(self) -> None:
        """See Gradients."""
        self._records.observe_all()
        self._exchange.receive_all()
