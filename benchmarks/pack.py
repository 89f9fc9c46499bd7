"""pack_ of a list of gradients into one bucket, against torch.cat and a foreach copy."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyzero import ops

from . import peers
from .harness import Contender, Options, Row, check, compare

_NUM_TENSORS = 100
_FOREACH, _CAT = "torch foreach copy", "torch cat"


def run(options: Options) -> list[Row]:
    return _case(options, torch.bfloat16) + _case(options, torch.float32)


def _case(options: Options, dtype: torch.dtype) -> list[Row]:
    """Gradients in `dtype`, the bucket in bf16."""
    numel = options.size
    flat = peers.normal(numel, 1, options, std=1e-2).to(dtype)
    tensors = list(flat.tensor_split(_NUM_TENSORS))
    bucket, theirs = (torch.empty(numel, dtype=torch.bfloat16, device=options.device) for _ in range(2))
    pieces = list(theirs.tensor_split(_NUM_TENSORS))
    found_inf, sumsq = (torch.zeros(1, device=options.device) for _ in range(2))
    size = flat.element_size() + bucket.element_size()
    torch._foreach_copy_(pieces, tensors)

    contenders = []
    for suffix, backend in options.backends.items():
        pack = functools.partial(ops.pack_, bucket, tensors, backend=backend)
        with_norm = functools.partial(pack, found_inf=found_inf, sumsq=sumsq)
        _check(bucket, theirs, found_inf, sumsq, with_norm)
        contenders.append(Contender("pyzero pack_" + suffix, pack, size))
        contenders.append(Contender("same, with flag and norm" + suffix, with_norm, size))
    contenders.append(Contender(_FOREACH, lambda: torch._foreach_copy_(pieces, tensors), size))
    if dtype == bucket.dtype:
        contenders.append(Contender(_CAT, lambda: torch.cat(tensors, out=theirs), size))
    case = f"{_NUM_TENSORS} x {str(dtype)[6:]} to bf16"
    return compare("pack", case, numel, contenders, options, peer=contenders[-1].name)


def _check(
    bucket: Tensor, theirs: Tensor, found_inf: Tensor, sumsq: Tensor, with_norm: functools.partial[None]
) -> None:
    bucket.zero_()
    sumsq.zero_()
    with_norm()
    check("pack_: bucket", bucket, theirs, rtol=0, atol=0)
    check("pack_: sumsq", sumsq, theirs.double().square().sum().reshape(1), rtol=2**-22, atol=0)
    check("pack_: found_inf", found_inf, torch.zeros_like(found_inf), rtol=0, atol=0)
