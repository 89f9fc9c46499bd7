"""unscale_: multiply a list of gradients in place, flag inf and NaN, add up the squares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .address_table import Span
from .common import Scalar
from .scaled_copy import CopyJob, scaled_copy


def unscale_(
    tensors: Sequence[Tensor],  # contiguous fp32, bf16 or fp16, mixed
    inv_scale: Scalar,
    found_inf: Tensor | None,  # (1,) fp32, set to 1 and never cleared
    sumsq: Tensor | None,  # (1,) fp32 or fp64, added to
) -> None:
    """Unscale in place; the number 1.0 only reads."""
    spans: dict[torch.dtype, list[Span]] = {}
    for tensor in tensors:
        address = tensor.data_ptr()
        spans.setdefault(tensor.dtype, []).append((address, address, tensor.numel()))
    if not spans:
        return
    writes = isinstance(inv_scale, Tensor) or inv_scale != 1.0
    if not writes and found_inf is None and sumsq is None:
        return
    jobs = [CopyJob(dtype, dtype, part) for dtype, part in spans.items()]
    scaled_copy(jobs, tensors[0], inv_scale, found_inf, sumsq, writes=writes)
