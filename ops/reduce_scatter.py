"""reduce_scatter_: the sum of a reduce-scatter, with scale, check and sum of squares, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyzero.ops import registry
from pyzero.ops.backend import ReduceScatterArgs, Scalar
from pyzero.ops.checks import (
    as_flag,
    as_scalar,
    check_device,
    check_disjoint,
    check_dtype,
    check_flat,
    check_grad_stats,
    check_list,
)
from pyzero.ops.rows import FIRST_APART, FLAT, FLOAT_DTYPES, ONE_DTYPE, checked_rows, rows_of


def reduce_scatter_(
    shard: Tensor,
    slices: Sequence[Tensor],
    *,
    scale: Scalar = 1.0,
    accumulate: bool = False,
    found_inf: Tensor | None = None,
    sumsq: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Compute `shard = [shard +] scale * (slices[0] + slices[1] + ...)`, summed in rank order and in fp32.

    Args:
        shard: (numel,) fp32, this rank's part of the bucket.
        slices: One (numel,) tensor per rank, all fp32, all bf16 or all fp16, in rank order.
        scale: 1 / world size, 1 / loss scale, or their product; a number or a 0-D tensor on the same device.
        accumulate: Add to the shard's values instead of replacing them.
        found_inf: 1-element fp32 tensor, set to 1 if the new shard holds an inf or a NaN; or None.
        sumsq: 1-element fp32 or fp64 tensor. The sum of squares of the new shard is added to it. Or None.
        backend: "auto", "cuda", "cpu", "triton" or "reference".

    Raises:
        TypeError: A tensor has another dtype than above, slices have several, or a tensor is passed instead of a list.
        ValueError: There are no slices; shapes or devices do not fit; or a slice shares memory with the shard.
        BackendUnavailableError: The chosen backend cannot run here.
    """
    check_list("slices", slices)
    if not len(slices):
        raise ValueError("expected one slice per rank, got none; pass [bucket] on a single rank")
    tensors = [shard, *slices]
    rows = checked_rows(tensors, 1, FLAT | FIRST_APART | ONE_DTYPE)
    if rows is None:
        rows = _explain(tensors)
    device = shard.device
    check_grad_stats(found_inf, sumsq, device)
    args = ReduceScatterArgs(
        shard=shard,
        slices=slices,
        rows=rows,
        scale=as_scalar("scale", scale, device),
        accumulate=as_flag("accumulate", accumulate),
        found_inf=found_inf,
        sumsq=sumsq,
    )
    registry.pick("reduce_scatter_", backend, device).reduce_scatter_(args)


def _explain(tensors: Sequence[Tensor]) -> bytes:
    shard, *slices = tensors
    check_dtype("shard", shard, (torch.float32,), "make the shard in fp32")
    check_flat("shard", shard)
    check_dtype("slices[0]", slices[0], FLOAT_DTYPES, "convert it with .float()")
    for index, piece in enumerate(slices):
        label = f"slices[{index}]"
        check_dtype(label, piece, (slices[0].dtype,), "send every rank's slice in one dtype")
        check_flat(label, piece, numel=shard.numel())
        check_device(label, piece, shard.device)
        check_disjoint([("shard", shard), (label, piece)])
    return rows_of(tensors)
