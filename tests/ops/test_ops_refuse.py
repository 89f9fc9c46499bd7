"""Bad input to the ops: refused with got, wanted and remedy, before anything is written."""

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from backends import read_rows_by
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pyzero import ops

Call = Callable[..., None]


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


_SHARED = ones(100)

# What to replace in a good call, the error, and what its message says of what it got and wanted.
LR = {
    "lr-text": ({"lr": "0.1"}, TypeError, "expected lr as a number or a tensor of one element, got '0.1'; pass one"),
    "lr-none": ({"lr": None}, TypeError, "expected lr as a number or a tensor of one element, got None; pass one"),
    "lr-nan": ({"lr": math.nan}, ValueError, "expected lr as a finite number in fp32, got nan; correct it"),
    "lr-1e39": ({"lr": 1e39}, ValueError, r"expected lr as a finite number in fp32, got 1e\+39; correct it"),
    "decay-nan": ({"weight_decay": math.nan}, ValueError, "expected weight_decay >= 0, and finite in fp32, got nan"),
    "decay-text": ({"weight_decay": "0.1"}, TypeError, "expected weight_decay as a number, got '0.1'; pass one"),
    "scale-text": ({"grad_scale": "1"}, TypeError, "expected grad_scale as a number or a tensor of one element, got"),
    "lr-array": ({"lr": np.ones(2)}, TypeError, r"lr as a number or a tensor of one element, got array\(.*; pass one"),
    "lr-huge": ({"lr": 10**400}, ValueError, "expected lr as a finite number in fp32, got inf; correct it"),
    "decay-huge": ({"weight_decay": 10**400}, ValueError, "expected weight_decay >= 0, and finite in fp32, got inf"),
    "maximize-text": ({"maximize": "no"}, TypeError, "expected maximize as True or False, got 'no'; pass one"),
}
GRADS = {
    "master-none": ({"master": None}, TypeError, "expected master as a tensor, got None; pass a torch.Tensor"),
    "master-numpy": ({"master": np.ones(70)}, TypeError, "expected master as a tensor, got a ndarray; pass"),
    "grad-none": ({"grad": None}, TypeError, "expected grad as a tensor or a list of tensors, got None; pass a list"),
    "grad-numpy": ({"grad": np.ones(70)}, TypeError, "grad as a tensor or a list of tensors, got a ndarray; pass"),
    "grad-iterator": (
        {"grad": iter([ones(6)]), "grad_offsets": [0]},
        TypeError,
        "expected grad as a tensor or a list of tensors, got a list_iterator; pass a list",
    ),
    "list-none": ({"grad": [None], "grad_offsets": [0]}, TypeError, r"expected grad\[0\] as a tensor, got None; pass"),
    "offsets-text": ({"grad": [ones(6)], "grad_offsets": ["0"]}, TypeError, "expected offsets as a list of whole num"),
    "offsets-float": ({"grad": [ones(6)], "grad_offsets": [0.0]}, TypeError, "as a list of whole numbers, got .0.0.;"),
    "offsets-number": ({"grad": [ones(6)], "grad_offsets": 0}, TypeError, "as a list of whole numbers, got 0; conv"),
    "outs-none": ({"param_out": [None]}, TypeError, "expected param_out as a tensor, got None; pass"),
    "outs-numpy": ({"param_out": np.ones(70)}, TypeError, "param_out as a tensor or a list of tensors, got a ndarray"),
    "flag-number": ({"found_inf": 0.0}, TypeError, "expected found_inf as a tensor, got a float; pass"),
    "segments-list": ({"segment_ids": [0, 0]}, TypeError, "expected segment_ids as a tensor, got a list; pass"),
}


def segments(*ids: int) -> dict[str, object]:
    """Arguments for two segments."""
    return {"segment_ids": torch.tensor(ids, dtype=torch.int32), "active": ones(2), "step": ones(2)}


