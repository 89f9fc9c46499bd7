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


class GradScalerProxy:
    """One parameter, the proxy, whose gradient is 1, or inf where any rank's gradients overflowed.

    GradScaler multiplies it by what it would multiply all gradients by, and checks it in place of all. So its overflow
    flag is the same on every rank, and what the proxy was multiplied by is owed to the gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self._param = Parameter(torch.zeros(2, dtype=torch.float32, device=device))
        self.was_asked = False  # since the last step

    def groups(self, found_inf: Tensor) -> list[dict[str, Any]]:
        """Parameter groups for GradScaler to read; found_inf: (1,) fp32."""
        self.was_asked = True
        flag = torch.ones_like(self._param[:1]).masked_fill_(found_inf != 0, math.inf)
        self._param.grad = torch.cat([flag, torch.ones_like(flag)])  # what is checked, and what stays finite
        return [{"params": [self._param]}]

    def take_factor(self) -> Tensor | None:
        """0-D: what GradScaler has multiplied by since `groups()`, once; None where it has not asked."""
        grad, self._param.grad = self._param.grad, None
        return None if grad is None else grad[1]

    def clear(self) -> None:
        """The step is over, or the gradients are gone."""
        self._param.grad = None
        self.was_asked = False


def inverse_of(grad_scale: Tensor | None) -> Tensor | None:
    """0-D: 1 / the scale that GradScaler set on the optimizer for this step, where it did not unscale; or None."""
    return None if grad_scale is None else grad_scale.double().reciprocal().to(torch.float32).reshape(())
