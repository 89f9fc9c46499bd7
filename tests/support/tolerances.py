"""How far results may lie apart where bit equality is not owed: a table per op, by dtype, derived from rounding.

u is the unit roundoff: a correctly rounded operation is off by at most u, relatively. 2^-24 in fp32, 2^-53 in fp64.

adam_ over S steps, against the same formula in fp64. Independent errors have random signs, so N of them add up like
sqrt(N) (a worst case would add up like N, but would not catch a wrong formula). The largest of some thousands is about
4 standard deviations, and an error that is uniform within u has u / sqrt(3): a factor of 4 / sqrt(3), taken as 2.5.
- The master is rounded once per step by at most u*|p|: 2.5 * sqrt(S) * u * |p|.
- exp_avg forgets with rate beta1: of its own errors the last 1/(1 - beta1) = 10 count, sqrt(10) * u. exp_avg_sq:
  1/(1 - beta2) = 1000, sqrt(1000) * u, and half of that in its square root. The quotient and its three scalars add 6 u
  at most: the update of a step, at most about lr, is off by (sqrt(10) + sqrt(1000) / 2 + 6) * u = 25 u of itself. These
  errors persist from step to step (moments move slowly), so over S steps they add up like S: 2.5 * 25 * u * S * lr.
- Constants that are rounded once err in the same direction at every step, by e(x) = |round(x) - x|, 0 in fp64: the
  decay factor shifts the master by S * e(decay) * |p|; beta2 shifts exp_avg_sq by e(beta2) / (1 - beta2) of itself, and
  the update by half of that. (beta1 does not: exp_avg moves by a fraction of g - exp_avg.)
Two results in the same dtype, each of which errs that far, may differ by the sqrt(2)-fold.
exp_avg: sqrt(10) * 2.5 * u of the largest gradient, and the rounding of g itself: 10 u.
exp_avg_sq: (sqrt(1000) * 2.5 + 3) * u = 82 u of the largest squared gradient, and e(beta2) / (1 - beta2).

sumsq of n values: squares of fp32 are exact in fp64, a sum of positive terms in any order is off by (n - 1) * 2^-53 of
itself at most; an fp32 result is rounded once more per call.
"""

import math
from dataclasses import dataclass

import torch

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def rounding(value: float, dtype: torch.dtype) -> float:
    """e(value) above."""
    return abs(torch.tensor(value, dtype=dtype).item() - value)


@dataclass(frozen=True)
class AdamTolerance:
    """Absolute errors after some steps, as derived above."""

    dtype: torch.dtype
    of_master: float = 2.5  # units, times sqrt(steps) * |master|
    of_update: float = 2.5 * 25  # units, times steps * lr
    of_exp_avg: float = 10.0  # units, times the largest |gradient|
    of_exp_avg_sq: float = 82.0  # units, times the largest gradient squared

    def master(self, steps: int, magnitude: float, lr: float, beta2: float, decay: float) -> float:
        """Of the master, where no |master| is above `magnitude`."""
        unit = UNIT[self.dtype]
        random = unit * (self.of_master * math.sqrt(steps) * magnitude + self.of_update * steps * lr)
        return random + steps * (rounding(decay, self.dtype) * magnitude + lr * self._bias(beta2) / 2)

    def exp_avg(self, largest: float) -> float:
        """Of exp_avg, where no |gradient| is above `largest`."""
        return self.of_exp_avg * UNIT[self.dtype] * largest

    def exp_avg_sq(self, largest: float, beta2: float) -> float:
        """Of exp_avg_sq."""
        return (self.of_exp_avg_sq * UNIT[self.dtype] + self._bias(beta2)) * largest**2

    def _bias(self, beta2: float) -> float:
        return rounding(beta2, self.dtype) / (1 - beta2)


@dataclass(frozen=True)
class SumTolerance:
    """Relative error: per term, and once per call."""

    per_term: float
    per_call: float

    def relative(self, num_terms: int, num_calls: int = 1) -> float:
        """Of the sum."""
        return num_terms * self.per_term + num_calls * self.per_call


ADAM = {
    torch.float32: AdamTolerance(torch.float32),
    torch.float64: AdamTolerance(torch.float64),
}
SUMSQ = {
    torch.float32: SumTolerance(per_term=UNIT[torch.float64], per_call=UNIT[torch.float32]),
    torch.float64: SumTolerance(per_term=UNIT[torch.float64], per_call=UNIT[torch.float64]),
}
