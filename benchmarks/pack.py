"""pack_ of a list of gradients into one bucket, against torch.cat and a foreach copy."""

from __future__ import annotations

import functools

import torch

from pyzero import ops
from pyzero.sharding.layout import GRANULE

from . import peers
from .harness import Contender, check, compare
from .options import Options
from .rows import Row

_NUM_TENSORS = 100
_FOREACH, _CAT = "torch foreach copy", "torch cat"


def run(options: Options) -> list[Row]:
    rows = [row for dtype in (torch.bfloat16, torch.float32) for row in _case(options, dtype, GRANULE)]
    return rows + _case(options, torch.bfloat16, granule=1)


def _case(options: Options, dtype: torch.dtype, granule: int) -> list[Row]:
    """Gradients in `dtype`, the bucket in bf16. Each starts at a multiple of `granule`, as in a bucket, or anywhere."""
    part = options.size // _NUM_TENSORS // granule * granule + (granule == 1)
    numel = part * _NUM_TENSORS
    flat = peers.normal(numel, 1, options, std=1e-2).to(dtype)
    tensors = peers.split(flat, _NUM_TENSORS)
    bucket, theirs = (torch.empty(numel, dtype=torch.bfloat16, device=options.device) for _ in range(2))
    pieces = list(theirs.tensor_split(_NUM_TENSORS))
    size = flat.element_size() + bucket.element_size()
    torch._foreach_copy_(pieces, tensors)

    contenders = []
    for suffix, backend in options.backends.items():
        pack = functools.partial(ops.pack_, bucket, tensors, backend=backend)
        bucket.zero_()
        pack()
        check("pack_: bucket", bucket, theirs, rtol=0, atol=0)
        contenders.append(Contender("pyzero pack_" + suffix, pack, size))
    contenders.append(Contender(_FOREACH, lambda: torch._foreach_copy_(pieces, tensors), size, "torch-foreach"))
    if dtype == bucket.dtype:
        contenders.append(Contender(_CAT, lambda: torch.cat(tensors, out=theirs), size, "torch-fused"))
    case = f"{_NUM_TENSORS} x {str(dtype)[6:]} to bf16" + (", odd lengths" if granule == 1 else "")
    return compare("pack", case, numel, contenders, options)
