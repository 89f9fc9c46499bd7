"""How far results may differ if equal bits are not promised: a table per op, by dtype, derived from rounding.

u is the unit roundoff: the relative error of a correctly rounded operation is at most u, 2^-24 in fp32, 2^-53 in fp64.

adam_ over S steps, against the same formula in fp64. Independent errors have random signs, so N of them add up like
sqrt(N) (a worst case would add up like N, but would not catch a wrong formula). The largest of some thousands is about
4 standard deviations. An error that is uniform within u has a standard deviation of u / sqrt(3). The factor is thus
4 / sqrt(3), taken as 2.5.
- The master is rounded once per step by at most u*|p|: 2.5 * sqrt(S) * u * |p|.
- exp_avg forgets with rate beta1, so that its last 1/(1 - beta1) = 10 errors count: sqrt(10) * u. For exp_avg_sq these
  are 1/(1 - beta2) = 1000: sqrt(1000) * u, and half of that in its square root. The quotient and its three scalars add
  at most 6 u. The update of a step, at most about lr, is off by (sqrt(10) + sqrt(1000) / 2 + 6) * u = 25 u of itself.
  Moments change slowly, so that these errors persist from step to step. Over S steps they add up like S:
  2.5 * 25 * u * S * lr.
- Constants that are rounded once err in the same direction at every step, by e(x) = |round(x) - x|, which is 0 in fp64.
  The decay factor shifts the master by S * e(decay) * |p|. beta2 shifts exp_avg_sq by e(beta2) / (1 - beta2) of itself,
  and the update by half of that. (beta1 has no such effect: exp_avg moves by a fraction of g - exp_avg.)
Two results in the same dtype, each with this error, may differ by sqrt(2) times as much.
exp_avg: sqrt(10) * 2.5 * u of the largest gradient, plus the rounding of g itself: 10 u.
exp_avg_sq: (sqrt(1000) * 2.5 + 3) * u = 82 u of the largest squared gradient, plus e(beta2) / (1 - beta2).

sumsq of n values: squares of fp32 are exact in fp64. A sum of positive terms in any order has a relative error of at
most (n - 1) * 2^-53. An fp32 result is rounded once more per call.
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
        """The error of the master, if no |master| exceeds `magnitude`."""
        unit = UNIT[self.dtype]
        random = unit * (self.of_master * math.sqrt(steps) * magnitude + self.of_update * steps * lr)
        return random + steps * (rounding(decay, self.dtype) * magnitude + lr * self._bias(beta2) / 2)

    def exp_avg(self, largest: float) -> float:
        """The error of exp_avg, if no |gradient| exceeds `largest`."""
        return self.of_exp_avg * UNIT[self.dtype] * largest

    def exp_avg_sq(self, largest: float, beta2: float) -> float:
        """The error of exp_avg_sq."""
        return (self.of_exp_avg_sq * UNIT[self.dtype] + self._bias(beta2)) * largest**2

    def _bias(self, beta2: float) -> float:
        return rounding(beta2, self.dtype) / (1 - beta2)


@dataclass(frozen=True)
class SumTolerance:
    """A relative error per term, and one per call."""

    per_term: float
    per_call: float

    def relative(self, num_terms: int, num_calls: int = 1) -> float:
        """The relative error of the sum."""
        return num_terms * self.per_term + num_calls * self.per_call


ADAM = {
    torch.float32: AdamTolerance(torch.float32),
    torch.float64: AdamTolerance(torch.float64),
}
SUMSQ = {
    torch.float32: SumTolerance(per_term=UNIT[torch.float64], per_call=UNIT[torch.float32]),
    torch.float64: SumTolerance(per_term=UNIT[torch.float64], per_call=UNIT[torch.float64]),
}
