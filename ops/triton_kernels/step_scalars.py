"""step_scalars_: a step's scalars, and the step counts of all parameters."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyzero.ops.rounding import ceil_div

from ..backend import StepScalarsArgs
from .common import as_f32, launch, load_scalar

_PARAMS = 256  # per program


@triton.jit(do_not_specialize=["num_rows", "num_params"])
def step_scalars_kernel(
    out,  # fp32 (4,): found_inf, norm, clip, grad_scale
    stats,  # fp64 (num_rows, 3): flag, sum of squares, not read
    num_rows, max_norm, unscale, factor,
    steps, used,  # fp32 (num_params,)
    num_params,
    CLIPS: tl.constexpr, UNSCALE_IS_TENSOR: tl.constexpr, FACTOR_IS_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every program reads all rows; the first writes the scalars."""
    found = tl.zeros((), tl.int32)
    sumsq = tl.zeros((), tl.float64)
    row = num_rows * 0
    while row < num_rows:
        found = found | (tl.load(stats + 3 * row) != 0.0).to(tl.int32)
        sumsq += tl.load(stats + 3 * row + 1)
        row += 1

    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = (offsets < num_params) & (found == 0)
    tl.store(steps + offsets, tl.load(steps + offsets, mask=counts) + tl.load(used + offsets, mask=counts), mask=counts)

    if tl.program_id(0) == 0:
        inv_scale = load_scalar(unscale, UNSCALE_IS_TENSOR)
        by = load_scalar(factor, FACTOR_IS_TENSOR)
        norm = (tl.sqrt(sumsq) * inv_scale.to(tl.float64)).to(tl.float32) * tl.abs(by)
        clip = as_f32(1.0)
        if CLIPS:
            ratio = tl.div_rn(as_f32(1.0), norm + as_f32(1e-6)) * as_f32(max_norm)
            clip = tl.where(ratio > 1.0, 1.0, ratio)
        tl.store(out, found.to(tl.float32))
        tl.store(out + 1, norm)
        tl.store(out + 2, clip)
        tl.store(out + 3, clip * by * inv_scale)


def step_scalars_(args: StepScalarsArgs) -> None:
    """Scalars and step counts, in one launch."""
    num_params = args.steps.numel()
    launch(
        step_scalars_kernel, max(1, ceil_div(num_params, _PARAMS)), args.out,
        args.out, args.stats, len(args.stats), args.max_norm or 0.0, args.unscale, args.factor,
        args.steps, args.used, num_params,
        CLIPS=args.max_norm is not None,
        UNSCALE_IS_TENSOR=isinstance(args.unscale, Tensor), FACTOR_IS_TENSOR=isinstance(args.factor, Tensor),
        BLOCK=_PARAMS,
    )  # fmt: skip
