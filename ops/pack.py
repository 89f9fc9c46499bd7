"""pack_: gather the gradients of one bucket, with the cast, in one launch."""

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from pyzero.ops import registry
from pyzero.ops.backend import PackArgs, Scalar
from pyzero.ops.checks import (
    as_scalar,
    check_disjoint,
    check_dtype,
    check_flat,
    check_gradients,
)
from pyzero.ops.rows import FLOAT_DTYPES, rows_of


def pack_(
    bucket: Tensor,
    tensors: Sequence[Tensor],
    *,
    offsets: Sequence[int] | None = None,
    scale: Scalar = 1.0,
    backend: str = "auto",
) -> None:
    """Write `scale * tensors[i]`, rounded to the bucket's dtype, at `bucket[offsets[i]:]`; gaps are left alone.

    Args:
        bucket: (numel,) fp32, bf16 or fp16.
        tensors: Contiguous fp32, bf16 or fp16 tensors of any shape, dtypes mixed or not. May be empty.
        offsets: Where each tensor starts, in elements, ascending. None: back to back from 0.
        scale: Multiplies in fp32 before the rounding; a number or a 0-D tensor on the same device.
        backend: "auto", "cuda", "cpu", "triton" or "reference".

    Raises:
        TypeError: A dtype that is not one of the above.
        ValueError: Tensors that do not fit the bucket, overlap in it, or overlap it.
        BackendUnavailableError: The backend asked for cannot run here.
    """
    device = bucket.device
    check_dtype("bucket", bucket, FLOAT_DTYPES, "make the bucket in one of these")
    check_flat("bucket", bucket)
    check_gradients("tensors", tensors, device)
    if offsets is None:
        offsets = [0, *accumulate(tensor.numel() for tensor in tensors)][: len(tensors)]
    _check_offsets(bucket, tensors, offsets)
    _check_apart(bucket, tensors)
    if not tensors:
        return
    args = PackArgs(
        bucket=bucket,
        tensors=tensors,
        rows=rows_of([bucket, *tensors]),
        offsets=offsets,
        scale=as_scalar("scale", scale, device),
    )
    registry.pick("pack_", backend, device).pack_(args)


def _check_offsets(bucket: Tensor, tensors: Sequence[Tensor], offsets: Sequence[int]) -> None:
    if len(offsets) != len(tensors):
        raise ValueError(f"expected {len(tensors)} offsets, one per tensor, got {len(offsets)}; pass one each")
    end = 0
    for index, (tensor, offset) in enumerate(zip(tensors, offsets, strict=True)):
        if offset < end:
            raise ValueError(
                f"expected ascending offsets that do not overlap, got offsets[{index}]={offset} below {end}, where the "
                f"tensor before ends; sort the tensors by offset"
            )
        end = offset + tensor.numel()
    if end > bucket.numel():
        raise ValueError(f"expected a bucket of at least {end} elements, got {bucket.numel()}; make it larger")


def _check_apart(bucket: Tensor, tensors: Sequence[Tensor]) -> None:
    start = bucket.data_ptr()
    end = start + bucket.numel() * bucket.element_size()
    for index, tensor in enumerate(tensors):
        at = tensor.data_ptr()
        if at < end and at + tensor.numel() * tensor.element_size() > start and tensor.numel():
            check_disjoint([("bucket", bucket), (f"tensors[{index}]", tensor)])
