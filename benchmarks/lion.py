"""lion_ against Lion written in torch's foreach calls, DeepSpeed's Lion and bitsandbytes'."""

from __future__ import annotations

from pyzero import ops

from . import peers
from .options import Options
from .rows import Row
from .rules import CHECKED_STEPS, OneMoment, run_one_moment

_HYPER = dict(lr=peers.LR, beta1=peers.LION_BETAS[0], beta2=peers.LION_BETAS[1], weight_decay=peers.WEIGHT_DECAY)
# Each step rounds the weight three times, by 2^-24. The sign is the same, because every step sees the same gradient.
_CHECK = dict(rtol=2**-22 * CHECKED_STEPS, atol=peers.LR * 2**-18 * CHECKED_STEPS)


class State(OneMoment):
    """State for lion_."""

    def step(self, **kwargs: object) -> None:
        ops.lion_(self.master, self.moment, self.grad, **self.outputs, **_HYPER, **kwargs)


def run(options: Options) -> list[Row]:
    return run_one_moment("lion_", State, peers.lion_peers(options), _CHECK, options)
