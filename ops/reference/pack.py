"""Pack, a tensor at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyzero.ops.reference.scalars import report, scalar


def pack_(
    bucket: Tensor,
    tensors: Sequence[Tensor],
    offsets: Sequence[int],
    scale: float | Tensor,
    found_inf: Tensor | None,
    sumsq: Tensor | None,
) -> None:
    """See `pyzero.ops.pack_`."""
    slots = [bucket[offset : offset + t.numel()] for t, offset in zip(tensors, offsets, strict=True)]
    for slot, tensor in zip(slots, tensors, strict=True):
        slot.copy_(tensor.reshape(-1).float() * scalar(scale, torch.float32))
    report(slots, found_inf, sumsq)
