"""Scalars as the oracles use them: rounded once to the dtype that is computed in."""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor


def round_to(value: float, dtype: torch.dtype) -> float:
    """The python number, rounded to fp32 where that is the dtype computed in."""
    if dtype != torch.float32:
        return value
    return float(struct.unpack("f", struct.pack("f", value))[0])


def scalar(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A number rounded once, or a 0-D tensor in the dtype computed in."""
    return value.to(dtype) if isinstance(value, Tensor) else round_to(value, dtype)


def add_grad_stats(values: Sequence[Tensor], found_inf: Tensor | None, sumsq: Tensor | None) -> None:
    """Set the flag and add the squares of the values as they were stored."""
    for value in values:
        if found_inf is not None:
            found_inf.masked_fill_(~torch.isfinite(value).all(), 1.0)  # else as it was: a 2 stays 2
        if sumsq is not None:
            sumsq.add_(value.double().square().sum().to(sumsq.dtype))
