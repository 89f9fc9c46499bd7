"""unscale_ against torch's foreach unscale, with and without the norm for clipping."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pyzero import ops

from . import peers
from .harness import Contender, check, compare
from .options import Options
from .rows import Row

_NUM_TENSORS = 100


def run(options: Options) -> list[Row]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += _case(options, dtype)
    return rows


def _case(options: Options, dtype: torch.dtype) -> list[Row]:
    numel = options.size
    flat = peers.normal(numel, 1, options, std=1e-2).to(dtype)
    inv_scale, found_inf = torch.full((), 0.5, device=flat.device), torch.zeros(1, device=flat.device)
    for backend in options.backends.values():
        _check(flat, inv_scale, backend)

    # The scale is just below 1: at exactly 1 ours only reads, and the values must not fade while they are timed.
    nearly_one, sumsq = torch.full((), 1 - 2**-24, device=flat.device), torch.zeros(1, device=flat.device)
    ours, theirs = peers.split(flat, _NUM_TENSORS), peers.split(flat, _NUM_TENSORS)

    def torch_unscale() -> None:
        _peer(theirs, found_inf, nearly_one)

    def torch_with_norm() -> None:
        torch_unscale()
        torch.nn.utils.get_total_norm(theirs, foreach=True)

    size = flat.element_size()
    plain, with_norm = [], []
    for suffix, backend in options.backends.items():
        unscale = functools.partial(ops.unscale_, ours, found_inf=found_inf, backend=backend)
        plain.append(Contender("pyzero unscale_" + suffix, functools.partial(unscale, nearly_one), 2 * size))
        both = functools.partial(unscale, sumsq=sumsq)
        with_norm.append(Contender("pyzero unscale_" + suffix, functools.partial(both, nearly_one), 2 * size))
        with_norm.append(Contender("pyzero unscale_ by 1.0" + suffix, functools.partial(both, 1.0), size))
    rows = compare(
        "unscale",
        f"{_NUM_TENSORS} x {str(dtype)[6:]}",
        numel,
        [*plain, Contender("torch foreach unscale", torch_unscale, 2 * size, "torch-foreach")],
        options,
    )
    with_norm.append(Contender("torch unscale, norm", torch_with_norm, 2 * size, "torch-foreach"))
    case = f"{_NUM_TENSORS} x {str(dtype)[6:]}, norm"
    return rows + compare("unscale", case, numel, with_norm, options)


def _peer(tensors: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """GradScaler's unscale, or torch's foreach ops for bf16 on a GPU, where torch has no such unscale."""
    if tensors[0].is_cuda and tensors[0].dtype == torch.bfloat16:
        torch._foreach_mul_(tensors, inv_scale)
        largest = torch.stack(torch._foreach_norm(tensors, math.inf)).max()
        found_inf.copy_(~torch.isfinite(largest))
    else:
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found_inf, inv_scale)


def _check(flat: Tensor, inv_scale: Tensor, backend: str) -> None:
    """Compare values bit for bit (halving is exact), the norm to fp32 precision, and both values of the flag."""
    ours, theirs = flat.clone(), flat.clone()
    found, peer_found = torch.zeros(1, device=flat.device), torch.zeros(1, device=flat.device)
    sumsq = torch.zeros(1, device=flat.device)
    ops.unscale_(ours.tensor_split(_NUM_TENSORS), inv_scale, found_inf=found, sumsq=sumsq, backend=backend)
    _peer(list(theirs.tensor_split(_NUM_TENSORS)), peer_found, inv_scale)
    check("unscale_: values", ours, theirs, rtol=0, atol=0)
    # ours sums in fp64, and so does the oracle: two roundings to fp32 remain
    check("unscale_: sumsq", sumsq, theirs.double().square().sum().reshape(1), rtol=2**-22, atol=0)
    check("unscale_: found_inf of finite values", found, peer_found, rtol=0, atol=0)
    for tensor in (ours, theirs):
        tensor[-1] = float("inf")
    ops.unscale_(ours.tensor_split(_NUM_TENSORS), inv_scale, found_inf=found, backend=backend)
    _peer(list(theirs.tensor_split(_NUM_TENSORS)), peer_found, inv_scale)
    check("unscale_: found_inf of an inf", found, peer_found, rtol=0, atol=0)