IDS = {
    "segments-beyond": (segments(0, 2), ValueError, "segment_ids from 0 to 1, for 2 segments, got 2; correct them"),
    "segments-negative": (segments(-1, 1), ValueError, "segment_ids from 0 to 1, for 2 segments, got -1; correct them"),
}
BETAS = {
    "beta1-1": ({"beta1": 1.0}, ValueError, "expected 0 <= beta1 < 1, got 1.0; correct it"),
    "beta2-1.5": ({"beta2": 1.5}, ValueError, "expected 0 <= beta2 < 1, got 1.5; correct it"),
    "beta2-nan": ({"beta2": math.nan}, ValueError, "expected 0 <= beta2 < 1, got nan; correct it"),
    "beta1-text": ({"beta1": "0.9"}, TypeError, "expected beta1 as a number, got '0.9'; pass one"),
    "beta1-none": ({"beta1": None}, TypeError, "expected beta1 as a number, got None; pass one"),
}
OUTS = {
    "outs-mixed": ({"param_out": [ones(70), ones(70).half()]}, TypeError, r"param_out of one dtype, got \[.*; convert"),
    "outs-many": ({"param_out": [ones(70)] * 17}, ValueError, "up to 16 tensors as param_out, got 17; copy"),
    "outs-overlap": (
        {"param_out": [_SHARED[:70], _SHARED[30:]]},
        ValueError,
        r"expected param_out\[0\] and param_out\[1\] not to overlap, got memory that they share; pass",
    ),
}
ADAM = {
    **LR,
    **BETAS,
    **GRADS,
    **IDS,
    "segments-beyond-step": (
        {"segment_ids": torch.tensor([0, 7], dtype=torch.int32), "step": ones(2)},
        ValueError,
        "segment_ids from 0 to 1, for 2 segments, got 7; correct them",
    ),
    "segments-none": (
        {"segment_ids": torch.zeros(2).int(), "step": ones(0)},
        ValueError,
        "expected a step count or a flag of each segment, got none; pass one",
    ),
    "step-huge": ({"step": 10**400}, ValueError, r"expected step to count from 1, got inf; pass fewer than 2\*\*31"),
    "decoupled-text": ({"decoupled_weight_decay": "x"}, TypeError, "decoupled_weight_decay as True or False, got 'x'"),
    "eps": ({"eps": -1e-8}, ValueError, "expected eps >= 0, and finite in fp32, got -1e-08; correct it"),
    "step-nan": ({"step": math.nan}, ValueError, "expected step to count from 1, got nan; add 1"),
    "step-inf": ({"step": math.inf}, ValueError, r"expected step to count from 1, got inf; pass fewer than 2\*\*31"),
    "master-bf16": (
        {"master": ones(70).bfloat16()},
        TypeError,
        "expected master in float32, got bfloat16; pass",
    ),
    "moment-fp64": (
        {"exp_avg": ones(70).double()},
        TypeError,
        "expected exp_avg in float32, got float64; pass",
    ),
    "grad-int": (
        {"grad": ones(70).int()},
        TypeError,
        "expected grad in float32 or bfloat16 or float16, got int32",
    ),
    "out-fp64": ({"param_out": ones(70).double()}, TypeError, "expected param_out in .*, got float64; convert"),
    **OUTS,
    "numel": ({"grad": ones(69)}, ValueError, "expected grad to have 70 elements.*got 69; pass slices"),
    "2-d": (
        {"exp_avg_sq": ones(7, 10)},
        ValueError,
        r"exp_avg_sq to be a contiguous 1-D.*got shape \(7, 10\)",
    ),
    "strided": (
        {"grad": ones(140)[::2]},
        ValueError,
        r"grad to be a contiguous.*strides \(2,\); pass grad.view",
    ),
    "device": ({"grad": ones(70, device="meta")}, ValueError, "expected grad on cpu, got meta; move it"),
    "overlap": (
        {"exp_avg": _SHARED[:70], "exp_avg_sq": _SHARED[30:]},
        ValueError,
        "expected exp_avg and exp_avg_sq not to overlap, got memory that they share; pass",
    ),
    "out-is-grad": ({"grad": _SHARED[:70], "param_out": _SHARED[:70]}, ValueError, "grad and param_out not to overlap"),
    "offsets-none": ({"grad": [ones(6)]}, ValueError, "grad_offsets with a list of gradients, got none; pass"),
    "offsets-alone": ({"grad_offsets": [0]}, ValueError, "list of gradients with grad_offsets, got a tensor; pass"),
    "offsets-odd": ({"grad": [ones(6)], "grad_offsets": [32]}, ValueError, r"multiples of 64, got \[32\]; lay"),
    "offsets-few": ({"grad": [ones(6)], "grad_offsets": []}, ValueError, "expected 1 offsets, .*got 0; pass one"),
    "list-too-long": ({"grad": [ones(7)], "grad_offsets": [64]}, ValueError, "shard of at least 71 elements, got 70"),
    "list-dtypes": (
        {"grad": [ones(6), ones(6).half()], "grad_offsets": [0, 64]},
        TypeError,
        "gradients of one dtype, got .*float16.*float32.*; convert",
    ),
    "list-int": ({"grad": [ones(6).int()], "grad_offsets": [0]}, TypeError, r"grad\[0\] in .*got int32; convert"),
    "list-overlap": (
        {"grad": [_SHARED[60:66]], "grad_offsets": [0], "param_out": _SHARED[:70]},
        ValueError,
        r"param_out and grad\[0\] not to overlap",
    ),
    "list-unaligned": (
        {"grad": [ones(6)], "grad_offsets": [0], "master": ones(71)[1:]},
        ValueError,
        "multiple of 16 bytes with segment_ids or a list of gradients, got one",
    ),
    "step-0": ({"step": 0}, ValueError, "expected step to count from 1, got 0.0; add 1"),
    "flag-dtype": ({"found_inf": ones(1).int()}, TypeError, "expected found_inf in float32, got int32; make it"),
    "flag-numel": ({"found_inf": ones(2)}, ValueError, r"expected found_inf to have 1 element, got shape \(2,\); make"),
    "flag-device": ({"found_inf": ones(1, device="meta")}, ValueError, "expected found_inf on cpu, got meta; move"),
    "lr-shape": ({"lr": ones(2)}, ValueError, r"expected lr as a number or a tensor of one element, got shape \(2,\)"),
    "lr-device": ({"lr": torch.ones((), device="meta")}, ValueError, "expected lr on cpu, got meta; move"),
    "step-device": ({"step": torch.ones((), device="meta")}, ValueError, "expected step on cpu, got meta; move"),
    "active-alone": ({"active": ones(1)}, ValueError, "expected segment_ids with active, got none; pass both"),
    "segments-short": (
        {"segment_ids": ones(1).int(), "step": ones(1)},
        ValueError,
        "one entry per 64 elements, 2, got 1; slice",
    ),
    "segments-dtype": ({"segment_ids": ones(2), "step": ones(1)}, TypeError, "segment_ids in int32, got float32; conv"),
    "segments-step": (
        {"segment_ids": ones(2).int()},
        TypeError,
        r"\(num_segments,\) fp32.*got a number; pass",
    ),
    "segments-active": (
        {"segment_ids": ones(2).int(), "step": ones(2), "active": ones(3)},
        ValueError,
        "expected active to have 2 elements.*got 3",
    ),
    "segments-unaligned": (
        {"grad": ones(71)[1:], "segment_ids": torch.zeros(2).int(), "step": ones(1)},
        ValueError,
        "multiple of 16 bytes.*got one that does not; start each shard",
    ),
    "backend": ({"backend": "cpuu"}, ValueError, "expected backend as one of auto, .*got 'cpuu'; pass 'auto'"),
}
LION = {
    **LR,
    **BETAS,
    **GRADS,
    **{case: ({k: v for k, v in change.items() if k != "step"}, *rest) for case, (change, *rest) in IDS.items()},
    "master-bf16": ({"master": ones(70).bfloat16()}, TypeError, "expected master in float32, got bfloat16; pass"),
    "moment-fp64": ({"exp_avg": ones(70).double()}, TypeError, "expected exp_avg in float32, got float64; pass"),
    "grad-int": ({"grad": ones(70).int()}, TypeError, "expected grad in float32 or bfloat16 or float16, got int32"),
    **OUTS,
    "numel": ({"grad": ones(69)}, ValueError, "expected grad to have 70 elements.*got 69; pass slices"),
    "strided": ({"param_out": ones(140)[::2]}, ValueError, r"param_out to be a contiguous.*strides \(2,\); pass"),
    "device": ({"grad": ones(70, device="meta")}, ValueError, "expected grad on cpu, got meta; move it"),
    "overlap": ({"exp_avg": _SHARED[:70], "grad": _SHARED[30:]}, ValueError, "exp_avg and grad not to overlap"),
    "flag-numel": ({"found_inf": ones(2)}, ValueError, r"expected found_inf to have 1 element, got shape \(2,\); make"),
    "lr-shape": ({"lr": ones(2)}, ValueError, r"expected lr as a number or a tensor of one element, got shape \(2,\)"),
    "active-alone": ({"active": ones(1)}, ValueError, "expected segment_ids with active, got none; pass both"),
    "segments-short": ({"segment_ids": ones(1).int()}, ValueError, "one entry per 64 elements, 2, got 1; slice"),
    "segments-active": (
        {"segment_ids": ones(2).int(), "active": ones(2).double()},
        TypeError,
        "expected active in float32, got float64; convert",
    ),
    "segments-unaligned": (
        {"grad": ones(71)[1:], "segment_ids": torch.zeros(2).int()},
        ValueError,
        "multiple of 16 bytes.*got one that does not; start each shard",
    ),
}
SGD = {
    **LR,
    **GRADS,
    **IDS,
    "nesterov-text": ({"nesterov": "x"}, TypeError, "expected nesterov as True or False, got 'x'; pass one"),
    "momentum": ({"momentum": -0.1}, ValueError, "expected momentum >= 0, and finite in fp32, got -0.1; correct it"),
    "dampening": (
        {"dampening": math.inf, "step": 1},
        ValueError,
        "expected dampening finite in fp32, got inf; correct",
    ),
    "master-bf16": ({"master": ones(70).bfloat16()}, TypeError, "expected master in float32, got bfloat16; pass"),
    "buffer-fp64": (
        {"momentum_buffer": ones(70).double()},
        TypeError,
        "expected momentum_buffer in float32, got float64; pass",
    ),
    "no-buffer": (
        {"momentum_buffer": None},
        ValueError,
        "expected momentum 0 without momentum_buffer, got 0.9; pass torch.zeros_like",
    ),
    "no-step": ({"dampening": 0.1}, ValueError, "expected step with dampening 0.1, got none; pass the step count"),
    "step-0": ({"step": 0}, ValueError, "expected step to count from 1, got 0.0; add 1"),
    "step-device": ({"step": torch.ones((), device="meta")}, ValueError, "expected step on cpu, got meta; move"),
    "grad-int": ({"grad": ones(70).int()}, TypeError, "expected grad in float32 or bfloat16 or float16, got int32"),
    **OUTS,
    "numel": ({"grad": ones(69)}, ValueError, "expected grad to have 70 elements.*got 69; pass slices"),
    "strided": ({"param_out": ones(140)[::2]}, ValueError, r"param_out to be a contiguous.*strides \(2,\); pass"),
    "device": ({"grad": ones(70, device="meta")}, ValueError, "expected grad on cpu, got meta; move it"),
    "overlap": (
        {"momentum_buffer": _SHARED[:70], "grad": _SHARED[30:]},
        ValueError,
        "momentum_buffer and grad not to overlap",
    ),
    "out-is-master": (
        {"momentum_buffer": None, "momentum": 0.0, "master": _SHARED[:70], "param_out": _SHARED[:70]},
        ValueError,
        "master and param_out not to overlap",
    ),
    "flag-numel": ({"found_inf": ones(2)}, ValueError, r"expected found_inf to have 1 element, got shape \(2,\); make"),
    "lr-shape": ({"lr": ones(2)}, ValueError, r"expected lr as a number or a tensor of one element, got shape \(2,\)"),
    "active-alone": ({"active": ones(1)}, ValueError, "expected segment_ids with active, got none; pass both"),
    "segments-short": ({"segment_ids": ones(1).int()}, ValueError, "one entry per 64 elements, 2, got 1; slice"),
    "segments-step": (
        {"segment_ids": ones(2).int(), "step": 2},
        TypeError,
        r"\(num_segments,\) fp32.*got a number; pass",
    ),
    "segments-active": (
        {"segment_ids": ones(2).int(), "step": ones(2), "active": ones(3)},
        ValueError,
        "expected active to have 2 elements.*got 3",
    ),
    "segments-unaligned": (
        {"grad": ones(71)[1:], "segment_ids": torch.zeros(2).int()},
        ValueError,
        "multiple of 16 bytes.*got one that does not; start each shard",
    ),
}
UNSCALE = {
    "none": ({"tensors": None}, TypeError, "expected tensors as a list of tensors, got None; pass a list"),
    "iterator": ({"tensors": iter([ones(3)])}, TypeError, "as a list of tensors, got a list_iterator; pass a list"),
    "dict": ({"tensors": {"a": ones(3)}}, TypeError, "as a list of tensors, got a dict; pass a list"),
    "first-none": ({"tensors": [None]}, TypeError, r"expected tensors\[0\] as a tensor, got None; pass"),
    "later-none": ({"tensors": [ones(3), None]}, TypeError, r"expected tensors\[1\] as a tensor, got None; pass"),
    "numpy": ({"tensors": [np.ones(3)]}, TypeError, r"expected tensors\[0\] as a tensor, got a ndarray; pass"),
    "flag-number": ({"found_inf": False}, TypeError, "expected found_inf as a tensor, got a bool; pass"),
    "flag-is-sumsq": (
        {"found_inf": _SHARED[:1], "sumsq": _SHARED[:1]},
        ValueError,
        "expected found_inf and sumsq not to overlap",
    ),
    "one-tensor": (
        {"tensors": ones(7, 10)},
        TypeError,
        r"expected tensors as a list of tensors, got a tensor of shape \(7, 10\); pass \[tensor\], or its rows",
    ),
    "nothing-by-nobody": (
        {"tensors": [], "backend": "cpuu"},
        ValueError,
        "expected backend as one of auto, .*got 'cpuu'; pass 'auto'",
    ),
    "dtype": ({"tensors": [ones(70), ones(3).double()]}, TypeError, r"tensors\[1\] in .*got float64; convert"),
    "device": ({"tensors": [ones(70), ones(3, device="meta")]}, ValueError, r"tensors\[1\] on cpu, got meta; move"),
    "strided": (
        {"tensors": [ones(70), ones(4, 5).t()]},
        ValueError,
        r"tensors\[1\] to be contiguous.*pass a contig",
    ),
    "twice": ({"tensors": [_SHARED, _SHARED]}, ValueError, r"tensors\[0\] and tensors\[1\] not to overlap"),
    "overlap": (
        {"tensors": [_SHARED[50:], ones(4), _SHARED[:51]]},
        ValueError,
        r"tensors\[2\] and tensors\[0\] not",
    ),
    "flag-dtype": ({"found_inf": ones(1).bool()}, TypeError, "expected found_inf in float32, got bool; make it"),
    "sumsq-dtype": ({"sumsq": ones(1).half()}, TypeError, "expected sumsq in float32 or float64, got float16; make"),
    "sumsq-numel": ({"sumsq": ones(0)}, ValueError, r"expected sumsq to have 1 element, got shape \(0,\); make"),
    "sumsq-device": ({"sumsq": ones(1, device="meta")}, ValueError, "expected sumsq on cpu, got meta; move"),
    "scale-shape": ({"inv_scale": ones(3)}, ValueError, r"expected inv_scale as a number.*got shape \(3,\); pass one"),
    "scale-device": ({"inv_scale": ones(1, device="meta")}, ValueError, "expected inv_scale on cpu, got meta; move"),
}
PACK = {
    "bucket-none": ({"bucket": None}, TypeError, "expected bucket as a tensor, got None; pass"),
    "none": ({"tensors": [None]}, TypeError, r"expected tensors\[0\] as a tensor, got None; pass"),
    "iterator": ({"tensors": iter([ones(3)])}, TypeError, "as a list of tensors, got a list_iterator; pass a list"),
    "offsets-float": ({"offsets": [0.0]}, TypeError, r"expected offsets as a list of whole numbers, got \[0.0\]; conv"),
    "offsets-text": ({"offsets": ["0"]}, TypeError, r"expected offsets as a list of whole numbers, got \['0'\]; conv"),
    "offsets-huge": ({"offsets": [2**63]}, ValueError, "bucket of at least 9223372036854775811 elements, got 70"),
    "one-tensor": ({"tensors": ones(7)}, TypeError, "expected tensors as a list of tensors, got a tensor of shape"),
    "nothing-by-nobody": (
        {"tensors": [], "backend": "cpuu"},
        ValueError,
        "expected backend as one of auto, .*got 'cpuu'; pass 'auto'",
    ),
    "bucket-dtype": ({"bucket": ones(70).double()}, TypeError, "expected bucket in .*, got float64; make the bucket"),
    "bucket-2-d": ({"bucket": ones(7, 10)}, ValueError, r"expected bucket to be a contiguous 1-D.*got shape \(7, 10\)"),
    "dtype": ({"tensors": [ones(3).int()]}, TypeError, r"tensors\[0\] in .*got int32; convert"),
    "device": ({"tensors": [ones(3, device="meta")]}, ValueError, r"tensors\[0\] on cpu, got meta; move"),
    "strided": ({"tensors": [ones(6)[::2]]}, ValueError, r"tensors\[0\] to be contiguous.*pass a contig"),
    "too-small": ({"tensors": [ones(71)]}, ValueError, "bucket of at least 71 elements, got 70; make it larger"),
    "past-the-end": ({"tensors": [ones(3)], "offsets": [68]}, ValueError, "at least 71 elements, got 70; make"),
    "negative": ({"tensors": [ones(3)], "offsets": [-1]}, ValueError, r"got offsets\[0\]=-1 below 0.*sort"),
    "collide": ({"tensors": [ones(3)] * 2, "offsets": [0, 2]}, ValueError, r"got offsets\[1\]=2 below 3.*sort"),
    "descending": ({"tensors": [ones(3)] * 2, "offsets": [9, 2]}, ValueError, r"offsets\[1\]=2 below 12"),
    "count": (
        {"tensors": [ones(3)] * 2, "offsets": [9]},
        ValueError,
        "expected 2 offsets, one per tensor, got 1;",
    ),
    "overlap": (
        {"bucket": _SHARED[:70], "tensors": [_SHARED[60:62]]},
        ValueError,
        r"expected bucket and tensors\[0\] not to overlap",
    ),
    "scale-device": ({"scale": ones(1, device="meta")}, ValueError, "expected scale on cpu, got meta; move"),
}
REDUCE_SCATTER = {
    "shard-none": ({"shard": None}, TypeError, "expected shard as a tensor, got None; pass"),
    "none": ({"slices": [ones(70), None]}, TypeError, r"expected slices\[1\] as a tensor, got None; pass"),
    "accumulate-text": ({"accumulate": "no"}, TypeError, "expected accumulate as True or False, got 'no'; pass one"),
    "one-tensor": ({"slices": ones(2, 70)}, TypeError, "expected slices as a list of tensors, got a tensor of shape"),
    "no-slices": ({"slices": []}, ValueError, r"expected one slice per rank, got none; pass \[bucket\]"),
    "shard-dtype": (
        {"shard": ones(70).bfloat16()},
        TypeError,
        "expected shard in float32, got bfloat16; make",
    ),
    "dtype": ({"slices": [ones(70).double()]}, TypeError, r"expected slices\[0\] in .*, got float64; convert"),
    "mixed": ({"slices": [ones(70), ones(70).half()]}, TypeError, r"slices\[1\] in float32, got float16; send every"),
    "numel": ({"slices": [ones(70), ones(71)]}, ValueError, r"slices\[1\] to have 70 elements.*got 71; pass slices"),
    "strided": ({"slices": [ones(140)[::2]]}, ValueError, r"slices\[0\] to be a contiguous 1-D.*strides \(2,\); pass"),
    "device": ({"slices": [ones(70), ones(70, device="meta")]}, ValueError, r"slices\[1\] on cpu, got meta; move"),
    "overlap": (
        {"shard": _SHARED[:70], "slices": [ones(70), _SHARED[30:]]},
        ValueError,
        r"expected shard and slices\[1\] not to overlap",
    ),
    "sumsq-dtype": ({"sumsq": ones(1).int()}, TypeError, "expected sumsq in float32 or float64, got int32; make"),
    "scale-shape": ({"scale": ones(2)}, ValueError, r"expected scale as a number.*got shape \(2,\); pass one"),
}
LOSS_SCALE = {
    "state-none": ({"state": None}, TypeError, "expected state as a tensor, got None; pass"),
    "flag-none": ({"found_inf": None}, TypeError, "expected found_inf as a tensor, got None; pass"),
    "list": ({"growth_factor": [2.0]}, TypeError, r"expected growth_factor as a number, got \[2.0\]; pass one"),
    "interval-huge": ({"growth_interval": 10**400}, ValueError, "growth_interval as a whole number, got LossScalePol"),
    "backoff": (
        {"backoff_factor": -1.0},
        ValueError,
        r"expected 0 < backoff_factor <= 1, got LossScalePolicy\(.*backoff_factor=-1.0.*; correct that field",
    ),
    "interval-0": ({"growth_interval": 0}, ValueError, "expected growth_interval >= 1, got LossScalePolicy"),
    "interval-2.5": ({"growth_interval": 2.5}, ValueError, "expected growth_interval as a whole number, got LossScal"),
    "bounds": ({"min_scale": 2.0, "max_scale": 1.0}, ValueError, "expected min_scale <= max_scale, got LossScalePoli"),
    "text": ({"growth_factor": "2"}, TypeError, "expected growth_factor as a number, got '2'; pass one"),
    "dtype": (
        {"state": ones(5).double()},
        TypeError,
        "expected state in float32, got float64; make it with pyzero.ops.loss_scale_state",
    ),
    "numel": (
        {"state": ones(4)},
        ValueError,
        "expected state to have 5 elements, got 4; make it with pyzero.ops.loss_scale_state",
    ),
    "flag-dtype": ({"found_inf": ones(1).double()}, TypeError, "expected found_inf in float32, got float64; make it"),
    "flag-device": ({"found_inf": ones(1, device="meta")}, ValueError, "expected found_inf on cpu, got meta; move"),
}

