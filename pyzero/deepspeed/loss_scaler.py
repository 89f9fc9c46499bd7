"""deepspeed.runtime.fp16.loss_scaler: classes that DeepSpeed's checkpoints name, for torch's add_safe_globals().

Engines use pyzero.LossScale instead; `engine.optimizer.loss_scaler` reports it.
"""

from __future__ import annotations

import weakref

from pyzero.optimizer import ZeroOptimizer


class LossScalerBase:
    """A loss scale as in DeepSpeed's checkpoints. Engines use pyzero.LossScale instead."""

    def __init__(self, cur_scale: float) -> None:
        self.cur_scale = cur_scale
        self.dynamic = False

    @property
    def loss_scale(self) -> float:
        """The loss scale."""
        return self.cur_scale


class LossScaler(LossScalerBase):
    """DeepSpeed's static loss scale."""

    def __init__(self, scale: float = 1) -> None:
        super().__init__(scale)


class DynamicLossScaler(LossScalerBase):
    """DeepSpeed's dynamic loss scale. Here it never changes."""


class OptimizersLossScaler:
    """The present loss scale of an engine's optimizer, which it does not keep alive: `optimizer.loss_scaler`."""

    def __init__(self, optimizer: ZeroOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)

    def _owner(self) -> ZeroOptimizer:
        owner = self._optimizer()
        if owner is None:
            raise ReferenceError("expected the optimizer of this loss scaler, got none: it has ended; keep the engine")
        return owner

    @property
    def cur_scale(self) -> float:
        """The loss scale; 1.0 without one. It cannot be set. Reads the device."""
        return self._owner().loss_scale

    @cur_scale.setter
    def cur_scale(self, value: float) -> None:
        self._owner().loss_scale = value

    @property
    def loss_scale(self) -> float:
        """The same as `cur_scale`."""
        return self.cur_scale

    @property
    def dynamic(self) -> bool:
        """Whether the loss scale changes with overflows."""
        return self._owner().dynamic_loss_scale
