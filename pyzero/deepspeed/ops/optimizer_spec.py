"""The base of FusedAdam, FusedLion and FusedLamb: groups and hyper-parameters from which initialize() builds."""

from __future__ import annotations

from typing import Any, NoReturn

from torch.optim import Optimizer


class OptimizerSpec(Optimizer):
    """Parameter groups for initialize().

    It cannot step, because initialize() still has to convert the model.
    """

    def step(self, closure: Any = None) -> NoReturn:
        """Refuse, because the engine takes the steps.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            f"expected {type(self).__name__} to be passed to initialize(optimizer=...), whose engine takes the steps, "
            f"got step(); without an engine take pyzero.FusedZeroAdam, FusedZeroLion or ZeroLamb"
        )
