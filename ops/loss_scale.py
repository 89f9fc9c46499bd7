"""loss_scale_update_: the loss-scale state machine, one step, on the device."""

from typing import Any

import torch
from torch import Tensor

from pyzero.ops import registry
from pyzero.ops.backend import LossScaleArgs, LossScalePolicy
from pyzero.ops.checks import FLAG_DTYPES, check_dtype, check_flat, check_one, is_vector

_REMEDY = "make it with pyzero.ops.loss_scale.loss_scale_state()"
STATE_SLOTS = ("scale", "growth_tracker", "hysteresis_left", "skipped_steps", "consecutive_skips")


def loss_scale_state(init_scale: float, hysteresis: int, device: torch.device | str, growth_delay: int = 0) -> Tensor:
    """A fresh (5,) fp32 state: scale, growth tracker, hysteresis left, skipped steps, skips in a row."""
    fresh = [init_scale, 0.0 - growth_delay, float(hysteresis), 0.0, 0.0]
    return torch.tensor(fresh, dtype=torch.float32, device=device)


def loss_scale_update_(
    state: Tensor,
    found_inf: Tensor,
    *,
    backend: str = "auto",
    **policy: Any,
) -> None:
    """Advance the loss scale by one step in place, with no host read.

    The rule is torch.amp.GradScaler's: after an overflow the scale is multiplied by `backoff_factor`; after
    `growth_interval` clean steps in a row by `growth_factor`. With `hysteresis` h the first h - 1 overflows since the
    scale last grew (with `consecutive_hysteresis`: since the last clean step) leave it alone.

    Args:
        state: (5,) fp32, which `pyzero.ops.loss_scale.loss_scale_state` makes.
        found_inf: 1-element fp32 tensor; not zero: this step overflowed.
        backend: "auto", "cuda", "cpu", "triton" or "reference".
        **policy: Fields of `ops.backend.LossScalePolicy`, as in `growth_interval=1000`; the defaults are torch's.

    Raises:
        TypeError: A state or flag that is not fp32, or a field that there is not.
        ValueError: Shapes or devices that do not fit.
        BackendUnavailableError: The backend asked for cannot run here.
    """
    device = state.device
    if not is_vector(state, torch.float32, len(STATE_SLOTS), device):
        _refuse(state)
    check_one("found_inf", found_inf, FLAG_DTYPES, device)
    args = LossScaleArgs(state, found_inf, LossScalePolicy(**policy))
    registry.pick("loss_scale_update_", backend, device).loss_scale_update_(args)


def _refuse(state: Tensor) -> None:
    check_dtype("state", state, (torch.float32,), _REMEDY)
    check_flat("state", state)
    raise ValueError(f"expected state to have {len(STATE_SLOTS)} elements, got {state.numel()}; {_REMEDY}")
