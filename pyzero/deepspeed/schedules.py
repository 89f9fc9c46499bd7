"""DeepSpeed's five learning-rate schedules as torch schedulers, with its names, defaults and numbers.

DeepSpeed's schedules count iterations from -1: the first optimizer step runs at -1, the second at 0. torch's
`last_epoch` is one more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Numbers = float | Sequence[float]  # one for all groups, or one per group
WarmupType = Literal["log", "linear"]


def _per_group(optimizer: Optimizer, name: str, value: Numbers) -> list[float]:
    num_groups = len(optimizer.param_groups)
    if not isinstance(value, Sequence):
        return [value] * num_groups
    if len(value) != num_groups:
        raise ValueError(f"expected {num_groups} numbers for {name}, one for each group, got {len(value)}; correct it")
    return list(value)


def _own_rates(optimizer: Optimizer) -> list[float]:
    """Return the rate that each group had before a schedule changed it."""
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


def set_rate(group: dict[str, Any], rate: Any) -> None:
    """Set the rate of a parameter group. A rate that is a tensor is written in place."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = float(rate)


class Schedule(LRScheduler):
    """A scheduler that computes one rate per group from the iteration, by `rates`.

    If `last_batch_iteration` is 0 or more, groups keep their rates and betas until the first step(), as in DeepSpeed.
    """

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int) -> None:
        kept = [] if last_batch_iteration < 0 else list(optimizer.param_groups)
        before = [(float(group["lr"]), group.get("betas")) for group in kept]
        for group, (rate, _) in zip(kept, before, strict=True):
            group.setdefault("initial_lr", rate)  # torch requires it if last_epoch is not -1
        super().__init__(optimizer, last_batch_iteration)
        for group, (rate, betas) in zip(kept, before, strict=True):
            set_rate(group, rate)
            group.update({} if betas is None else {"betas": betas})

    @property
    def last_batch_iteration(self) -> int:
        """The iteration in DeepSpeed's count."""
        return int(self.last_epoch) - 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the iteration from a state dict of this class or of DeepSpeed's.

        Nothing else is loaded: the run continues with the rates and lengths of its own config.
        """
        theirs = state_dict.get("last_batch_iteration")
        self.last_epoch = state_dict["last_epoch"] if theirs is None else theirs + 1
        self._last_lr = [*self.get_lr()]

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the rate of each group for the coming step."""
        return self.rates(self.last_batch_iteration)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Advance to the next iteration, or to the given one in DeepSpeed's count. The first call advances to 0."""
        if last_batch_iteration is None:
            super().step()
            return
        # torch's step adds one, and its count is one more than DeepSpeed's. In a SequentialLR a schedule is at -1 in
        # torch's count until its turn comes. Older torch starts it by step(0), in torch's count.
        self.last_epoch = last_batch_iteration - 1 if self.last_epoch < 0 else last_batch_iteration
        super().step()

    def apply(self) -> None:
        """Set the groups' rates to those of the present iteration."""
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            set_rate(group, rate)

    def rates(self, iteration: int) -> list[float]:
        """Return the rate of each group at an iteration in DeepSpeed's count: -1 for the first step."""
        raise NotImplementedError


def _check_steps(name: str, num_steps: int) -> int:
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"expected {name} as a whole number from 1, got {num_steps!r}; correct it")
    return num_steps


def _check_type(kind: WarmupType) -> WarmupType:
    if kind not in get_args(WarmupType):
        raise ValueError(f'expected warmup_type as "log" or "linear", got {kind!r}; pass one of these')
    return kind


def _warmup(iteration: int, num_steps: int, kind: WarmupType) -> float:
    """Return the fraction of the way from the minimum to the maximum; 1 after the warmup."""
    if iteration >= num_steps:
        return 1.0
    return iteration / num_steps if kind == "linear" else math.log(iteration + 1) / math.log(num_steps)


