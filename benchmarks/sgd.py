"""sgd_ with momentum against torch's fused and foreach SGD."""

from __future__ import annotations

import torch
from torch import Tensor

from pyzero import ops

from . import peers
from .harness import check, compare
from .options import Options
from .rows import Row
from .rules import apart, checked_peers, per_backend

_HYPER = dict(lr=peers.LR, momentum=peers.MOMENTUM, weight_decay=peers.WEIGHT_DECAY)
_CHECKED_STEPS = 3
_NUMS_GRADS = (100, 3000)  # each where it is
_BYTES = 20  # gradient, master and buffer in; master, buffer and weights out
# Per step a rounding of the weight, 2^-24; a step of lr times some 0.1 errs by far less than 2^-20 of that.
_CHECK = dict(rtol=2**-23 * _CHECKED_STEPS, atol=peers.LR * 2**-20 * _CHECKED_STEPS)


class State:
    """Flat tensors for sgd_: all (numel,)."""

    def __init__(self, weights: Tensor, grad: Tensor, param_out: Tensor | None = None, num_grads: int = 0) -> None:
        self.master = weights.float().clone()
        self.momentum_buffer = torch.zeros_like(self.master)
        self.grad: Tensor | list[Tensor] = grad
        self.offsets: list[int] | None = None
        self.param_out = param_out
        if num_grads:
            self.grad, self.offsets = apart(grad, num_grads)

    def step(self, **kwargs: object) -> None:
        tensors = (self.master, self.momentum_buffer, self.grad)
        ops.sgd_(*tensors, param_out=self.param_out, grad_offsets=self.offsets, **_HYPER, **kwargs)


def run(options: Options) -> list[Row]:
    return _fp32(options) + _mixed(options)


def _fp32(options: Options) -> list[Row]:
    numel = options.size
    weights, grad = peers.normal(numel, 0, options), peers.normal(numel, 1, options, std=1e-2)
    made = peers.sgd_peers(options)
    theirs = checked_peers("sgd_", made, weights, grad, State, _CHECKED_STEPS, _CHECK, _BYTES, options)
    return compare(
        "sgd", "fp32", numel, [*per_backend("pyzero sgd_", State(weights, grad), _BYTES, options), *theirs], options
    )


def _mixed(options: Options) -> list[Row]:
    """bf16 gradient in, fp32 state, bf16 weights out."""
    numel = options.size
    weights, grad = peers.normal(numel, 0, options), peers.normal(numel, 1, options, std=1e-2).bfloat16()
    wide = State(weights, grad.float())
    wide.step()
    made = {"pyzero sgd_": State(weights, grad, weights.bfloat16())}
    made |= {f"same, {num:,} gradients": State(weights, grad, weights.bfloat16(), num) for num in _NUMS_GRADS}
    for name, state in made.items():
        state.step()
        check(f"{name} with a bf16 gradient against fp32: master", state.master, wide.master, rtol=0, atol=0)
        check(f"{name}: param_out", state.param_out, wide.master.bfloat16(), rtol=0, atol=0)
    del wide
    contenders = [contender for name, state in made.items() for contender in per_backend(name, state, _BYTES, options)]
    return compare("sgd", "bf16 grad, bf16 weights out", numel, contenders, options)
