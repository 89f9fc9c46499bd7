"""The hooks by which an engine changes the gradients of a plain `loss.backward()`; see plain_backward.py."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from pyzero.deepspeed.engine.engine import Engine

_running: list[weakref.ref[Engine]] = []  # engines inside their backward(), which divides the loss; innermost last


class OutputHooks:
    """The hooks on the outputs of one forward. A loss's graph keeps them, so they hold the engine weakly."""

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._optimizer = weakref.ref(engine.optimizer)
        self._is_scaled = engine.is_scaled
        self._accumulation = engine.batches.accumulation
        self._is_stage_3 = engine.zero_optimization_stage() == 3

    @staticmethod
    @contextmanager
    def in_backward_of(engine: Engine) -> Iterator[None]:
        """A context around engine.backward(). Hooks on any engine's outputs do not divide gradients in it."""
        _running.append(weakref.ref(engine))
        try:
            yield
        finally:
            _running.pop()

    def arrived(self, grad: Tensor) -> Tensor | None:
        """Divide a gradient that arrives at an output of the module by the accumulation steps.

        Raises:
            RuntimeError: The gradient lacks this engine's loss scale.
        """
        running = _running_engine()
        if running is not None and running is self._engine():
            return None
        if self._is_scaled and not self._is_scaled_backward() and not self._is_rescaled(running):
            if running is not None:
                raise RuntimeError(
                    "expected gradients that carry this engine's loss scale, got a backward of another engine, which "
                    "has none, or its own, which stage 3 cannot take out; freeze this model before its forward by "
                    "module.requires_grad_(False) where its gradients are not wanted, or enable bf16 in place of fp16"
                )
            raise RuntimeError(
                "expected a loss that carries the loss scale, got a plain loss.backward(), whose fp16 gradients would "
                "underflow; call engine.backward(loss), or engine.scale(loss).backward()"
            )
        return None if running is not None else grad / self._num_steps()

    def undo_division(self, grad: Tensor) -> Tensor:
        """Undo the division of `arrived`."""
        return grad if _running_engine() is not None else grad * self._num_steps()

    def refuse_edited(self) -> None:
        """Check a gradient that bypasses the hooks, because its output is a view that was edited in place.

        Raises:
            RuntimeError: The gradient would have to be divided, or is not scaled.
        """
        running = _running_engine()
        is_own = running is not None and running is self._engine()
        is_scaled_alone = self._is_scaled and self._is_scaled_backward() and self._num_steps() == 1
        is_of_other = running is not None and not self._is_scaled
        if is_own or is_scaled_alone or is_of_other or self._is_rescaled(running):
            return
        raise RuntimeError(
            "expected outputs as the engine gave them, got one that is a view and was edited in place, past which a "
            "plain backward cannot be divided by the accumulation steps; edit another tensor (outputs = outputs / 2), "
            "or call engine.backward(loss)"
        )

    def _num_steps(self) -> int:
        """Return the present number of accumulation steps."""
        engine = self._engine()
        return self._accumulation if engine is None else engine.batches.accumulation

    def _is_scaled_backward(self) -> bool:
        optimizer = self._optimizer()
        return optimizer is not None and optimizer.is_scaled_backward

    def _is_rescaled(self, running: Engine | None) -> bool:
        """Whether another engine's scaled backward runs, and the optimizer replaces that scale by its own."""
        return running is not None and running.is_scaled and not self._is_stage_3


def _running_engine() -> Engine | None:
    return _running[-1]() if _running else None
