"""Sums of |g|^p of gradients, for p-norms, and a check for values other than zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def power_sum(parts: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Return the sum of |g|^p over tensors, or the largest |g| for inf: (1,) fp64."""
    powers = powers_of(parts, norm_type, device)
    return (powers.amax() if math.isinf(norm_type) and powers.numel() else powers.sum()).reshape(1)


def powers_of(parts: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Return the sum of |g|^p of each part, or its largest |g| for inf: (len(parts),) fp64."""
    filled = [part for part in parts if part.numel()]
    if not filled:
        return torch.zeros(len(parts), dtype=torch.float64, device=device)
    if norm_type in (2.0, math.inf):  # much faster in fp32; inf needs no sum, and sums of squares are usual
        norms = torch.stack(torch._foreach_norm([part.float() for part in filled], norm_type)).double()
    else:  # in fp64, so that the sum is the same on any number of ranks
        norms = torch.stack(torch._foreach_norm(filled, norm_type, dtype=torch.float64))
    powers = iter((norms if math.isinf(norm_type) else norms.pow(norm_type)).unbind())
    nothing = norms.new_zeros(())  # stacked: to write by index, the host would copy the indices to a GPU and wait
    return torch.stack([next(powers) if part.numel() else nothing for part in parts])


def have_values(grads: list[Tensor]) -> bool:
    """Whether any of them is not all zeros. Waits for a GPU."""
    filled = [grad for grad in grads if grad.numel() and grad.layout == torch.strided]
    return bool(filled) and bool(torch.stack(torch._foreach_norm(filled, math.inf)).ne(0).any())
