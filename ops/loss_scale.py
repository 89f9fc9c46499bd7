"""loss_scale_update_: the loss-scale state machine, one step, on the device."""

import math

import torch
from torch import Tensor

from pyzero.ops import registry
from pyzero.ops.backend import LossScaleArgs, LossScalePolicy
from pyzero.ops.checks import FLAG_DTYPES, check_dtype, check_flat, check_one, is_vector

STATE_SLOTS = ("scale", "growth_tracker", "hysteresis_left", "skipped_steps", "consecutive_skips")


def loss_scale_state(init_scale: float, hysteresis: int, device: torch.device | str, growth_delay: int = 0) -> Tensor:
    """A fresh (5,) fp32 state: scale, growth tracker, hysteresis left, skipped steps, skips in a row."""
    fresh = [init_scale, 0.0 - growth_delay, float(hysteresis), 0.0, 0.0]
    return torch.tensor(fresh, dtype=torch.float32, device=device)


def loss_scale_update_(
    state: Tensor,
    found_inf: Tensor,
    *,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
    min_scale: float = 0.0,
    max_scale: float = math.inf,
    hysteresis: int = 1,
    growth_delay: int = 0,
    consecutive_hysteresis: bool = False,
    backend: str = "auto",
) -> None:
    """Advance the loss scale by one step in place, with no host read.

    The rule is torch.amp.GradScaler's: after an overflow the scale is multiplied by `backoff_factor`; after
    `growth_interval` clean steps in a row by `growth_factor`. With `hysteresis` h the first h - 1 overflows since the
    scale last grew (with `consecutive_hysteresis`: since the last clean step) leave it alone.

    Args:
        state: (5,) fp32, see `loss_scale_state`.
        found_inf: 1-element fp32 tensor; not zero: this step overflowed.
        growth_factor: At a growth step.
        backoff_factor: At an overflow.
        growth_interval: Clean steps in a row between growths.
        min_scale: The scale never falls below it.
        max_scale: The scale never grows above it.
        hysteresis: Overflows it takes before the scale falls; 1 as in torch.
        growth_delay: Clean steps more that the first growth after an overflow takes; 0 as in torch, 1 as in DeepSpeed.
        consecutive_hysteresis: A clean step restores the hysteresis.
        backend: "auto", "cuda", "cpu", "triton" or "reference".

    Raises:
        TypeError: A state or flag that is not fp32.
        ValueError: Shapes or devices that do not fit.
        BackendUnavailableError: The backend asked for cannot run here.
    """
    device = state.device
    if not is_vector(state, torch.float32, len(STATE_SLOTS), device):
        _refuse(state)
    check_one("found_inf", found_inf, FLAG_DTYPES, device)
    policy = LossScalePolicy(
        growth_factor,
        backoff_factor,
        growth_interval,
        min_scale,
        max_scale,
        hysteresis,
        growth_delay,
        consecutive_hysteresis,
    )
    registry.pick("loss_scale_update_", backend, device).loss_scale_update_(LossScaleArgs(state, found_inf, policy))


def _refuse(state: Tensor) -> None:
    check_dtype("state", state, (torch.float32,), "make it with loss_scale_state()")
    check_flat("state", state)
    raise ValueError(
        f"expected state to have {len(STATE_SLOTS)} elements, got {state.numel()}; make it with loss_scale_state()"
    )
