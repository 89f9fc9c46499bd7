"""What FusedAdam, FusedLion and FusedLamb share: groups and hyper-parameters, for initialize() to build from."""

from __future__ import annotations

from typing import Any, NoReturn

from torch.optim import Optimizer


class OptimizerSpec(Optimizer):
    """Parameter groups for initialize(). It takes no steps by itself: the model is not converted yet."""

    def step(self, closure: Any = None) -> NoReturn:
        """Refused.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            f"expected {type(self).__name__} to be passed to initialize(optimizer=...), whose engine takes the steps, "
            f"got step(); without an engine take pyzero.FusedZeroAdam, FusedZeroLion or ZeroLamb"
        )