class WarmupLR(Schedule):
    """Rises from the minimum rate to the maximum, and stays there.

    Args:
        optimizer: The optimizer whose rates are set.
        warmup_min_lr: Rate at the start.
        warmup_max_lr: Rate after the warmup; None: each group's own.
        warmup_num_steps: Optimizer steps of the warmup; 1 counts as 2.
        warmup_type: "log" or "linear".
        last_batch_iteration: Iteration to continue from; -1 is the start.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: Numbers = 0.0,
        warmup_max_lr: Numbers | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: WarmupType = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        own = _own_rates(optimizer)
        self.min_lrs = _per_group(optimizer, "warmup_min_lr", warmup_min_lr)
        self.max_lrs = _per_group(optimizer, "warmup_max_lr", own if warmup_max_lr is None else warmup_max_lr)
        self.warmup_num_steps = max(2, _check_steps("warmup_num_steps", warmup_num_steps))
        self.warmup_type = _check_type(warmup_type)
        super().__init__(optimizer, last_batch_iteration)

    def rates(self, iteration: int) -> list[float]:
        """See Schedule."""
        fraction = 0.0 if iteration < 0 else self._fraction(iteration)
        return [low + (high - low) * fraction for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _fraction(self, iteration: int) -> float:
        return _warmup(iteration, self.warmup_num_steps, self.warmup_type)


class WarmupDecayLR(WarmupLR):
    """WarmupLR, then a linear decay to 0 at `total_num_steps`."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: Numbers = 0.0,
        warmup_max_lr: Numbers | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: WarmupType = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = total_num_steps
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)

    def _fraction(self, iteration: int) -> float:
        if iteration < self.warmup_num_steps:
            return super()._fraction(iteration)
        left = self.total_num_steps - iteration
        return max(0.0, left / max(1, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(Schedule):
    """Multiplies the groups' own rates by a ratio that rises to 1 and then follows a half cosine to `cos_min_ratio`.

    Args:
        optimizer: The optimizer whose rates are set.
        total_num_steps: Optimizer steps, including the warmup.
        warmup_min_ratio: Ratio at the start of the warmup; the very first step runs at 0.
        warmup_num_steps: Optimizer steps of the warmup; 1 counts as 2.
        cos_min_ratio: Ratio from the end on.
        warmup_type: "log" or "linear".
        last_batch_iteration: Iteration to continue from; -1 is the start.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: WarmupType = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.own_lrs = _own_rates(optimizer)
        self.total_num_steps = total_num_steps
        self.warmup_min_ratio = warmup_min_ratio
        self.warmup_num_steps = max(2, _check_steps("warmup_num_steps", warmup_num_steps))
        self.cos_min_ratio = cos_min_ratio
        self.warmup_type = _check_type(warmup_type)
        super().__init__(optimizer, last_batch_iteration)

    def rates(self, iteration: int) -> list[float]:
        """See Schedule."""
        ratio = self._ratio(iteration)
        return [rate * ratio for rate in self.own_lrs]

    def get_lr_ratio(self) -> float:
        """Return the factor on the groups' own rates for the coming step."""
        return self._ratio(self.last_batch_iteration)

    def _ratio(self, iteration: int) -> float:
        if iteration < 0:
            return 0.0
        if iteration < self.warmup_num_steps:
            up = _warmup(iteration, self.warmup_num_steps, self.warmup_type)
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * up
        done = iteration - self.warmup_num_steps + 1
        progress = min(1.0, done / max(1, self.total_num_steps - self.warmup_num_steps))
        down = (1.0 + math.cos(math.pi * progress)) / 2
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * down)


class LRRangeTest(Schedule):
    """Raises the rate without end, to show from which rate on training fails (Smith 2018, arXiv 1803.09820).

    Args:
        optimizer: The optimizer whose rates are set.
        lr_range_test_min_lr: Rate at the start.
        lr_range_test_step_size: Steps of an interval.
        lr_range_test_step_rate: Growth of the rate per interval, as a multiple of the first rate.
        lr_range_test_staircase: Grow once per interval instead of in every step.
        last_batch_iteration: Iteration to continue from; -1 is the start.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: Numbers = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = _per_group(optimizer, "lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = _check_steps("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    def rates(self, iteration: int) -> list[float]:
        """See Schedule."""
        intervals = (iteration + 1) / self.step_size
        growth = 1 + self.step_rate * (math.floor(intervals) if self.staircase else intervals)
        return [rate * growth for rate in self.min_lrs]


class OneCycle(Schedule):
    """Raises and lowers rates once, and momentum the other way, then decays the rates (Smith 2018, arXiv 1803.09820).

    After the cycle, momentum grows. As in DeepSpeed, the second beta is 0.99 while momentum is driven.

    Args:
        optimizer: The optimizer whose rates and betas are set.
        cycle_min_lr: Rate at both ends of the cycle.
        cycle_max_lr: Rate in the middle of the cycle.
        decay_lr_rate: After the cycle the rate is cycle_min_lr / (1 + decay_lr_rate * steps / decay_step_size).
        cycle_first_step_size: Steps of the first half.
        cycle_second_step_size: Steps of the second half; default: as many.
        cycle_first_stair_count: Stairs in the first half; 0: none.
        cycle_second_stair_count: Stairs in the second half; default: as many.
        decay_step_size: Steps of an interval of the decay; 0: no decay.
        cycle_momentum: Set the first beta too, if the optimizer has betas.
        cycle_min_mom: First beta in the middle of the cycle.
        cycle_max_mom: First beta at both ends of the cycle.
        decay_mom_rate: After the cycle the first beta is cycle_max_mom * (1 + decay_mom_rate * steps /
            decay_step_size).
        last_batch_iteration: Iteration to continue from; -1 is the start.
    """

    _SECOND_BETA = 0.99

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: Numbers,
        cycle_max_lr: Numbers,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: Numbers = 0.8,
        cycle_max_mom: Numbers = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = _per_group(optimizer, "cycle_min_lr", cycle_min_lr)
        self.max_lrs = _per_group(optimizer, "cycle_max_lr", cycle_max_lr)
        self.min_moms = _per_group(optimizer, "cycle_min_mom", cycle_min_mom)
        self.max_moms = _per_group(optimizer, "cycle_max_mom", cycle_max_mom)
        second = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        if cycle_first_step_size <= 0 or second < 0:
            raise ValueError(f"expected cycle_first_step_size above 0, got {cycle_first_step_size}; correct it")
        stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        self.halves = ((cycle_first_step_size, cycle_first_stair_count), (second, stairs))
        self.decay_lr_rate, self.decay_mom_rate = decay_lr_rate, decay_mom_rate
        self.decay_step_size = decay_step_size
        self.cycle_momentum = cycle_momentum and "betas" in optimizer.defaults
        super().__init__(optimizer, last_batch_iteration)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """See Schedule. Sets the betas too."""
        super().step(last_batch_iteration)
        self._set_momenta()

    def apply(self) -> None:
        """See Schedule. Sets the betas too."""
        super().apply()
        self._set_momenta()

    def _set_momenta(self) -> None:
        if self.cycle_momentum:
            for group, momentum in zip(
                self.optimizer.param_groups, self.momenta(self.last_batch_iteration), strict=True
            ):
                group["betas"] = (momentum, self._SECOND_BETA)

    def rates(self, iteration: int) -> list[float]:
        """See Schedule."""
        after = self._after_cycle(iteration)
        if after is None:
            up = self._height(iteration + 1)
            return [low + (high - low) * up for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        return [rate / (1 + self.decay_lr_rate * after) for rate in self.min_lrs]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """Return the betas of each group; None if they are not driven.

        As in DeepSpeed, the first beta is reported as the maximum before the first step().
        """
        if not self.cycle_momentum:
            return None
        iteration = self.last_batch_iteration
        return [(mom, self._SECOND_BETA) for mom in (self.max_moms if iteration < 0 else self.momenta(iteration))]

    def momenta(self, iteration: int) -> list[float]:
        """Return the first beta of each group.

        As in DeepSpeed, the very first step runs at the minimum rate and the minimum momentum.
        """
        after = self._after_cycle(iteration)
        if iteration < 0:
            return self.min_moms
        if after is None:
            up = self._height(iteration + 1)
            return [high - (high - low) * up for low, high in zip(self.min_moms, self.max_moms, strict=True)]
        return [momentum * (1 + self.decay_mom_rate * after) for momentum in self.max_moms]

    def _after_cycle(self, iteration: int) -> float | None:
        """Return the number of decay intervals since the cycle ended; None inside the cycle."""
        total = self.halves[0][0] + self.halves[1][0]
        if iteration < total:
            return None
        return (iteration - total + 1) / self.decay_step_size if self.decay_step_size else 0.0

    def _height(self, place: int) -> float:
        """Return the height in the cycle: 0 at its ends, 1 in its middle."""
        (first, stairs), (second, second_stairs) = self.halves
        place %= first + second
        steps, length = place, first
        if place > first:
            steps, length, stairs = first + second - place, second, second_stairs
        if stairs:
            return math.floor(steps * stairs / length) / stairs
        return steps / length


SCHEDULES = {cls.__name__: cls for cls in (WarmupLR, WarmupDecayLR, WarmupCosineLR, LRRangeTest, OneCycle)}
VALID_LR_SCHEDULES = list(SCHEDULES)  # DeepSpeed's name, which accelerate imports
