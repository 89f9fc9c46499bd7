"""sgd_ with momentum against torch's fused and foreach SGD."""

from __future__ import annotations

from pyzero import ops

from . import peers
from .options import Options
from .rows import Row
from .rules import CHECKED_STEPS, OneMoment, run_one_moment

_HYPER = dict(lr=peers.LR, momentum=peers.MOMENTUM, weight_decay=peers.WEIGHT_DECAY)
# Each step rounds the weight once, by 2^-24. A step of lr times some 0.1 errs by far less than 2^-20 of that.
_CHECK = dict(rtol=2**-23 * CHECKED_STEPS, atol=peers.LR * 2**-20 * CHECKED_STEPS)


class State(OneMoment):
    """State for sgd_."""

    def step(self, **kwargs: object) -> None:
        ops.sgd_(self.master, self.moment, self.grad, **self.outputs, **_HYPER, **kwargs)


def run(options: Options) -> list[Row]:
    return run_one_moment("sgd_", State, peers.sgd_peers(options), _CHECK, options)
