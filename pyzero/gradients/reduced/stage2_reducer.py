"""The reducer of stage 2: reduces gradients in every backward, bucket by bucket while it runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyzero.gradients.grad_stats import Unsent
from pyzero.gradients.reduced.accumulation import ParamGrad
from pyzero.gradients.reduced.arrival_order import ArrivalOrder
from pyzero.gradients.reduced.readiness import Readiness
from pyzero.gradients.reduced.rounds import nothing
from pyzero.gradients.reduced.stage1_reducer import ReducerParts, Stage1Reducer
from pyzero.sharding.buckets import Bucket
from pyzero.sharding.local_param import user_param

_reducing = WeakIdKeyDictionary()  # by parameter: a weak reference to the reducer of its gradient in backward


def take_over(params: Iterable[Tensor]) -> None:
    """Retire the reducers of these parameters in backward, because another optimizer gets the parameters.

    Earlier optimizers may live on in a traceback, a notebook or a cycle, on one rank longer than on another.
    """
    for param in params:
        earlier = _reducing.get(user_param(param))
        if earlier is not None and earlier() is not None:
            earlier().retire()


class Stage2Reducer(Stage1Reducer):
    """Makes a round in every backward, so every rank must run backward equally often between two steps.

    Args:
        overlap: Send a full bucket while backward goes on.
    """

    def __init__(self, parts: ReducerParts, overlap: bool, arrival_order: ArrivalOrder) -> None:
        super().__init__(parts)
        self._overlap = overlap
        self._readiness = Readiness(self._records)
        self._is_sending = False  # a round has begun in a backward
        self._has_unfrozen = False  # when it began, some parameters had been unfrozen: the ranks place them after it
        self._is_retired = False  # another optimizer has taken over
        self._arrival_order = arrival_order

    def add(self, bucket: Bucket) -> None:
        """See Stage1Reducer."""
        super().add(bucket)
        self._readiness.add()
        weak_self = weakref.ref(self)
        for param in bucket.params:
            _reducing[user_param(param)] = weak_self

    def move(self) -> None:
        """See Stage1Reducer."""
        self._readiness.move()

    def retire(self) -> None:
        """Do nothing in backward from now on, and refuse steps: another optimizer has some of these parameters."""
        self.hooks.remove()
        self._end.forget()
        self._is_sending = self.awaits_step = False
        self._is_retired = True

    def check_active(self) -> None:
        """See Stage1Reducer."""
        if self._is_retired:
            raise RuntimeError(
                "expected the optimizer that was built last over its parameters, got an earlier one, whose gradients "
                "that one reduces now; step that one, or build this one anew"
            )

    def unsent(self) -> Unsent:
        """See Gradients."""
        return Unsent.NONE if self._is_retired else super().unsent()

    # ---- a backward ------------------------------------------------------------------------------------------------

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """See Gradients."""
        if self._is_sending and torch._C._current_graph_task_id() == -1:
            self.finish_broken_round()  # of an earlier backward, because this one may break off too
        num_rounds = self._rounds.num_finished
        try:
            yield
        except BaseException:
            is_owed = self._sync and not self._is_retired and self._rounds.num_finished == num_rounds
            if is_owed and not self._is_sending:
                self._begin_round()  # no gradient has come, but the other ranks may send theirs
                for record in self._records.by_number:
                    record.publish()  # so that a clear of it is noticed
            raise

    def _begin_backward(self) -> None:
        if self._is_sending and not self._end.is_awaited:
            self.finish_broken_round()  # the attempt to finish it was broken off too
        super()._begin_backward()
        if self._sync and not self._is_sending:
            self._begin_round()  # the other ranks send theirs even if this backward breaks off

    def _begin_round(self) -> None:
        self._is_sending, self._has_unfrozen = True, any(param.requires_grad for param in self._frozen)

    def after_gradient(self, param: Tensor) -> None:
        """See GradientListener."""
        super().after_gradient(param)
        grads, record = self._records.by_param[param]
        self._arrival_order.note(record.number)
        if not self._sync:
            return
        self._exchange.note_writer_stream()
        if self._readiness.is_deferred(record):
            return
        if grads.bucket.index < self._rounds.next:
            # A weight in two reentrant checkpoints got a gradient after its bucket was sent. It goes with the next
            # round, and from then on the bucket waits for the end of backward.
            self._readiness.note_late(grads)
            return
        self._readiness.note(grads, record)
        while self._overlap and self._readiness.is_full(self._rounds.next):
            self._rounds.send_next(self._readiness.is_deferred)

    def _end_of_backward(self) -> None:
        if self._is_sending:
            self.make_round(self._readiness.is_deferred)
            self._exchange.receive_at_end()
        super()._end_of_backward()

    @property
    def _is_unfinished(self) -> bool:
        return self._is_sending or super()._is_unfinished

    def finish_broken_round(self) -> None:
        """See Gradients. On the other ranks the backward may have gone further, or less far.

        Gradients that were cleared since are still sent, because other ranks may have sent theirs. Then they are
        cleared again.
        """
        super().finish_broken_round()
        if not self._is_sending:
            return
        cleared = [record for record in self._records.by_number if record.is_cleared]
        if cleared:
            cleared = [record for record in self._records.by_number if record.param.grad is None]
        for record in cleared:
            record.restore()
        try:
            self.make_round(self._readiness.is_deferred)
            self._exchange.receive_at_end()  # in the same order with sends on all ranks, because barriers pair up
            if self._has_unfrozen:
                self._join_unfrozen()  # as after the same round on the other ranks
        finally:  # the next attempt restores again what was not sent
            for record in cleared:
                record.param.grad = None

    # ---- between backwards -----------------------------------------------------------------------------------------

    def send_zeros(self) -> None:
        """See Stage1Reducer."""
        if self._is_sending:
            self.make_round(self._readiness.is_deferred, sends_zeros=True)
            self._exchange.receive_at_end()
            if self._has_unfrozen:
                self._join_unfrozen()
        super().send_zeros()

    def make_round(self, left_out: Callable[[ParamGrad], bool] = nothing, sends_zeros: bool = False) -> None:
        """See Stage1Reducer."""
        super().make_round(left_out, sends_zeros)
        self._is_sending = False
        self._readiness.begin_round()

    def after_step(self, used: Sequence[bool]) -> None:
        """See Gradients."""
        super().after_step(used)
        self._readiness.after_step(used)

    def reset(self) -> None:
        """See Gradients. A batch that is left out does not affect the order of buckets."""
        super().reset()
        self._arrival_order.restart()
