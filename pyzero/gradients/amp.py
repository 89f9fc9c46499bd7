"""Support for torch.amp.GradScaler. It cannot see sharded gradients, so one stand-in parameter answers for all.

If each rank has whole gradients of a part of the model, GradScaler unscales these, and one more stand-in says whether
the gradients of any part have overflowed: torch would tell only the part's own ranks, and cannot mix meshes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_READER = "_unscale_grads_"  # the method of GradScaler and its subclasses that reads the gradients of param_groups
_LIGHTNING = "_optimizer_handles_unscaling"  # Lightning's function that reads `_step_supports_amp_scaling`


def grad_scaler_is_asking() -> bool:
    """Whether the caller was called by GradScaler, which looks for gradients to check and unscale."""
    return sys._getframe(2).f_code.co_name == _READER


def lightning_is_asking() -> bool:
    """Whether the caller was called by Lightning, which refuses to clip for optimizers that unscale."""
    return sys._getframe(2).f_code.co_name == _LIGHTNING


def with_flag(grads: Iterable[Tensor | None], found_inf: Tensor) -> list[dict[str, Any]]:
    """Return parameter groups for GradScaler, with these gradients and one that is inf if any rank has overflowed.

    found_inf: (1,) fp32.
    """
    flag = torch.ones_like(found_inf).masked_fill_(found_inf != 0, math.inf)
    params = []
    for grad in (flag, *grads):
        if grad is not None:
            params.append(grad.detach())
            params[-1].grad = grad  # GradScaler writes to it in place
    return [{"params": params}]


class GradScalerProxy:
    """The parameter that GradScaler gets instead of all. Its gradient is 1, or inf if any rank's has overflowed.

    GradScaler unscales and checks it, so the overflow flag is the same on every rank. The optimizer then applies the
    factor of the proxy's gradient to the real gradients: `take_factor()`.
    """

    def __init__(self, device: torch.device) -> None:
        self._param = Parameter(torch.zeros(2, dtype=torch.float32, device=device))
        self.was_asked = False  # since the last step

    def groups(self, found_inf: Tensor) -> list[dict[str, Any]]:
        """Return parameter groups for GradScaler to read. found_inf: (1,) fp32."""
        self.was_asked = True
        flag = torch.ones_like(self._param[:1]).masked_fill_(found_inf != 0, math.inf)
        self._param.grad = torch.cat([flag, torch.ones_like(flag)])  # one to check, and one that stays finite
        return [{"params": [self._param]}]

    def take_factor(self) -> Tensor | None:
        """Return the factor that GradScaler applied since `groups()`, once: 0-D; None if it did not ask."""
        if not self.was_asked:
            return None
        grad, self._param.grad = self._param.grad, None
        return None if grad is None else grad[1]

    def clear(self) -> None:
        """Called after a step, and when gradients are cleared."""
        self._param.grad = None
        self.was_asked = False


def inverse_of(grad_scale: Tensor | None) -> Tensor | None:
    """Return 1 / `grad_scale` (0-D), or None. GradScaler sets `grad_scale` for a step that it did not unscale."""
    return None if grad_scale is None else grad_scale.double().reciprocal().to(torch.float32).reshape(())
