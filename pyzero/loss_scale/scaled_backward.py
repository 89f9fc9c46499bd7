"""Runs backward passes with scaled losses, so that the gradients carry the loss scale."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from pyzero.gradients.backward_end import is_inner_backward
from pyzero.gradients.carried_scale import (
    CarriedScale,
    caller_thread,
    forget_scale,
    mark_backward_scaled,
    runs_on_another_thread,
    scale_owners_of_backward,
    scales_of_backward,
)
from pyzero.gradients.interface import Gradients
from pyzero.loss_scale.scaler import Scaler

log = logging.getLogger("pyzero")

_everyone: weakref.WeakSet[ScaledBackward] = weakref.WeakSet()  # of all optimizers, with a loss scale or without
_changes = threading.RLock()  # held while a scaled backward begins or ends. One for all, because hosts end guests


class ScaledBackward:
    """Runs backward passes of scaled losses, and tells the Gradients that arriving gradients are scaled.

    A loss may reach parameters of another optimizer. Their gradients are then rescaled to the other optimizer's loss
    scale, or unscaled if it has none. During such a backward the other optimizer is a guest.

    Args:
        scaler: The loss scale; it may be disabled.
        gradients: The Gradients that receive the gradients.
        warns: Whether to warn of gradients that nobody scaled: on the rank that logs, if there are fp16 weights. Their
            gradients underflow without a scale.
    """

    def __init__(self, scaler: Scaler, gradients: Gradients, warns: bool) -> None:
        self._scaler = scaler
        self._gradients = gradients
        self._running: AbstractContextManager[None] | None = None
        self._is_held = False  # in scaled_gradients(): all gradients are scaled until it ends
        self._has_run = False  # since the last step
        self._is_guest = False  # the backward that runs is another optimizer's
        self._caller: int | None = None  # the thread in run(); None if torch's own runs it
        self._guests: weakref.WeakSet[ScaledBackward] = weakref.WeakSet()  # in this optimizer's backward
        self._may_warn = warns
        gradients.hooks.rescale = weakref.WeakMethod(self._factor_of_other)
        _everyone.add(self)
        everyone = [*_everyone]
        if any(one._scaler.enabled for one in everyone):
            for one in everyone:
                one._gradients.expect_scales()

    @property
    def is_running(self) -> bool:
        """Whether gradients that arrive now carry the scale."""
        return self._running is not None

    def run(self, loss: Tensor, **kwargs: Any) -> None:
        """Run backward of the scaled loss."""
        with _changes:
            self._check_thread()
            is_inside = self.is_running and not self._is_guest and torch._C._current_graph_task_id() != -1
        if is_inside:  # its own backward, which has the same scale
            self._scaler.scale_loss(loss).backward(**kwargs)
            return
        try:
            with _changes:
                self._check_thread()
                self._begin()
                self._caller = caller_thread()
            scaled = self._scaler.scale_loss(loss)
            if scaled.requires_grad:
                scaled.register_hook(lambda grad: _mark(self))
            scaled.backward(**kwargs)
        finally:
            if self._caller == caller_thread():  # it was not refused
                self.end()

    def scale(self, loss: Tensor) -> Tensor:
        """Return the scaled loss. The caller runs its backward, unless it only evaluates."""
        scaled = self._scaler.scale_loss(loss)
        if scaled.requires_grad:
            scaled.register_hook(self._begin_in_backward)
        return scaled

    @contextmanager
    def hold(self) -> Iterator[None]:
        """A context in which all gradients that arrive carry the scale. Inside another one it changes nothing."""
        if self._is_held:
            yield
            return
        self._begin()
        self._is_held = True
        try:
            yield
            self._gradients.check_arrived()
        finally:
            self._is_held = False
            self.end()

    def _begin_in_backward(self, grad: Tensor) -> None:
        if not self._is_held and _is_inner():
            raise RuntimeError(
                "expected optimizer.scale(loss) outside of reentrant checkpoints, got a loss scaled inside one, "
                "or in the backward of an autograd.Function: gradients of what comes before it would be taken for "
                "unscaled; scale what the checkpoint returns, or pass use_reentrant=False"
            )
        if _is_already_scaled():
            raise RuntimeError(
                "expected a loss without a scale in optimizer.backward(loss), got one that optimizer.scale returned: "
                "its gradients would be scaled twice; pass the loss itself"
            )
        _claim(self)
        # Queued twice, to run after callbacks that this backward queues: fully_shard reduces its last gradients in one.
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self.end))

    def _check_thread(self) -> None:
        mine = caller_thread()
        is_other = self._caller is not None and mine is not None and self._caller != mine
        if is_other or runs_on_another_thread(self):
            raise RuntimeError(
                "expected one scaled backward of an optimizer at a time, got a second one on another thread, whose "
                "gradients would get a wrong scale; call optimizer.backward(loss) on both threads: they take turns"
            )

    def end_of(self, running: AbstractContextManager[None] | None) -> None:
        """End the scaled backward if `running` is still its context, because it was broken off before its own end()."""
        with _changes:
            if running is not None and running is self._running:
                self.end()

    def _factor_of_other(self, param: Tensor) -> Tensor | None:
        """Return the factor for an arriving gradient that carries another optimizer's loss scale; None for others.

        Raises:
            RuntimeError: Several optimizers' different scales are in this backward.
        """
        hosts: list[ScaledBackward] = scale_owners_of_backward()
        is_own = self in hosts or any(host._gradients.hooks.has(param) for host in hosts)
        if (not is_own or _is_inner()) and any(not host._has_scale_of(hosts[0]) for host in hosts):
            raise _mixed_scales()
        if not hosts or is_own or not self._gradients.hooks.is_latest(param):
            if self._is_guest:  # an exception has ended the host's backward
                self.end()
            return None
        unscale: Tensor = hosts[0]._scaler.inv_scale
        if not self._scaler.enabled:
            return unscale
        if not self._is_guest:
            self._begin(as_guest=True)
            hosts[-1]._guests.add(self)
        return unscale.to(self._scaler.scale.device) * self._scaler.scale

    def _keep_apart(self) -> None:
        """Check that neither this optimizer's scaled loss nor another's in the backward reaches the other's parameters.

        What reentrant checkpoints hide is checked as its gradients arrive.

        Raises:
            RuntimeError: One does, and their scales differ.
        """
        marks = scales_of_backward()
        mine = [mark for mark in marks if mark.owner() is self]
        for mark in marks:
            other: ScaledBackward | None = mark.owner()
            if other is None or other._has_scale_of(self):
                continue
            if _reaches([mark], self) or _reaches(mine, other):
                raise _mixed_scales()
            self._gradients.hooks.own_backward.runs = other._gradients.hooks.own_backward.runs = False

    def _has_scale_of(self, other: ScaledBackward) -> bool:
        inv_scale = self._scaler.inv_scale
        return self is other or torch.equal(inv_scale, other._scaler.inv_scale.to(inv_scale.device))

    def _begin(self, as_guest: bool = False) -> None:
        if self._is_held:
            return
        self.end()  # if an exception has ended the one before
        running = self._gradients.scaled_by(self._scaler.inv_scale, self._scaler.epoch)
        running.__enter__()  # raises if `.grad` carries another scale
        self._running, self._has_run = running, True
        self._is_guest, self._gradients.hooks.own_backward.runs = as_guest, not as_guest

    def end(self) -> None:
        """End the scaled backward: gradients that arrive from now on carry no scale."""
        guests = [*self._guests]
        self._guests.clear()
        for guest in guests:
            guest.end()
        if self._is_held:
            return
        with _changes:
            forget_scale(self)
            self._caller = None
            self._is_guest = self._gradients.hooks.own_backward.runs = False
            running, self._running = self._running, None
            if running is not None:
                running.__exit__(None, None, None)

    def after_step(self, has_grad_scaler: bool) -> bool:
        """Whether the step's gradients came from here. Warn once if nobody scaled the gradients of fp16 weights."""
        self.end()
        if self._running is not None:  # the caller's scaled_gradients() goes on
            self._gradients.renew_scale(self._scaler.inv_scale, self._scaler.epoch)
        if self._may_warn and not self._has_run and not has_grad_scaler:
            self._may_warn = False
            log.warning(
                "a step on gradients of fp16 weights from a plain backward: what is below 6e-8 in them has become 0; "
                "call optimizer.backward(loss), use torch.amp.GradScaler, or pass loss_scale=None if this is meant"
            )
        has_run, self._has_run = self._has_run, False
        return has_run and not has_grad_scaler


