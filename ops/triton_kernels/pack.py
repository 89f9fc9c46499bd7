"""pack_: gather a bucket's gradients into its flat buffer, with the cast and the scale on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .address_table import Span
from .common import Scalar
from .scaled_copy import CopyJob, scaled_copy


def pack_(
    bucket: Tensor,  # (bucket_numel,) fp32, bf16 or fp16; the gaps between tensors stay as they are
    tensors: Sequence[Tensor],  # contiguous fp32, bf16 or fp16, mixed
    offsets: Sequence[int],  # element of the bucket at which each tensor starts
    scale: Scalar,
    found_inf: Tensor | None,  # (1,) fp32, set to 1 and never cleared
    sumsq: Tensor | None,  # (1,) fp32 or fp64, added to
) -> None:
    """bucket[offsets[i] : offsets[i] + numel] = scale * tensors[i], rounded to the bucket's dtype."""
    start, item_bytes = bucket.data_ptr(), bucket.element_size()
    spans: dict[torch.dtype, list[Span]] = {}
    for tensor, offset in zip(tensors, offsets, strict=True):
        span = (tensor.data_ptr(), start + offset * item_bytes, tensor.numel())
        spans.setdefault(tensor.dtype, []).append(span)
    jobs = [CopyJob(dtype, bucket.dtype, part) for dtype, part in spans.items()]
    scaled_copy(jobs, bucket, scale, found_inf, sumsq, writes=True)
