"""Checks of the state that a caller writes: what can be a step count, and what can be a master or a moment."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def check_step(what: str, value: Any) -> None:
    """Raise ValueError unless a step count is one finite number from 0. what: Names it in the message."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # not a number, or a tensor of several
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"expected {what} as a number, from 0, got {value!r:.80}; pass how many steps were applied")


def check_values(what: str, value: Tensor) -> None:
    """Raise ValueError unless a tensor is dense, with real values. what: Names it in the message."""
    if value.is_complex() or value.layout != torch.strided or value.is_meta:
        raise ValueError(
            f"expected {what} as a dense tensor of real values, got one of {value.dtype}, {value.layout}, on "
            f"{value.device}; pass values in {torch.float32}"
        )
