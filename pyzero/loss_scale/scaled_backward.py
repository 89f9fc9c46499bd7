"""Backward passes whose gradients carry the loss scale."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from pyzero.gradients.interface import Gradients
from pyzero.loss_scale.scaler import Scaler

log = logging.getLogger("pyzero")


class ScaledBackward:
    """Runs backward passes of scaled losses, and lets the Gradients know that what arrives is scaled.

    Args:
        scaler: The loss scale, enabled.
        gradients: Where the gradients arrive.
        has_fp16: Whether there are fp16 weights, whose gradients underflow without a scale.
    """

    def __init__(self, scaler: Scaler, gradients: Gradients, has_fp16: bool) -> None:
        self._scaler = scaler
        self._gradients = gradients
        self._running: AbstractContextManager[None] | None = None
        self._is_held = False  # in scaled_gradients(): what arrives is scaled until that ends
        self._has_run = False  # since the last step
        self._may_warn = has_fp16

    @property
    def is_running(self) -> bool:
        """Whether gradients that arrive now carry the scale."""
        return self._running is not None

    def run(self, loss: Tensor, **kwargs: Any) -> None:
        """Backward of the scaled loss."""
        self._begin()
        try:
            self._scaler.scale_loss(loss).backward(**kwargs)
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
        self._begin()
        # Twice, to come after callbacks that this backward queues: fully_shard reduces its last gradients in one.
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self.end))

    def _begin(self) -> None:
        if self._is_held:
            return
        self.end()  # of one that an exception has ended
        running = self._gradients.scaled_by(self._scaler.inv_scale, self._scaler.epoch)
        running.__enter__()  # raises where `.grad` carries another scale
        self._running, self._has_run = running, True

    def end(self) -> None:
        """Gradients that arrive from now on carry no scale."""
        if self._is_held:
            return
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
