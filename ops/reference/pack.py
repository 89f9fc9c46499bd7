"""Pack, a tensor at a time."""

import torch

from pyzero.ops.backend import PackArgs
from pyzero.ops.reference.scalars import scalar


@torch.no_grad()
def pack_(args: PackArgs) -> None:
    """See `pyzero.ops.pack_`."""
    for tensor, offset in zip(args.tensors, args.offsets, strict=True):
        slot = args.bucket[offset : offset + tensor.numel()]
        slot.copy_(tensor.reshape(-1).float() * scalar(args.scale, torch.float32))
