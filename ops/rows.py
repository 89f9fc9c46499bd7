"""Tensors as plain numbers: address, numel and dtype code of each, in one bytes object, for kernels that take those.

A native module reads them from C where torch has DLPack's exchange API (csrc/tensor_rows.h), and checks them on the
way; what it does not like, or where there is none, is looked at in Python, which has the words for it.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by their code: DType in csrc/math/types.h
_CODES = {dtype: code for code, dtype in enumerate(FLOAT_DTYPES)}

# What a list must be beyond contiguous, in FLOAT_DTYPES and on one device: RowRule in csrc/tensor_rows.h.
FLAT = 1  # all 1-D, of one numel
APART = 2  # no two share memory
FIRST_APART = 4  # the first shares none with the others
ONE_DTYPE = 8  # all but the first are of one dtype
ALIGNED = 16  # all start at a multiple of ALIGNMENT_BYTES
ALIGNMENT_BYTES = 16

_read: Callable[[Sequence[Tensor], int, int], bytes | None] | None = None


def read_by(module: ModuleType) -> None:
    """Let a native module read tensors from now on, if it can with this torch."""
    global _read
    if module.use_exchange_api(Tensor, torch.nn.Parameter):
        _read = module.rows_of


def checked_rows(tensors: Sequence[Tensor], num_fp32: int = 0, rules: int = 0) -> bytes | None:
    """Rows where all is as wanted, the first `num_fp32` of them fp32; None where Python must look."""
    return None if _read is None else _read(tensors, num_fp32, rules)


def rows_of(tensors: Iterable[Tensor]) -> bytes:
    """One row per tensor: 3 int64. Nothing is checked."""
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
