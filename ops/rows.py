"""Tensors as plain numbers for kernels: address, numel and dtype code of each tensor, in one bytes object.

They are checked when they are read. If torch has DLPack's exchange API, a native module reads them from C
(csrc/tensor_rows.h). Without one, and for tensors that it rejects, Python reads them here.
"""

from array import array
from collections.abc import Sequence
from operator import gt
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by their code: DType in csrc/math/types.h
_BYTES = (4, 2, 2)
_CODES = {dtype: code for code, dtype in enumerate(FLOAT_DTYPES)}

# Rules for a list, besides contiguous, in FLOAT_DTYPES and on one device: RowRule in csrc/tensor_rows.h.
FLAT = 1  # all 1-D, of one numel
APART = 2  # no two share memory
FIRST_APART = 4  # the first shares no memory with the others
ONE_DTYPE = 8  # all but the first are of one dtype
ALIGNED = 16  # all start at a multiple of ALIGNMENT_BYTES
ALIGNMENT_BYTES = 16

_native: Any = None  # the module that reads


def use_reader_of(module: ModuleType) -> None:
    """Use a native module to read tensors from now on, if it can with this torch."""
    global _native
    if module.use_exchange_api(Tensor, torch.nn.Parameter):
        _native = module


def checked_rows(tensors: Sequence[Tensor], num_fp32: int = 0, rules: int = 0) -> bytes | None:
    """Return rows if all tensors keep the rules and the first `num_fp32` are fp32. None: the caller explains."""
    rows = None if _native is None else _native.rows_of(tensors, num_fp32, rules)
    return read_in_python(tensors, num_fp32, rules) if rows is None else rows


def native_rows(tensors: Sequence[Tensor | None], rules: int = 0) -> bytes | None:
    """Return the same, but only from a native module. None also without one, or if a tensor is None or a subclass."""
    return None if _native is None else _native.rows_of(tensors, 0, rules)


def native_shard_rows(
    shard: Sequence[Tensor], num_fp32: int, grads: Sequence[Tensor], offsets: Sequence[int]
) -> bytes | None:
    """Return rows of a shard and of the gradients that lie at `offsets` in it, if they fit an op; else None.

    None also without a native module, and for other sequences than a tuple and two lists.
    """
    usual = type(shard) is tuple and type(grads) is list and type(offsets) is list
    return _native.shard_rows_of(shard, num_fp32, grads, offsets) if usual and _native is not None else None


def read_in_python(tensors: Sequence[Tensor], num_fp32: int, rules: int) -> bytes | None:
    """Return the same without a native module, attribute by attribute: some 400 ns per tensor."""
    if not tensors:
        return b""
    if not all([isinstance(tensor, Tensor) for tensor in tensors]):
        return None
    device = tensors[0].device
    codes = [_CODES.get(tensor.dtype, -1) for tensor in tensors]
    if -1 in codes or any(codes[:num_fp32]) or (rules & ONE_DTYPE and len(set(codes[1:])) > 1):
        return None
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.device != device:
            return None
    counts = [tensor.numel() for tensor in tensors]
    if rules & FLAT and (counts.count(counts[0]) < len(counts) or any([tensor.dim() != 1 for tensor in tensors])):
        return None
    starts = [address_of(tensor) for tensor in tensors]
    if rules & ALIGNED and any([start % ALIGNMENT_BYTES for start in starts]):
        return None
    if rules & (APART | FIRST_APART) and not _are_apart(starts, counts, codes, rules):
        return None
    return _packed(starts, counts, codes)


def address_of(tensor: Tensor) -> int:
    """Return its address. Raise ValueError if it has elements and no memory."""
    try:
        address = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # torch's, for a tensor of torch.func, or one that is traced
        address = 0
    if not address and tensor.numel():
        raise ValueError(
            f"expected tensors with values in memory, got {type(tensor).__name__} without, as a wrapper of another has "
            f"none, one that torch.func or a tracer made, and one whose storage was freed; pass the one in it, or "
            f"compute it anew"
        )
    return address


def rows_of(tensors: Sequence[Tensor]) -> bytes:
    """Return one row per tensor: 3 int64. Checks nothing."""
    codes = [_CODES[tensor.dtype] for tensor in tensors]
    return _packed([tensor.data_ptr() for tensor in tensors], [tensor.numel() for tensor in tensors], codes)


def layouts_of(tensors: list[Tensor]) -> object:
    """Return a value that is equal if each tensor has the same address, shape, strides, dtype and device as before.

    A native module takes some 80 ns per tensor. Without one the value is another, and takes 500 ns.
    """
    layouts = None if _native is None else _native.layouts_of(tensors)
    if layouts is not None:
        return layouts
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in tensors]


def _packed(starts: list[int], counts: list[int], codes: list[int]) -> bytes:
    rows = array("q", starts * 3)
    rows[0::3] = rows[: len(starts)]
    rows[1::3] = array("q", counts)
    rows[2::3] = array("q", codes)
    return rows.tobytes()


def _are_apart(starts: list[int], counts: list[int], codes: list[int], rules: int) -> bool:
    ends = [start + count * _BYTES[code] for start, count, code in zip(starts, counts, codes, strict=True)]
    if rules & FIRST_APART:
        first, last = starts[0], ends[0]
        others = zip(starts[1:], ends[1:], strict=True)
        return not any([start < last and first < end and start < end and first < last for start, end in others])
    if 0 in counts:
        starts = [start for start, count in zip(starts, counts, strict=True) if count]
        ends = [end for end, count in zip(ends, counts, strict=True) if count]
    # Starts and ends may be sorted separately: no two overlap exactly if each end is no larger than the next start.
    later, sooner = sorted(starts)[1:], sorted(ends)
    return not any(map(gt, sooner, later))


def addresses(rows: bytes) -> list[int]:
    """Return the first column: each tensor's address."""
    return memoryview(rows).cast("q")[0::3].tolist()


def numels(rows: bytes) -> list[int]:
    """Return the second column: each tensor's numel."""
    return memoryview(rows).cast("q")[1::3].tolist()


def dtypes(rows: bytes) -> list[torch.dtype]:
    """Return the third column: each tensor's dtype."""
    return [FLOAT_DTYPES[code] for code in memoryview(rows).cast("q")[2::3]]
