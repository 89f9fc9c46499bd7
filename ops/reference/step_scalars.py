"""The scalars of a step in separate torch operations, each rounded once, in the order that every backend keeps."""

import torch
from torch import Tensor

from pyzero.ops.backend import StepScalarsArgs
from pyzero.ops.reference.scalars import round_to, scalar


@torch.no_grad()
def step_scalars_(args: StepScalarsArgs) -> None:
    """See `pyzero.ops.step_scalars_`."""
    flags, sums, _ = args.stats.unbind(1)
    found = (flags != 0).any().to(torch.float32)
    unscale, factor = scalar(args.unscale, torch.float32), scalar(args.factor, torch.float32)
    sumsq = sums[0]
    for each in sums[1:]:
        sumsq = sumsq + each
    magnitude = factor.abs() if isinstance(factor, Tensor) else abs(factor)
    norm = (sumsq.sqrt() * unscale).to(torch.float32) * magnitude
    clip = torch.ones_like(norm)
    if args.max_norm is not None:
        clip = ((norm + 1e-6).reciprocal() * round_to(args.max_norm, torch.float32)).clamp(max=1.0)
    args.out.copy_(torch.stack([found, norm, clip, clip * factor * unscale]))
    args.steps.copy_(torch.where(found == 0, args.steps + args.used, args.steps))
