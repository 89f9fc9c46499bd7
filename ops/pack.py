"""pack_: copy and cast the gradients of one bucket in one launch."""

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
    check_list,
    check_offsets,
)
from pyzero.ops.rows import FIRST_APART, FLOAT_DTYPES, checked_rows, numels, rows_of


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
        tensors: Contiguous fp32, bf16 or fp16 tensors of any shape; dtypes may be mixed. May be empty.
        offsets: Where each tensor starts, in elements, ascending. None: back to back from 0.
        scale: A factor, applied in fp32 before the rounding; a number or a 0-D tensor on the same device.
        backend: "auto", "cuda", "cpu", "triton" or "reference".

    Raises:
        TypeError: A tensor has another dtype than above, or a tensor is passed instead of a list.
        ValueError: Tensors do not fit into the bucket, overlap in it, or share memory with it.
        BackendUnavailableError: The chosen backend cannot run here.
    """
    check_list("tensors", tensors)
    is_flat = isinstance(bucket, Tensor) and bucket.dim() == 1
    rows = checked_rows([bucket, *tensors], rules=FIRST_APART) if is_flat else None
    if rows is None:
        rows = _explain(bucket, tensors)
    _, *counts = numels(rows)
    if offsets is None:
        offsets = list(accumulate(counts, initial=0))[:-1]
    offsets = check_offsets("a bucket", bucket.numel(), counts, offsets)
    if not len(tensors):
        registry.check_name(backend)
        return
    device = bucket.device
    args = PackArgs(
        bucket=bucket,
        tensors=tensors,
        rows=rows,
        offsets=offsets,
        scale=as_scalar("scale", scale, device),
    )
    registry.pick("pack_", backend, device).pack_(args)


def _explain(bucket: Tensor, tensors: Sequence[Tensor]) -> bytes:
    check_dtype("bucket", bucket, FLOAT_DTYPES, "make the bucket in one of these")
    check_flat("bucket", bucket)
    check_gradients("tensors", tensors, bucket.device)
    for index, tensor in enumerate(tensors):
        check_disjoint([("bucket", bucket), (f"tensors[{index}]", tensor)])
    return rows_of([bucket, *tensors])
