"""`python -m pyzero estimate` and `estimate(model)`: bytes per rank, before anything is built.

They count a rank's parameters, their gradients and FusedZeroAdam with its default transport; CPU ranks are assumed to
share one host. Activations, the allocator's slack and the rest of the process come on top.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from pyzero.arguments.options import check_bucket_cap
from pyzero.comm.make_transport import check_transport
from pyzero.estimate.blocks import equal_blocks_at_most, gathered_at_most, shard_numel
from pyzero.estimate.buckets import FP32, Setup, Shape, of_shapes
from pyzero.estimate.figures import Estimate, table
from pyzero.ops.rounding import ceil_div
from pyzero.optimizers.adam import AdamRule
from pyzero.sharding.layout import GRANULE, cap_bytes
from pyzero.update_rule import UpdateRule

__all__ = ["DTYPES", "Estimate", "estimate", "estimate_numel", "table"]

_MOST_BUCKETS = 100_000  # or blocks, of estimate_numel: they are counted one by one
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def estimate(
    model: nn.Module | Iterable[Tensor],
    *,
    num_ranks: int = 1,
    stage: int = 2,
    bucket_cap_mb: float | None = None,
    reduce_grads: bool = True,
    rule: UpdateRule | None = None,
    cpu_offload: bool = False,
    transport: str = "auto",
    accumulates: bool = False,
) -> Estimate:
    """Estimate the bytes per rank of a model or its parameters with FusedZeroAdam, or with another rule's optimizer.

    Args:
        model: A module or its parameters; the meta device will do. Frozen parameters count only as weights.
        num_ranks: Ranks of the process group.
        stage: 1 to 3. Stage 3 needs a module, and counts it as initialize() shards it: fp32 shards that are their own
            masters. The model's dtypes are those that it computes in.
        bucket_cap_mb: See ZeroOptimizer.
        reduce_grads: See ZeroOptimizer. Not in stage 3.
        rule: The update rule; default: Adam's. Temporary memory of an update is not counted: ZeroLamb needs some 23
            bytes per element of the largest bucket's shard, ZeroMuon 4.
        cpu_offload: See ZeroOptimizer. Counts as for GPUs.
        transport: See ZeroOptimizer. "auto" counts as "peer" on CPUs. Not in stage 3.
        accumulates: Whether ranks sum gradients of several backwards before they reduce them: in stage 1 before step(),
            in stage 2 in no_sync(), as transformers' Trainer does. Not in stage 3.

    Raises:
        ValueError: An argument is out of range, or is none of this stage.
    """
    check_transport(transport)
    params = list(model.parameters() if isinstance(model, nn.Module) else model)
    setup = Setup(
        num_ranks=num_ranks,
        stage=2 if stage == 3 else stage,
        bucket_cap_mb=bucket_cap_mb,
        rule=rule or AdamRule(),
        on_gpu=cpu_offload or any(param.device.type == "cuda" for param in params),
        reduces=reduce_grads,
        cpu_offload=cpu_offload,
        transport=transport,
        accumulates=accumulates,
    )
    if stage != 3 or num_ranks <= 1:  # on one rank stage 3 is 2
        return of_shapes([Shape(param.numel(), param.element_size(), param.requires_grad) for param in params], setup)
    if not isinstance(model, nn.Module):
        raise ValueError("expected a module for stage 3, whose blocks count, got parameters; pass the module")
    _refuse_in_stage_3(reduce_grads=not reduce_grads, transport=transport != "auto", accumulates=accumulates)
    shapes = [Shape(shard_numel(param, num_ranks), FP32, param.requires_grad) for param in params]
    return _with_gathered(
        of_shapes(shapes, replace(setup, num_ranks=1)),
        gathered_at_most(model, num_ranks),
        sum(param.numel() for param in params),
    )


def estimate_numel(
    num_params: int,
    dtype: torch.dtype,
    num_ranks: int,
    stage: int,
    bucket_cap_mb: float | None,
    tensor_parallel: int = 1,
    num_blocks: int = 32,
    cpu_offload: bool = False,
    on_gpu: bool = True,
    accumulates: bool = False,
) -> Estimate:
    """Estimate the same for a number of parameters of one dtype, in tensors that fill the buckets evenly.

    Args:
        num_params: Parameters of the whole model.
        dtype: dtype that the model computes in.
        num_ranks: Ranks that hold the same part of the model.
        stage: 1 to 3. Stage 3 is fully_shard: shards of weights are in fp32, and are their own masters.
        bucket_cap_mb: See ZeroOptimizer.
        tensor_parallel: Ranks that all weights are split over first.
        num_blocks: Number of equal blocks that fully_shard gathers one by one, each ahead of its use (stage 3).
        cpu_offload: See ZeroOptimizer. Counts as for GPUs.
        on_gpu: Whether ranks train on GPUs, with larger buckets, or on CPUs, which share memory.
        accumulates: As in `estimate`.

    Raises:
        ValueError: An argument is out of range, or is none of this stage.
    """
    if min(tensor_parallel, num_blocks) < 1:
        raise ValueError(
            f"expected tensor_parallel and num_blocks from 1, got {tensor_parallel} and {num_blocks}; correct them"
        )
    if num_blocks > _MOST_BUCKETS:
        raise ValueError(f"expected num_blocks up to {_MOST_BUCKETS}, got {num_blocks}; pass fewer")
    check_bucket_cap(bucket_cap_mb)
    own, on_gpu = ceil_div(num_params, tensor_parallel), cpu_offload or on_gpu
    setup = Setup(
        num_ranks=num_ranks,
        stage=2 if stage == 3 else stage,
        bucket_cap_mb=bucket_cap_mb,
        rule=AdamRule(),
        on_gpu=on_gpu,
        cpu_offload=cpu_offload,
        accumulates=accumulates,
    )
    if stage != 3 or num_ranks <= 1:
        shapes = _evenly(own, dtype.itemsize, cap_bytes(bucket_cap_mb, num_ranks, on_gpu))
        return replace(of_shapes(shapes, setup), num_params=num_params)
    _refuse_in_stage_3(accumulates=accumulates)
    shapes = _evenly(ceil_div(own, num_ranks), FP32, cap_bytes(bucket_cap_mb, 1, on_gpu))
    return _with_gathered(
        of_shapes(shapes, replace(setup, num_ranks=1)),
        equal_blocks_at_most(ceil_div(own, num_blocks), dtype.itemsize, num_blocks, num_ranks),
        num_params,
    )


def _refuse_in_stage_3(**is_given: bool) -> None:
    given = [name for name, is_so in is_given.items() if is_so]
    if given:
        raise ValueError(
            f"expected {', '.join(given)} only in stages 1 and 2, got it in stage 3, where fully_shard reduces the "
            f"gradients of each backward; leave it out"
        )


def _with_gathered(shards: Estimate, gathered: int, num_params: int) -> Estimate:
    """Return the estimate of one rank's shards with what stage 3 gathers at most, which includes the gradients."""
    buckets = max(shards.buckets, gathered - shards.gradients)
    return replace(shards, buckets=buckets, num_params=num_params)


def _evenly(num_params: int, element_bytes: int, bucket_bytes: int) -> list[Shape]:
    """Return shapes of parameters that fill the buckets."""
    whole = max(bucket_bytes // element_bytes // GRANULE * GRANULE, GRANULE)
    if num_params // whole > _MOST_BUCKETS:
        raise ValueError(
            f"expected at most {_MOST_BUCKETS} buckets on a rank, got {num_params // whole} for {num_params} "
            f"parameters; pass a larger bucket_cap_mb"
        )
    sizes = [whole] * (num_params // whole) + [num_params % whole] * (num_params % whole > 0)
    return [Shape(size, element_bytes, is_trained=True) for size in sizes]
