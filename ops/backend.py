"""The contract between ops and backends: an immutable tuple of arguments per op, as in csrc/args.h, and a protocol.

An op checks the arguments, and a backend trusts them. `rows` are the same tensors as plain numbers, for backends that
launch by address; see `pyzero.ops.rows`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

Scalar: TypeAlias = float | Tensor  # a number, or a 0-D fp32 tensor on the tensors' device

SEGMENT_GRANULE = 64  # elements that share one entry of segment_ids; kSegmentGranule in csrc/args.h
MAX_PARAM_OUTS = 16  # per call; kMaxParamOuts in csrc/args.h


class AdamHyper(NamedTuple):
    """Hyper-parameters that stay the same from step to step, in the order of AdamHyper in csrc/math/adam.h."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    maximize: bool


class AdamArgs(NamedTuple):
    """Arguments of adam_."""

    master: Tensor  # (numel,) fp32
    exp_avg: Tensor  # (numel,) fp32
    exp_avg_sq: Tensor  # (numel,) fp32
    param_outs: Sequence[Tensor]  # (numel,) each, of one dtype: fp32, bf16 or fp16; up to MAX_PARAM_OUTS
    grads: Sequence[Tensor]  # contiguous, of one dtype, fp32, bf16 or fp16; what none of them covers is left alone
    offsets: Sequence[int]  # element of the shard at which each begins, a multiple of SEGMENT_GRANULE
    rows: bytes  # of all of the above, in this order; none for the fp64 oracle
    hyper: AdamHyper
    lr: Scalar
    step: Scalar  # counts from 1; (num_segments,) with segment_ids
    grad_scale: Scalar
    found_inf: Tensor | None  # (1,) fp32; not zero: nothing is written
    segment_ids: Tensor | None  # (ceil(numel / SEGMENT_GRANULE),) int32
    active: Tensor | None  # (num_segments,) fp32; zero: that segment is left alone


class LionHyper(NamedTuple):
    """Hyper-parameters that stay the same from step to step, in the order of LionHyper in csrc/math/lion.h."""

    beta1: float
    beta2: float
    weight_decay: float
    maximize: bool


class LionArgs(NamedTuple):
    """Arguments of lion_."""

    master: Tensor  # (numel,) fp32
    exp_avg: Tensor  # (numel,) fp32
    param_outs: Sequence[Tensor]  # (numel,) each, of one dtype: fp32, bf16 or fp16; up to MAX_PARAM_OUTS
    grads: Sequence[Tensor]  # contiguous, of one dtype, fp32, bf16 or fp16; what none of them covers is left alone
    offsets: Sequence[int]  # element of the shard at which each begins, a multiple of SEGMENT_GRANULE
    rows: bytes  # of all of the above, in this order; none for the fp64 oracle
    hyper: LionHyper
    lr: Scalar
    grad_scale: Scalar
    found_inf: Tensor | None  # (1,) fp32; not zero: nothing is written
    segment_ids: Tensor | None  # (ceil(numel / SEGMENT_GRANULE),) int32
    active: Tensor | None  # (num_segments,) fp32; zero: that segment is left alone


class SgdHyper(NamedTuple):
    """Hyper-parameters that stay the same from step to step, in the order of SgdHyper in csrc/math/sgd.h."""

    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool


class SgdArgs(NamedTuple):
    """Arguments of sgd_."""

    master: Tensor  # (numel,) fp32
    momentum_buffer: Tensor | None  # (numel,) fp32; None: the momentum is 0
    param_outs: Sequence[Tensor]  # (numel,) each, of one dtype: fp32, bf16 or fp16; up to MAX_PARAM_OUTS
    grads: Sequence[Tensor]  # contiguous, of one dtype, fp32, bf16 or fp16; what none of them covers is left alone
    offsets: Sequence[int]  # element of the shard at which each begins, a multiple of SEGMENT_GRANULE
    rows: bytes  # of all tensors above that are not None, in this order; empty for the fp64 oracle
    hyper: SgdHyper
    lr: Scalar
    step: Scalar | None  # as in AdamArgs, if there is dampening; at step 1 the gradient is not dampened
    grad_scale: Scalar
    found_inf: Tensor | None  # (1,) fp32; not zero: nothing is written
    segment_ids: Tensor | None  # (ceil(numel / SEGMENT_GRANULE),) int32
    active: Tensor | None  # (num_segments,) fp32; zero: that segment is left alone


