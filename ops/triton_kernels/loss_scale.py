"""loss_scale_update_: the loss-scale state machine, one thread's work that stays on the device."""

from __future__ import annotations

import triton
import triton.language as tl

from ..backend import LossScaleArgs
from .common import as_f32, launch


@triton.jit
def loss_scale_kernel(
    state,  # fp32 (5,): scale, growth_tracker, hysteresis_left, skipped_steps, consecutive_skips
    found_inf,  # fp32 (1,)
    growth_factor, backoff_factor, growth_interval, min_scale, max_scale, hysteresis, growth_delay,
    CONSECUTIVE: tl.constexpr,
):  # fmt: skip
    """Shrink after an overflow (once hysteresis is used up), grow after growth_interval steps without one."""
    scale = tl.load(state)
    if tl.load(found_inf) != 0.0:
        left = tl.load(state + 2) - 1.0
        lower = tl.maximum(scale * as_f32(backoff_factor), as_f32(min_scale))
        tl.store(state, tl.where(left <= 0.0, lower, scale))
        tl.store(state + 1, 0.0 - as_f32(growth_delay))
        tl.store(state + 2, left)
        tl.store(state + 3, tl.load(state + 3) + 1.0)
        tl.store(state + 4, tl.load(state + 4) + 1.0)
    else:
        tracker = tl.load(state + 1) + 1.0
        grows = tracker >= as_f32(growth_interval)
        higher = scale * as_f32(growth_factor)
        finite = tl.abs(higher) < float("inf")
        higher = tl.where(finite, tl.minimum(higher, as_f32(max_scale)), scale)
        tl.store(state, tl.where(grows, higher, scale))
        tl.store(state + 1, tl.where(grows, 0.0, tracker))
        if CONSECUTIVE:
            tl.store(state + 2, as_f32(hysteresis))
        else:
            tl.store(state + 2, tl.where(grows, as_f32(hysteresis), tl.load(state + 2)))
        tl.store(state + 4, 0.0)


def loss_scale_update_(args: LossScaleArgs) -> None:
    """Advance the state by one step, in place."""
    *numbers, consecutive = args.policy
    launch(
        loss_scale_kernel, 1, args.state,
        args.state, args.found_inf, *map(float, numbers), CONSECUTIVE=bool(consecutive), num_warps=1,
    )  # fmt: skip
