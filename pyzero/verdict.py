"""The step's one message: what all ranks know of the gradients once each has told what it knows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyzero.buckets import Bucket
from pyzero.comm import Group
from pyzero.gradients import Stats

_FOUND, _SUMSQ, _SUSPECT, _USED = range(4)  # columns of a row; from _USED on, one per parameter


@dataclass(frozen=True)
class Verdict:
    """The same on every rank; nothing of it has been read on the host."""

    found_inf: Tensor  # (1,) fp32, 1 where any gradient on any rank was inf or NaN
    norm: Tensor  # 0-D fp32, global 2-norm of the gradients, averaged and unscaled, before clipping
    suspect: Tensor  # (1,) fp64, code of the first bad parameter; see Bucket.suspect
    used: Tensor  # (num_params,) fp32, 1 where some rank had a gradient; bucket by bucket
    unscale: Tensor | None  # 0-D fp32 that Adam is still to multiply by


class Jury:
    """Gathers the rows of all ranks.

    Args:
        group: The ranks that share the optimizer's state.
        model_parallel: The ranks that hold other parts of the same model: they skip together and share one norm.
        device: Where the gradients are.
    """

    def __init__(self, group: Group, model_parallel: Group | None, device: torch.device) -> None:
        self._group = group
        self._model_parallel = model_parallel
        self._device = device
        self._used_pattern: tuple[bool, ...] | None = None
        self._used_row = torch.empty(0)

    def hear(self, stats: Stats, buckets: list[Bucket], unscale: Tensor | None) -> Verdict:
        """Collective: exchange the rows, and find the verdict."""
        row = torch.cat([stats.found_inf.double(), stats.sumsq, stats.suspect, self._used_here(buckets)])
        rows = self._group.gather_rows(row)  # (size, 3 + num_params) fp64
        found, sumsq = (rows[:, _FOUND] != 0).any(), rows[:, _SUMSQ].sum()
        if self._model_parallel is not None:
            rows_beside = self._model_parallel.gather_rows(torch.stack([found.double(), sumsq]))
            found, sumsq = (rows_beside[:, _FOUND] != 0).any(), rows_beside[:, _SUMSQ].sum()
        norm = sumsq.sqrt()
        if unscale is not None:
            norm = norm * unscale
        return Verdict(
            found_inf=found.to(torch.float32).reshape(1),
            norm=norm.to(torch.float32),
            suspect=rows[:, _SUSPECT].min().reshape(1),
            used=(rows[:, _USED:] != 0).any(0).to(torch.float32),
            unscale=unscale,
        )

    def norm(self, power: Tensor, norm_type: float, unscale: Tensor | None) -> Tensor:
        """Collective: the global p-norm, 0-D fp32, of every rank's (1,) `Gradients.norm_power`."""
        powers = self._group.gather_rows(power)
        combine = torch.max if math.isinf(norm_type) else torch.sum
        power = combine(powers).reshape(1)
        if self._model_parallel is not None:
            power = combine(self._model_parallel.gather_rows(power)).reshape(1)
        norm = power if math.isinf(norm_type) else power.pow(1 / norm_type)
        return (norm if unscale is None else norm * unscale).to(torch.float32).reshape(())

    def _used_here(self, buckets: list[Bucket]) -> Tensor:
        """(num_params,) fp64 on the device: which parameters had a gradient on this rank."""
        pattern = tuple(used for bucket in buckets for used in bucket.used)
        if pattern != self._used_pattern:
            self._used_pattern = pattern
            self._used_row = torch.tensor(pattern, dtype=torch.float64).to(self._device, non_blocking=True)
        return self._used_row


def clip_coefficient(max_norm: float, norm: Tensor) -> Tensor:
    """torch.nn.utils.clip_grad_norm_'s: min(1, max_norm / (norm + 1e-6)), 0-D."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