class UnscaleArgs(NamedTuple):
    """Arguments of unscale_."""

    tensors: Sequence[Tensor]  # contiguous fp32, bf16 or fp16, mixed
    rows: bytes  # of the tensors
    inv_scale: Scalar  # the number 1.0: only read
    found_inf: Tensor | None  # (1,) fp32, set to 1 and never cleared
    sumsq: Tensor | None  # (1,) fp32 or fp64, added to


class PackArgs(NamedTuple):
    """Arguments of pack_."""

    bucket: Tensor  # (bucket_numel,) fp32, bf16 or fp16; the gaps between tensors stay as they are
    tensors: Sequence[Tensor]  # contiguous fp32, bf16 or fp16, mixed
    rows: bytes  # of the bucket and the tensors
    offsets: Sequence[int]  # element of the bucket at which each tensor starts
    scale: Scalar


class ReduceScatterArgs(NamedTuple):
    """Arguments of reduce_scatter_."""

    shard: Tensor  # (numel,) fp32
    slices: Sequence[Tensor]  # one (numel,) per rank, one dtype: fp32, bf16 or fp16
    rows: bytes  # of the shard and the slices
    scale: Scalar
    accumulate: bool
    found_inf: Tensor | None  # (1,) fp32, set to 1 and never cleared
    sumsq: Tensor | None  # (1,) fp32 or fp64, added to


class LossScalePolicy(NamedTuple):
    """When the scale grows and when it backs off, in the order of LossScalePolicy in csrc/math/loss_scale.h."""

    growth_factor: float = 2.0  # factor for the scale after `growth_interval` clean steps in a row
    backoff_factor: float = 0.5  # factor for the scale after an overflow
    growth_interval: int = 2000  # steps
    min_scale: float = 0.0  # the scale never falls below it
    max_scale: float = math.inf  # the scale never grows above it
    hysteresis: int = 1  # overflows before the scale falls, counted since the scale last grew
    growth_delay: int = 0  # additional clean steps before the first growth after an overflow; DeepSpeed has 1
    consecutive_hysteresis: bool = False  # count overflows since the last clean step instead


class LossScaleArgs(NamedTuple):
    """Arguments of loss_scale_update_."""

    state: Tensor  # (5,) fp32
    found_inf: Tensor  # (1,) fp32
    policy: LossScalePolicy


class StepScalarsArgs(NamedTuple):
    """Arguments of step_scalars_."""

    out: Tensor  # (4,) fp32: found_inf, norm, clip coefficient, grad_scale
    stats: Tensor  # (n, 3) fp64: flag, sum of squares, not read
    max_norm: float | None
    unscale: Scalar
    factor: Scalar
    steps: Tensor  # (num_params,) fp32
    used: Tensor  # (num_params,) fp32, added to the steps unless a flag is set


class Backend(Protocol):
    """A module or an object with these functions. It may lack some: then "auto" picks another backend for them."""

    def adam_(self, args: AdamArgs, /) -> None:
        """See `pyzero.ops.adam_`."""

    def lion_(self, args: LionArgs, /) -> None:
        """See `pyzero.ops.lion_`."""

    def sgd_(self, args: SgdArgs, /) -> None:
        """See `pyzero.ops.sgd_`."""

    def unscale_(self, args: UnscaleArgs, /) -> None:
        """See `pyzero.ops.unscale_`."""

    def pack_(self, args: PackArgs, /) -> None:
        """See `pyzero.ops.pack_`."""

    def reduce_scatter_(self, args: ReduceScatterArgs, /) -> None:
        """See `pyzero.ops.reduce_scatter_`."""

    def loss_scale_update_(self, args: LossScaleArgs, /) -> None:
        """See `pyzero.ops.loss_scale_update_`."""

    def step_scalars_(self, args: StepScalarsArgs, /) -> None:
        """See `pyzero.ops.step_scalars_`."""
