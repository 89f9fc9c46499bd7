"""The loss-scale state machine in torch operations that select instead of branching: no host read."""

import torch

from pyzero.ops.backend import LossScaleArgs


@torch.no_grad()
def loss_scale_update_(args: LossScaleArgs) -> None:
    """See `pyzero.ops.loss_scale_update_`."""
    policy = args.policy
    scale, growth, left, skipped, consecutive = args.state.unbind()
    overflow = args.found_inf.reshape(()) != 0

    left_after_overflow = left - 1
    lower = (scale * policy.backoff_factor).clamp(min=policy.min_scale)
    scale_after_overflow = torch.where(left_after_overflow <= 0, lower, scale)

    delayed = torch.full_like(growth, 0.0 - policy.growth_delay)
    grows = growth + 1 >= policy.growth_interval
    higher = scale * policy.growth_factor
    grown = torch.where(torch.isfinite(higher), higher.clamp(max=policy.max_scale), scale)
    full = torch.full_like(left, float(policy.hysteresis))
    left_after_clean = full if policy.consecutive_hysteresis else torch.where(grows, full, left)

    new = torch.stack(
        [
            torch.where(overflow, scale_after_overflow, torch.where(grows, grown, scale)),
            torch.where(overflow, delayed, torch.where(grows, torch.zeros_like(growth), growth + 1)),
            torch.where(overflow, left_after_overflow, left_after_clean),
            torch.where(overflow, skipped + 1, skipped),
            torch.where(overflow, consecutive + 1, torch.zeros_like(consecutive)),
        ]
    )
    args.state.copy_(new)
