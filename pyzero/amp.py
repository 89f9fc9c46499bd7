"""torch.amp.GradScaler over gradients that are reduced, sharded and freed, which it therefore cannot see."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_READER = "_unscale_grads_"  # GradScaler's method, and its subclasses', that reads param_groups for the gradients


def grad_scaler_is_asking() -> bool:
    """Whether the code that called the caller is GradScaler, looking for gradients to check and unscale."""
    return sys._getframe(2).f_code.co_name == _READER


class StandIn:
    """One parameter whose gradient is 1, or inf where any rank's gradients overflowed.

    GradScaler multiplies it by what it would multiply all gradients by, and checks it in place of all. So its overflow
    flag is the same on every rank, and what the stand-in then holds is what Adam is to multiply by.
    """

    def __init__(self, device: torch.device) -> None:
        self._param = Parameter(torch.zeros((), device=device))

    def groups(self, found_inf: Tensor) -> list[dict[str, Any]]:
        """Parameter groups for GradScaler to read; found_inf: (1,) fp32."""
        grad = torch.ones_like(self._param)
        self._param.grad = grad.masked_fill_(found_inf.reshape(()) != 0, math.inf)
        return [{"params": [self._param]}]

    @property
    def factor(self) -> Tensor | None:
        """0-D: what GradScaler has multiplied by since `groups()`; None where it has not asked."""
        return self._param.grad

    def clear(self) -> None:
        """The step is over."""
        self._param.grad = None


def outer_factor(stand_in: StandIn, grad_scale: Tensor | None) -> Tensor | None:
    """0-D: what is left to do of GradScaler's unscaling, or None.

    Args:
        stand_in: Holds what it did in `unscale_`.
        grad_scale: What it set on the optimizer for this step: the scale, where it did not unscale.
    """
    factor = stand_in.factor
    if grad_scale is None:
        return factor
    inverse = grad_scale.double().reciprocal().to(torch.float32).reshape(())
    return inverse if factor is None else factor * inverse
