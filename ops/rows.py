"""Tensors as plain numbers: address, numel and dtype code of each, in one bytes object, for kernels that take those.

The layout is read by `rows_of` in csrc/bind_common.h.
"""

import struct
from collections.abc import Iterable

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by their code: DType in csrc/math/types.h
_CODES = {dtype: code for code, dtype in enumerate(FLOAT_DTYPES)}


def rows_of(tensors: Iterable[Tensor]) -> bytes:
    """One row per tensor: 3 int64."""
    numbers = [x for tensor in tensors for x in (tensor.data_ptr(), tensor.numel(), _CODES[tensor.dtype])]
    return struct.pack(f"{len(numbers)}q", *numbers)


def addresses(rows: bytes) -> list[int]:
    """The first column."""
    return memoryview(rows).cast("q")[0::3].tolist()


def numels(rows: bytes) -> list[int]:
    """The second column."""
    return memoryview(rows).cast("q")[1::3].tolist()


def dtypes(rows: bytes) -> list[torch.dtype]:
    """The third column."""
    return [FLOAT_DTYPES[code] for code in memoryview(rows).cast("q")[2::3]]