STEP_SCALARS = {
    "stats-none": ({"stats": None}, TypeError, "expected stats as a tensor, got None; pass"),
    "steps-none": ({"steps": None}, TypeError, "expected steps as a tensor, got None; pass"),
    "used-is-steps": ({"used": _SHARED[:5], "steps": _SHARED[:5]}, ValueError, "steps and used not to overlap"),
    "out-in-steps": ({"out": _SHARED[1:5], "steps": _SHARED[:5]}, ValueError, "steps and out not to overlap"),
    "max-norm-text": ({"max_norm": "1"}, TypeError, "expected max_norm as a number or None, got '1'; pass one"),
    "stats-dtype": ({"stats": ones(2, 3)}, TypeError, "expected stats in float64, got float32; make it with dtype="),
    "stats-shape": (
        {"stats": ones(2, 2).double()},
        ValueError,
        r"expected contiguous stats of shape \(n, 3\), got shape",
    ),
    "no-stats": ({"stats": ones(0, 3).double()}, ValueError, r"expected contiguous stats of shape \(n, 3\), got shape"),
    "out-length": ({"out": ones(3)}, ValueError, "expected out to have 4 elements"),
    "used-length": ({"used": ones(3)}, ValueError, "expected used to have 5 elements"),
    "steps-dtype": ({"steps": ones(5).double()}, TypeError, "expected steps in float32, got float64"),
    "steps-device": ({"steps": ones(5, device="meta")}, ValueError, "expected steps on cpu, got meta"),
    "factor-device": ({"factor": torch.ones((), device="meta")}, ValueError, "expected factor on cpu, got meta"),
    "max-norm": ({"max_norm": -1.0}, ValueError, "expected max_norm from 0, got -1.0; pass None not to clip"),
    "max-norm-nan": ({"max_norm": math.nan}, ValueError, "expected max_norm from 0, got nan; pass None not to clip"),
}


