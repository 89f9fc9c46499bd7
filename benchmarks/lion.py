"""lion_ against Lion in torch's foreach calls, DeepSpeed's and bitsandbytes'."""

from __future__ import annotations

from pyzero import ops

from . import peers
from .options import Options
from .rows import Row
from .rules import CHECKED_STEPS, OneMoment, run_one_moment

_HYPER = dict(lr=peers.LR, beta1=0.9, beta2=0.99, weight_decay=peers.WEIGHT_DECAY)
# Per step three roundings of the weight, 2^-24 each; the sign is the same, for every step sees the same gradient.
_CHECK = dict(rtol=2**-22 * CHECKED_STEPS, atol=peers.LR * 2**-18 * CHECKED_STEPS)


class State(OneMoment):
    """For lion_."""

    def step(self, **kwargs: object) -> None:
        ops.lion_(self.master, self.moment, self.grad, **self.outputs, **_HYPER, **kwargs)


def run(options: Options) -> list[Row]:
    return run_one_moment("lion_", State, peers.lion_peers(options), _CHECK, options)
