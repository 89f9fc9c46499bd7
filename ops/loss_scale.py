"""loss_scale_update_: one step of the loss-scale state machine, on the device."""

import functools
import math
import numbers
import struct
from typing import Any

import torch
from torch import Tensor

from pyzero.ops import registry
from pyzero.ops.backend import LossScaleArgs, LossScalePolicy
from pyzero.ops.checks import FLAG_DTYPES, as_number, check_dtype, check_flat, check_one, check_tensor, is_vector

_REMEDY = "make it with pyzero.ops.loss_scale_state(init_scale, hysteresis, device)"
_WHOLE = {"growth_interval": 1, "hysteresis": 1, "growth_delay": 0}  # fields with whole numbers, and their least values
_FLAG = "consecutive_hysteresis"  # all other fields are numbers
STATE_SLOTS = ("scale", "growth_tracker", "hysteresis_left", "skipped_steps", "consecutive_skips")
SCALE, SKIPPED, IN_A_ROW = (STATE_SLOTS.index(n) for n in ("scale", "skipped_steps", "consecutive_skips"))


def loss_scale_state(init_scale: float, hysteresis: int, device: torch.device | str, growth_delay: int = 0) -> Tensor:
    """Make the state of `loss_scale_update_`: scale, growth tracker, hysteresis left, skipped steps, skips in a row.

    Args:
        init_scale: The first loss scale.
        hysteresis: Overflows until the scale shrinks, as passed to `loss_scale_update_`.
        device: The device of the flag `found_inf`.
        growth_delay: As passed to `loss_scale_update_`.

    Returns:
        (5,) fp32.

    Raises:
        TypeError: An argument is not a number.
        ValueError: The scale is not positive and finite in fp32, or another number is out of range.
    """
    init_scale = as_number("init_scale", init_scale)
    if not 0.0 < init_scale <= torch.finfo(torch.float32).max:
        raise ValueError(f"expected init_scale > 0, and finite in fp32, got {init_scale}; correct it")
    wanted = wanted_of_policy(LossScalePolicy(hysteresis=hysteresis, growth_delay=growth_delay))
    if wanted is not None:
        raise ValueError(f"expected {wanted}, got hysteresis {hysteresis} and growth_delay {growth_delay}; correct it")
    fresh = [init_scale, 0.0 - growth_delay, float(hysteresis), 0.0, 0.0]
    return torch.tensor(fresh, dtype=torch.float32, device=device)


def loss_scale_update_(
    state: Tensor,
    found_inf: Tensor,
    *,
    backend: str = "auto",
    **policy: Any,
) -> None:
    """Advance the loss scale by one step in place, without a host read.

    The rule is torch.amp.GradScaler's. An overflow multiplies the scale by `backoff_factor`, and `growth_interval`
    clean steps in a row multiply it by `growth_factor`. With `hysteresis` h, the first h - 1 overflows since the scale
    last grew (with `consecutive_hysteresis`: since the last clean step) do not change it.

    Args:
        state: (5,) fp32, from `pyzero.ops.loss_scale_state`.
        found_inf: 1-element fp32 tensor. If it is not zero, this step overflowed.
        backend: "auto", "cuda", "cpu", "triton" or "reference".
        **policy: Fields of `ops.backend.LossScalePolicy`, as in `growth_interval=1000`; the defaults are torch's.

    Raises:
        TypeError: The state or the flag is not fp32, or a field does not exist or is not a number.
        ValueError: Shapes or devices do not fit, or a field is out of range.
        BackendUnavailableError: The chosen backend cannot run here.
    """
    if not isinstance(state, Tensor) or not is_vector(state, torch.float32, len(STATE_SLOTS), state.device):
        _refuse(state)
    device = state.device
    check_tensor("found_inf", found_inf)
    check_one("found_inf", found_inf, FLAG_DTYPES, device)
    fields = LossScalePolicy(**policy)
    try:
        args = LossScaleArgs(state, found_inf, _checked(fields))
    except TypeError:
        wanted_of_policy(fields)  # says more than that a list has no hash
        raise
    registry.pick("loss_scale_update_", backend, device).loss_scale_update_(args)


@functools.lru_cache(32)  # each optimizer has one or two for all steps
def _checked(policy: LossScalePolicy) -> LossScalePolicy:
    wanted = wanted_of_policy(policy)
    if wanted is not None:
        raise ValueError(f"expected {wanted}, got {policy}; correct that field")
    rounded: dict[str, Any] = {name: _in_fp32(name, value) for name, value in policy._asdict().items() if name != _FLAG}
    return policy._replace(**rounded, consecutive_hysteresis=bool(policy.consecutive_hysteresis))


def _in_fp32(name: str, value: Any) -> float:
    """Return a number as the backends hold it; one too large for fp32 as inf."""
    return float(struct.unpack("f", struct.pack("f", as_number(name, value)))[0])


def wanted_of_policy(policy: LossScalePolicy) -> str | None:
    """Return the condition that a policy does not meet, or None. Raise TypeError if a field is not a number."""
    for name, value in policy._asdict().items():
        if not isinstance(value, numbers.Real):
            raise TypeError(f"expected {name} as a number, got {value!r}; pass one, or leave {name} out")
    holds = {
        "1 <= growth_factor < inf": 1 <= policy.growth_factor < math.inf,
        "0 < backoff_factor <= 1": 0 < policy.backoff_factor <= 1,
        "min_scale >= 0": policy.min_scale >= 0,
        "min_scale <= max_scale": policy.min_scale <= policy.max_scale,
    }
    for name, least in _WHOLE.items():
        value = getattr(policy, name)
        holds[f"{name} >= {least}"] = value >= least
        holds[f"{name} as a whole number"] = as_number(name, value).is_integer()
    return next((condition for condition, is_met in holds.items() if not is_met), None)


def _refuse(state: Tensor) -> None:
    check_dtype("state", state, (torch.float32,), _REMEDY)
    check_flat("state", state)
    raise ValueError(f"expected state to have {len(STATE_SLOTS)} elements, got {state.numel()}; {_REMEDY}")
