"""Rows of statistics of gradients: one per run of a bucket, or a single one. They are sent to other ranks as they are.

A row is three fp64 numbers: overflow flag, sum of squares, code of the first bad parameter (see nonfinite.py).
The ops set an fp32 flag. It lies in the half of the first number that makes that number not zero.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyzero.ops.step_scalars import STATS_COLUMNS as STATS_COLUMNS

FLAG, SUMSQ, FIRST_BAD = range(STATS_COLUMNS)
_HIGH_HALF = 1 if sys.byteorder == "little" else 0


def clean_rows(num_rows: int, device: torch.device) -> Tensor:
    """Return (num_rows, 3) fp64 without findings. Clone it, because that is one launch for any number of rows."""
    return torch.tensor([[0.0, 0.0, math.inf]] * num_rows, dtype=torch.float64, device=device).view(-1, STATS_COLUMNS)


def flag_of(row: Tensor) -> Tensor:
    """Return the flag of a (3,) row, (1,) fp32: 1 if an op has found an inf or a NaN, else 0."""
    return row.view(torch.float32)[_HIGH_HALF : _HIGH_HALF + 1]


def is_set(flag: Tensor) -> bool:
    """Whether a flag in host memory is set. False on a GPU, because the host would have to wait."""
    return flag.is_cpu and bool(values_of(flag)[0])


def values_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return the values of a tensor in host memory, not copied."""
    return tensor.numpy()


class HostView:
    """`values_of` for repeated calls with one tensor. It keeps the view, because that takes 1.2 us to make."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._values = np.empty(0)

    def of(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        """Return the tensor's values, not copied."""
        if tensor is not self._tensor:
            self._tensor, self._values = tensor, values_of(tensor)
        return self._values


def sumsq_of(row: Tensor) -> Tensor:
    """Return the sum of squares of a (3,) row: (1,) fp64."""
    return row[SUMSQ : SUMSQ + 1]


def first_bad_of(row: Tensor) -> Tensor:
    """Return the code of a (3,) row: (1,) fp64."""
    return row[FIRST_BAD : FIRST_BAD + 1]