def _reaches(marks: list[CarriedScale], other: ScaledBackward) -> bool:
    """Whether a loss with one of these marks reaches parameters of the other optimizer, or may do so."""
    has = other._gradients.hooks.has
    return any(mark.leaves is None or any(has(leaf) for leaf in mark.leaves) for mark in marks)


def _find_already_scaled() -> bool:
    """Whether all gradients of the running backward carry a loss scale, because `run()` has scaled its loss."""
    return any(mark.is_of_all for mark in scales_of_backward())


def _mixed_scales() -> RuntimeError:
    return RuntimeError(
        "expected one loss scale in a backward that reaches another optimizer's parameters, got scaled losses of "
        "several optimizers, whose scales differ; run each loss's backward by itself"
    )


def _mark_all(one: ScaledBackward) -> None:
    mark_backward_scaled(one, is_of_all=True)
    one._keep_apart()


def _claim_until_end(one: ScaledBackward) -> None:
    """Begin and mark a scaled backward, unless another thread runs one."""
    with _changes:
        one._check_thread()
        one._begin()
        weak, running = weakref.ref(one), one._running

        def ended() -> None:
            alive = weak()
            if alive is not None:
                alive.end_of(running)

        mark_backward_scaled(one, ended)
        one._keep_apart()


# Compiled autograd traces hooks.
_is_inner = torch._disable_dynamo(is_inner_backward)  # type: ignore[attr-defined]
_is_already_scaled = torch._disable_dynamo(_find_already_scaled)  # type: ignore[attr-defined]
_mark = torch._disable_dynamo(_mark_all)  # type: ignore[attr-defined]
_claim = torch._disable_dynamo(_claim_until_end)  # type: ignore[attr-defined]
