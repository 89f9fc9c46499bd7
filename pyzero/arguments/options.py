"""The options that all optimizers share, and checks of their values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, get_args

import torch

from pyzero.arguments.hyper_parameters import as_number
from pyzero.ops.env import BACKEND_CHOICES
from pyzero.ops.rows import FLOAT_DTYPES

if TYPE_CHECKING:
    from pyzero.loss_scale.scaler import LossScale


class ZeroOptions(TypedDict, total=False):
    """Keyword arguments of ZeroOptimizer that all rules share."""

    stage: int
    process_group: Any
    model_parallel_group: Any
    max_grad_norm: float | None
    loss_scale: str | float | LossScale | None
    bucket_cap_mb: float | None
    overlap: bool
    grad_reduce_dtype: torch.dtype | None
    reduce_grads: bool
    init_sync: bool
    cpu_offload: bool
    max_consecutive_skips: int | None
    transport: str
    backend: str


_Switch: TypeAlias = Literal["overlap", "reduce_grads", "init_sync", "cpu_offload"]
_SWITCHES: tuple[_Switch, ...] = get_args(_Switch)


def check_options(options: ZeroOptions) -> None:
    """Check the options that have a range, and those that must be True or False.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value has the wrong type.
    """
    stage, backend, grad_reduce_dtype = options["stage"], options["backend"], options["grad_reduce_dtype"]
    max_grad_norm, max_consecutive_skips = options["max_grad_norm"], options["max_consecutive_skips"]
    if isinstance(stage, bool) or stage not in (1, 2):
        remedy = "call torch's fully_shard(model) for stage 3, and pass its parameters" if stage in (3, "3") else ""
        raise ValueError(f"expected stage 1 or 2, got {stage!r}; {remedy or 'pass stage=2'}")
    if backend not in BACKEND_CHOICES:
        raise ValueError(f"expected backend as one of {', '.join(BACKEND_CHOICES)}, got {backend!r}; pass one of these")
    if max_grad_norm is not None and not _number("max_grad_norm", max_grad_norm) > 0:
        raise ValueError(f"expected max_grad_norm above 0, got {max_grad_norm}; pass None not to clip")
    check_bucket_cap(options["bucket_cap_mb"])
    for name in _SWITCHES:
        value = options[name]
        if not isinstance(value, bool) and not (isinstance(value, int) and value in (0, 1)):
            raise TypeError(f"expected {name} as True or False, got {value!r}; pass one of these")
    if grad_reduce_dtype is not None and grad_reduce_dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"expected grad_reduce_dtype as torch.float32, torch.bfloat16 or torch.float16, got {grad_reduce_dtype!r}; "
            f"pass one of these, or None to send gradients in their own dtype"
        )
    if max_consecutive_skips is not None and _number("max_consecutive_skips", max_consecutive_skips) < 1:
        raise ValueError(
            f"expected max_consecutive_skips from 1, got {max_consecutive_skips}; pass None for any number of skips"
        )


def check_bucket_cap(bucket_cap_mb: float | None) -> None:
    """Raise ValueError if bucket_cap_mb is not above 0 and finite, and TypeError if it is no number. None is valid."""
    if bucket_cap_mb is None:
        return
    if not 0 < _number("bucket_cap_mb", bucket_cap_mb) < math.inf:
        raise ValueError(f"expected bucket_cap_mb above 0, got {bucket_cap_mb}; pass None for the default, 25 on CPUs")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool):  # True would be 1.0
        raise TypeError(f"expected {name} as a number or None, got {value}; pass one of these")
    return as_number(name, value)
