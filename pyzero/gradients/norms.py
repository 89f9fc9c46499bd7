"""Sums of |g|^p of gradients, the parts of a p-norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def power_sum(parts: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """(1,) fp64: the sum of |g|^p over tensors, or the largest |g| for inf."""
    powers = powers_of(parts, norm_type, device)
    return (powers.amax() if math.isinf(norm_type) and powers.numel() else powers.sum()).reshape(1)


def powers_of(parts: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """(len(parts),) fp64: the sum of |g|^p of each, or its largest |g| for inf."""
    filled = [part for part in parts if part.numel()]
    if not filled:
        return torch.zeros(len(parts), dtype=torch.float64, device=device)
    if norm_type in (2.0, math.inf):  # in fp32 many times faster; inf has no sum, and optimizers have sums of squares
        norms = torch.stack(torch._foreach_norm([part.float() for part in filled], norm_type)).double()
    else:  # the same on any number of ranks, each of which sums its own parts
        norms = torch.stack(torch._foreach_norm(filled, norm_type, dtype=torch.float64))
    powers = iter((norms if math.isinf(norm_type) else norms.pow(norm_type)).unbind())
    nothing = norms.new_zeros(())  # stacked, not put in place by indices, whose copy to a GPU the host would wait for
    return torch.stack([next(powers) if part.numel() else nothing for part in parts])
