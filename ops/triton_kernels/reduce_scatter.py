"""reduce_scatter_: sum the ranks' slices in rank order and fp32, scale, accumulate, flag and square: one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyzero.ops.rounding import ceil_div

from ..backend import ReduceScatterArgs
from ..rows import addresses
from .address_table import pointer_table
from .common import (
    BLOCK,
    ELEMENT_TYPES,
    chunk_numel,
    finish_sumsq,
    is_aligned,
    launch,
    load_f32,
    load_scalar,
    new_partials,
    store_stats,
    update_stats,
)


@triton.jit
def _load_slice(slices, rank, start, offsets, mask, SLICE: tl.constexpr, ALIGNED: tl.constexpr):
    source = tl.load(slices + rank).to(tl.pointer_type(SLICE))
    if ALIGNED:
        source = tl.multiple_of(source, 16)
    return load_f32(source + start + offsets, mask)


@triton.jit
def _reduce_block(
    shard, slices, start, offsets, mask, scale, largest, squares,
    SLICE: tl.constexpr, NUM_RANKS: tl.constexpr, ALIGNED: tl.constexpr, ACCUMULATE: tl.constexpr,
    CHECK: tl.constexpr, SUMSQ: tl.constexpr,
):  # fmt: skip
    total = _load_slice(slices, 0, start, offsets, mask, SLICE, ALIGNED)  # not 0 + x, which turns -0 into +0
    for rank in tl.range(1, NUM_RANKS, loop_unroll_factor=4):
        total += _load_slice(slices, rank, start, offsets, mask, SLICE, ALIGNED)

    value = scale * total
    if ACCUMULATE:
        value = tl.load(shard + start + offsets, mask=mask) + value
    tl.store(shard + start + offsets, value, mask=mask)
    if mask is not None:
        value = tl.where(mask, value, 0.0)  # what lies past the end must not count
    return update_stats(largest, squares, value, CHECK, SUMSQ)


@triton.jit(do_not_specialize=["n", "chunk"])
def reduce_scatter_kernel(
    shard,  # fp32 (n,)
    slices,  # int64 (num_ranks,): addresses of (n,) tensors
    n,
    chunk,  # elements per program, whole blocks
    scale,
    found_inf,  # fp32 (1,) or None
    partials,  # fp64 (num_programs,) or None
    SLICE: tl.constexpr,  # element type
    NUM_RANKS: tl.constexpr,
    ALIGNED: tl.constexpr,  # every slice starts on a multiple of 16 bytes
    ACCUMULATE: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per chunk. Bytes per element: read one of each slice (and 4 to accumulate), write 4."""
    CHECK: tl.constexpr = found_inf is not None
    SUMSQ: tl.constexpr = partials is not None
    scale = load_scalar(scale, SCALE_IS_TENSOR)
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    squares = tl.zeros((BLOCK,), tl.float64)

    start = tl.program_id(0).to(tl.int64) * chunk
    end = tl.minimum(start + chunk, n)
    while start + BLOCK <= end:
        aligned_start = tl.multiple_of(start, BLOCK)
        largest, squares = _reduce_block(shard, slices, aligned_start, offsets, None, scale, largest, squares,
                                         SLICE, NUM_RANKS, ALIGNED, ACCUMULATE, CHECK, SUMSQ)  # fmt: skip
        start += BLOCK
    if start < end:
        largest, squares = _reduce_block(shard, slices, start, offsets, offsets < end - start, scale, largest, squares,
                                         SLICE, NUM_RANKS, ALIGNED, ACCUMULATE, CHECK, SUMSQ)  # fmt: skip
    store_stats(largest, squares, found_inf, partials, CHECK, SUMSQ)


def reduce_scatter_(args: ReduceScatterArgs) -> None:
    """shard = [shard +] scale * sum of the slices."""
    shard, slices, scale = args.shard, args.slices, args.scale
    n = shard.numel()
    if n == 0:
        return
    _, *sources = addresses(args.rows)
    chunk = chunk_numel(n)
    num_programs = ceil_div(n, chunk)
    partials = new_partials(args.sumsq, num_programs)
    is_tensor = isinstance(scale, Tensor)
    launch(
        reduce_scatter_kernel, num_programs, shard,
        shard, pointer_table(tuple(sources), shard.device), n, chunk,
        scale, args.found_inf, partials,
        SLICE=ELEMENT_TYPES[slices[0].dtype], NUM_RANKS=len(slices), ALIGNED=is_aligned(*sources),
        ACCUMULATE=args.accumulate, SCALE_IS_TENSOR=is_tensor, BLOCK=BLOCK,
    )  # fmt: skip
    if args.sumsq is not None and partials is not None:
        finish_sumsq(args.sumsq, partials)
