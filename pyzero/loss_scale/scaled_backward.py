"""Backward passes whose gradients carry the loss scale."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from pyzero.gradients.backward_end import is_inner_backward
from pyzero.gradients.carried_scale import forget_scale, mark_backward_scaled, scale_owners_of_backward
from pyzero.gradients.interface import Gradients
from pyzero.loss_scale.scaler import Scaler

log = logging.getLogger("pyzero")

_everyone: weakref.WeakSet[ScaledBackward] = weakref.WeakSet()  # of all optimizers, with a loss scale or without


class ScaledBackward:
    """Runs backward passes of scaled losses, and lets the Gradients know that what arrives is scaled.

    A loss may reach parameters of another optimizer. What arrives there is multiplied so that it carries the loss scale
    of that one, or none; while it does, that one is a guest.

    Args:
        scaler: The loss scale, enabled.
        gradients: Where the gradients arrive.
        warns: Whether to warn of gradients that nobody scaled: where there are fp16 weights, whose gradients underflow
            then, on the rank that logs.
    """

    def __init__(self, scaler: Scaler, gradients: Gradients, warns: bool) -> None:
        self._scaler = scaler
        self._gradients = gradients
        self._running: AbstractContextManager[None] | None = None
        self._is_held = False  # in scaled_gradients(): what arrives is scaled until that ends
        self._has_run = False  # since the last step
        self._is_guest = False  # what runs is another's backward
        self._guests: weakref.WeakSet[ScaledBackward] = weakref.WeakSet()  # in this one's
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
        """Backward of the scaled loss."""
        self._begin()
        try:
            scaled = self._scaler.scale_loss(loss)
            if scaled.requires_grad:
                scaled.register_hook(lambda grad: _mark(self))
            scaled.backward(**kwargs)
        finally:
            self.end()

    def scale(self, loss: Tensor) -> Tensor:
        """The scaled loss, of which the caller runs backward, unless it is one of an evaluation."""
        scaled = self._scaler.scale_loss(loss)
        if scaled.requires_grad:
            scaled.register_hook(self._begin_in_backward)
        return scaled

    @contextmanager
    def hold(self) -> Iterator[None]:
        """All gradients that arrive in here carry the scale."""
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
        self._begin()
        _mark_until_end(self)
        # Twice, to come after callbacks that this backward queues: fully_shard reduces its last gradients in one.
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self.end))

    def end_of(self, running: AbstractContextManager[None] | None) -> None:
        """Called where a backward has ended or was broken off: then its own end() has not come."""
        if running is not None and running is self._running:
            self.end()

    def _factor_of_other(self, param: Tensor) -> Tensor | None:
        """What a gradient that arrives is to be multiplied by, where it carries the loss scale of another optimizer.

        Raises:
            RuntimeError: It carries one of several.
        """
        hosts: list[ScaledBackward] = scale_owners_of_backward()
        is_own = self in hosts or any(host._gradients.hooks.has(param) for host in hosts)
        if not hosts or is_own or not self._gradients.hooks.is_latest(param):
            if self._is_guest:  # of a backward that an exception has ended
                self.end()
            return None
        *others, host = hosts
        if any(not torch.equal(other._scaler.inv_scale, host._scaler.inv_scale) for other in others):
            raise RuntimeError(
                "expected one loss scale in a backward that reaches another optimizer's parameters, got scaled losses "
                "of several optimizers, whose scales differ; run each loss's backward by itself"
            )
        unscale: Tensor = host._scaler.inv_scale
        if not self._scaler.enabled:
            return unscale
        if not self._is_guest:
            self._begin(as_guest=True)
            host._guests.add(self)
        return unscale.to(self._scaler.scale.device) * self._scaler.scale

    def _begin(self, as_guest: bool = False) -> None:
        if self._is_held:
            return
        self.end()  # of one that an exception has ended
        running = self._gradients.scaled_by(self._scaler.inv_scale, self._scaler.epoch)
        running.__enter__()  # raises where `.grad` carries another scale
        self._running, self._has_run = running, True
        self._is_guest, self._gradients.hooks.own_backward.runs = as_guest, not as_guest

    def end(self) -> None:
        """Gradients that arrive from now on carry no scale."""
        guests = [*self._guests]
        self._guests.clear()
        for guest in guests:
            guest.end()
        if self._is_held:
            return
        forget_scale(self)
        self._is_guest = self._gradients.hooks.own_backward.runs = False
        running, self._running = self._running, None
        if running is not None:
            running.__exit__(None, None, None)

    def after_step(self, has_grad_scaler: bool) -> bool:
        """Whether the step's gradients came from here. Warn once of one on fp16 gradients that nobody scaled."""
        self.end()
        if self._running is not None:  # a context of the caller's goes on
            self._gradients.renew_scale(self._scaler.inv_scale, self._scaler.epoch)
        if self._may_warn and not self._has_run and not has_grad_scaler:
            self._may_warn = False
            log.warning(
                "a step on gradients of fp16 weights from a plain backward: what is below 6e-8 in them has become 0; "
                "call optimizer.backward(loss), use torch.amp.GradScaler, or pass loss_scale=None if this is meant"
            )
        has_run, self._has_run = self._has_run, False
        return has_run and not has_grad_scaler


def _mark_with_end(one: ScaledBackward) -> None:
    weak, running = weakref.ref(one), one._running

    def ended() -> None:
        alive = weak()
        if alive is not None:
            alive.end_of(running)

    mark_backward_scaled(one, ended)


# Compiled autograd traces hooks.
_is_inner = torch._disable_dynamo(is_inner_backward)  # type: ignore[attr-defined]
_mark = torch._disable_dynamo(mark_backward_scaled)  # type: ignore[attr-defined]
_mark_until_end = torch._disable_dynamo(_mark_with_end)  # type: ignore[attr-defined]
