"""The kernel under unscale_ and pack_: a list of chunks, each scaled, rounded, stored and measured."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import Scalar
from .address_table import COLUMNS, AddressTable, Span, Upload, address_tables, cached
from .common import (
    BLOCK,
    ELEMENT_TYPES,
    finish_sumsq,
    launch,
    load_f32,
    load_scalar,
    new_partials,
    round_to,
    store_rounded,
    store_stats,
    update_stats,
    widen,
)


@triton.jit
def _copy_block(
    source, dest, offsets, mask, scale, largest, squares,
    SCALES: tl.constexpr, WRITES: tl.constexpr, CHECK: tl.constexpr, SUMSQ: tl.constexpr,
):  # fmt: skip
    x = load_f32(source + offsets, mask)
    if mask is not None:
        x = tl.where(mask, x, 0.0)  # what lies past the end must not count
    if SCALES:
        x = x * scale
    stored = round_to(x, dest.dtype.element_ty)
    if WRITES:
        store_rounded(dest + offsets, stored, mask)
    return update_stats(largest, squares, widen(stored, dest.dtype.element_ty), CHECK, SUMSQ)


@triton.jit
def scaled_copy_kernel(
    rows,  # int64 (num_programs, COLUMNS): source address, destination address, numel
    scale,
    found_inf,  # fp32 (1,) or None
    partials,  # fp64 (num_programs,) or None
    SOURCE: tl.constexpr, DEST: tl.constexpr,  # element types
    ALIGNED: tl.constexpr,  # all addresses are multiples of 16 bytes
    SCALES: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: dest = round(scale * float(source)), found_inf and the sum of squares over dest.

    Bytes per element: read one source, write one dest (none where not WRITES).
    """
    row = rows + tl.program_id(0).to(tl.int64) * COLUMNS
    source_address = tl.load(row)
    dest_address = tl.load(row + 1)
    numel = tl.load(row + 2)
    source = source_address.to(tl.pointer_type(SOURCE))
    dest = dest_address.to(tl.pointer_type(DEST))
    if ALIGNED:
        source = tl.multiple_of(source, 16)
        dest = tl.multiple_of(dest, 16)
    CHECK: tl.constexpr = found_inf is not None
    SUMSQ: tl.constexpr = partials is not None
    scale = load_scalar(scale, SCALE_IS_TENSOR)
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    squares = tl.zeros((BLOCK,), tl.float64)

    left = numel
    while left >= BLOCK:
        largest, squares = _copy_block(source, dest, offsets, None, scale, largest, squares,
                                       SCALES, WRITES, CHECK, SUMSQ)  # fmt: skip
        source += BLOCK
        dest += BLOCK
        left -= BLOCK
    if left > 0:
        largest, squares = _copy_block(source, dest, offsets, offsets < left, scale, largest, squares,
                                       SCALES, WRITES, CHECK, SUMSQ)  # fmt: skip
    store_stats(largest, squares, found_inf, partials, CHECK, SUMSQ)


@dataclass(frozen=True)
class CopyJob:
    """The spans of one launch family: one source and one destination dtype."""

    source: torch.dtype
    dest: torch.dtype
    spans: Sequence[Span]


Launches = list[tuple[CopyJob, AddressTable]]


def scaled_copy(
    content: Hashable,  # what the jobs depend on
    make_jobs: Callable[[], Sequence[CopyJob]],
    on: Tensor,  # any of the tensors: says the device
    scale: Scalar,
    found_inf: Tensor | None,
    sumsq: Tensor | None,
    *,
    writes: bool,
) -> None:
    """One launch per pair of dtypes and alignment, then one more for the sum of squares."""

    def build(upload: Upload) -> Launches:
        return [
            (job, table)
            for job in make_jobs()
            for table in address_tables(job.spans, job.source.itemsize, job.dest.itemsize, upload)
        ]

    launches = cached(content, build, on.device)
    partials = new_partials(sumsq, sum(table.num_rows for _, table in launches))
    is_tensor = isinstance(scale, Tensor)
    constants: dict[str, Any] = {
        "SCALES": is_tensor or scale != 1.0, "SCALE_IS_TENSOR": is_tensor, "WRITES": writes, "BLOCK": BLOCK,
    }  # fmt: skip
    first = 0
    for job, table in launches:
        own = None if partials is None else partials[first : first + table.num_rows]
        launch(
            scaled_copy_kernel, table.num_rows, on,
            table.rows, scale, found_inf, own,
            SOURCE=ELEMENT_TYPES[job.source], DEST=ELEMENT_TYPES[job.dest], ALIGNED=table.aligned, **constants,
        )  # fmt: skip
        first += table.num_rows
    if sumsq is not None and partials is not None and partials.numel() > 0:
        finish_sumsq(sumsq, partials)