def _adam() -> dict[str, object]:
    good = {name: ones(70) for name in ("master", "exp_avg", "exp_avg_sq", "grad", "param_out")}
    return good | {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 1}


def _lion() -> dict[str, object]:
    good = {name: ones(70) for name in ("master", "exp_avg", "grad", "param_out")}
    return good | {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}


def _sgd() -> dict[str, object]:
    good = {name: ones(70) for name in ("master", "momentum_buffer", "grad", "param_out")}
    return good | {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


OPS: dict[
    str, tuple[Call, Callable[[], dict[str, object]], dict[str, tuple[dict[str, object], type[Exception], str]]]
] = {
    "adam_": (ops.adam_, _adam, ADAM),
    "lion_": (ops.lion_, _lion, LION),
    "sgd_": (ops.sgd_, _sgd, SGD),
    "unscale_": (
        ops.unscale_,
        lambda: {"tensors": [ones(70)], "inv_scale": 0.5, "found_inf": torch.zeros(1), "sumsq": torch.zeros(1)},
        UNSCALE,
    ),
    "pack_": (ops.pack_, lambda: {"bucket": ones(70), "tensors": [ones(3)], "scale": 0.5}, PACK),
    "reduce_scatter_": (
        ops.reduce_scatter_,
        lambda: {"shard": ones(70), "slices": [ones(70)], "scale": 0.5},
        REDUCE_SCATTER,
    ),
    "loss_scale_update_": (
        ops.loss_scale_update_,
        lambda: {"state": ones(5), "found_inf": torch.zeros(1)},
        LOSS_SCALE,
    ),
    "step_scalars_": (
        ops.step_scalars_,
        lambda: {"out": ones(4), "stats": torch.zeros(2, 3).double(), "steps": ones(5), "used": ones(5)},
        STEP_SCALARS,
    ),
}


def _tensors(arguments: dict[str, object]) -> list[Tensor]:
    found = []
    for value in arguments.values():
        found += value if isinstance(value, list) else [value]
    return [each for each in found if isinstance(each, Tensor) and each.device.type == "cpu"]


@pytest.mark.parametrize("op", OPS)
def test_the_good_call_is_taken(op: str) -> None:
    """Otherwise the cases below could be refused for another reason."""
    call, good, _ = OPS[op]
    arguments = good()
    before = [tensor.clone() for tensor in _tensors(arguments)]
    call(**arguments)
    assert any(not torch.equal(a, b) for a, b in zip(_tensors(arguments), before, strict=True))


@pytest.mark.parametrize("reader", ("python", "native"))
@pytest.mark.parametrize(("op", "case"), [(op, case) for op in OPS for case in OPS[op][2]])
def test_refuses(op: str, case: str, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read_rows_by(reader, monkeypatch)
    call, good, cases = OPS[op]
    change, error, message = cases[case]
    arguments = good() | change
    before = [tensor.clone() for tensor in _tensors(arguments)]
    with pytest.raises(error, match=message):
        call(**arguments)
    for after, was in zip(_tensors(arguments), before, strict=True):
        assert torch.equal(after, was), "written before it was refused"


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("op", ["adam_", "lion_", "sgd_"])
def test_numbers_are_refused_alike_by_all_backends(op: str, backend: str) -> None:
    call, good, cases = OPS[op]
    for change, error, message in (cases[case] for case in {**LR, **BETAS} if case in cases):
        with pytest.raises(error, match=message):
            call(**good() | change, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_parameters_are_written_as_tensors_are(op: str, backend: str) -> None:
    call, good, _ = OPS[op]
    wanted, arguments = good(), good()
    call(**wanted, backend=backend)
    for name in ("master", "bucket", "shard", "state", "out", "param_out"):
        if name in arguments:
            arguments[name] = torch.nn.Parameter(arguments[name])  # type: ignore[arg-type]
    if "tensors" in arguments:
        arguments["tensors"] = [torch.nn.Parameter(tensor) for tensor in arguments["tensors"]]  # type: ignore[attr-defined]
    call(**arguments, backend=backend)
    for left, right in zip(_tensors(arguments), _tensors(wanted), strict=True):
        assert torch.equal(left, right) and left.grad_fn is None


# Tensors that an op reads or writes by their addresses alone.
ASIDE = {
    "adam_": ("found_inf", "lr", "step", "grad_scale"),
    "lion_": ("found_inf", "lr", "grad_scale"),
    "sgd_": ("found_inf", "lr", "grad_scale"),
    "unscale_": ("found_inf", "sumsq", "inv_scale"),
    "pack_": ("scale",),
    "reduce_scatter_": ("found_inf", "sumsq", "scale"),
    "loss_scale_update_": ("state", "found_inf"),
    "step_scalars_": ("out", "stats", "steps", "used", "unscale", "factor"),
}


def _freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("make", [_freed, lambda tensor: FakeTensorMode().from_tensor(tensor)], ids=["freed", "fake"])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in ASIDE.items() for name in names])
def test_refuses_what_has_no_memory(op: str, name: str, make: Callable[[Tensor], Tensor], backend: str) -> None:
    """Its address is 0: the end of the process, a flag that is not read, or a factor of 0."""
    call, good, _ = OPS[op]
    arguments = good()
    given = arguments.get(name)
    one = torch.ones(()) if name in ("lr", "step", "grad_scale", "inv_scale", "scale", "unscale", "factor") else ones(1)
    before = [tensor.clone() for tensor in _tensors(arguments)]
    without = make(given if isinstance(given, Tensor) else one)
    with pytest.raises(ValueError, match="expected tensors with values in memory, got .* without"):
        call(**arguments | {name: without}, backend=backend)
    for after, was in zip(_tensors(arguments), before, strict=True):
        assert torch.equal(after, was), "written before it was refused"


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_refuses_tensors_of_torch_func(backend: str) -> None:
    def halve(row: Tensor) -> Tensor:
        ops.unscale_([row], 0.5, found_inf=None, backend=backend)
        return row

    values = ones(3, 4)
    with pytest.raises(ValueError, match="one that torch.func or a tracer made"):
        torch.func.vmap(halve)(values)
    assert (values == 1).all()


NUMBERS = {
    "fp32": np.float32,
    "fp16": np.float16,
    "array": np.array,
    "tensor": torch.tensor,
    "decimal": lambda number: Decimal(str(number)),
    "fraction": Fraction,
}


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("op", ["adam_", "lion_", "sgd_"])
def test_numbers_of_other_libraries_are_numbers(op: str, kind: str, backend: str) -> None:
    """They are neither computed with in their own precision, nor changed: an array of one number is."""
    call, good, _ = OPS[op]
    made = {
        name: NUMBERS[kind](good()[name]) for name in ("beta1", "beta2", "weight_decay", "momentum") if name in good()
    }
    got, wanted = good() | made, good() | {name: float(number) for name, number in made.items()}
    for step in (3, torch.tensor(3.0)) if op == "adam_" else (None,):
        call(**got | ({} if step is None else {"step": step}), backend=backend)
        call(**wanted | ({} if step is None else {"step": step}), backend="cpu")
    for left, right in zip(_tensors(got), _tensors(wanted), strict=False):
        assert torch.equal(left, right)
    for name, number in made.items():
        assert float(number) == wanted[name]


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor], ids=["list", "tuple", "array", "tensor"])
def test_offsets_may_be_any_sequence_of_whole_numbers(make: Callable[[list[int]], object], backend: str) -> None:
    bucket, master = torch.zeros(70), torch.zeros(70)
    ops.pack_(bucket, [ones(2), ones(3)], offsets=make([1, 64]), backend=backend)  # type: ignore[arg-type]
    assert bucket.nonzero().ravel().tolist() == [1, 2, 64, 65, 66]
    ops.sgd_(master, None, [ones(2), ones(3)], lr=1.0, grad_offsets=make([0, 64]), backend=backend)  # type: ignore[arg-type]
    assert master.nonzero().ravel().tolist() == [0, 1, 64, 65, 66]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((math.nan, 1, "cpu"), "expected init_scale > 0, and finite in fp32, got nan"),
        ((1e39, 1, "cpu"), "expected init_scale > 0, and finite in fp32, got 1e[+]39"),
        ((2.0, 0, "cpu"), "expected hysteresis >= 1, got hysteresis 0"),
        ((2.0, 1.5, "cpu"), "expected hysteresis as a whole number, got hysteresis 1.5"),
        ((2.0, 1, "cpu", -1), "expected growth_delay >= 0, got hysteresis 1 and growth_delay -1"),
    ],
)
def test_refuses_the_state_of_no_loss_scale(given: tuple[float, int, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.loss_scale_state(*given)


def test_segment_ids_that_were_right_are_read_again_once_they_or_their_segments_change() -> None:
    ids, shard = torch.tensor([0, 1], dtype=torch.int32), [torch.zeros(128) for _ in range(4)]

    def update(num_segments: int) -> None:
        step, hyper = torch.ones(num_segments), {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
        ops.adam_(*shard, lr=0.1, **hyper, step=step, segment_ids=ids, backend="reference")

    update(2)
    with pytest.raises(ValueError, match="segment_ids from 0 to 0, for 1 segments, got 1"):
        update(1)
    ids[0] = 5
    with pytest.raises(ValueError, match="segment_ids from 0 to 1, for 2 segments, got 5"):
        update(2)
    update(6)
