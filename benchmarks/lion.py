"""lion_ against Lion in torch's foreach calls, DeepSpeed's and bitsandbytes'."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
from torch import Tensor

from pyzero import ops

from . import peers
from .harness import Contender, check, compare
from .options import Options
from .rows import Row

_HYPER = dict(lr=peers.LR, beta1=0.9, beta2=0.99, weight_decay=peers.WEIGHT_DECAY)
_CHECKED_STEPS = 3
_BYTES = 20  # gradient, master and moment in; master, moment and weights out
# Per step three roundings of the weight, 2^-24 each; the sign is the same, for every step sees the same gradient.
_CHECK = dict(rtol=2**-22 * _CHECKED_STEPS, atol=peers.LR * 2**-18 * _CHECKED_STEPS)


class State:
    """Flat tensors for lion_: all (numel,)."""

    def __init__(self, weights: Tensor, grad: Tensor, param_out: Tensor | None = None) -> None:
        self.master = weights.float().clone()
        self.exp_avg = torch.zeros_like(self.master)
        self.grad = grad
        self.param_out = param_out

    def step(self, **kwargs: object) -> None:
        ops.lion_(self.master, self.exp_avg, self.grad, param_out=self.param_out, **_HYPER, **kwargs)


def run(options: Options) -> list[Row]:
    return _fp32(options) + _mixed(options)


def _fp32(options: Options) -> list[Row]:
    numel = options.size
    weights, grad = peers.normal(numel, 0, options), peers.normal(numel, 1, options, std=1e-2)
    contenders = _ours(State(weights, grad), options)
    for number, (name, (key, make)) in enumerate(peers.lion_peers(options).items()):
        with options.trying(name) if number else nullcontext():
            param, optimizer = make(weights, grad)
            for _ in range(_CHECKED_STEPS):
                optimizer.step()
            for backend in options.backends.values():
                fresh = State(weights, grad)
                for _ in range(_CHECKED_STEPS):
                    fresh.step(backend=backend)
                check(f"lion_ against {name}: master", fresh.master, param.detach(), **_CHECK)
            contenders.append(Contender(name, optimizer.step, _BYTES, key))
    return compare("lion", "fp32", numel, contenders, options)


def _mixed(options: Options) -> list[Row]:
    """bf16 gradient in, fp32 state, bf16 weights out."""
    numel = options.size
    weights, grad = peers.normal(numel, 0, options), peers.normal(numel, 1, options, std=1e-2).bfloat16()
    wide, state = State(weights, grad.float()), State(weights, grad, weights.bfloat16())
    wide.step()
    state.step()
    check("lion_ with a bf16 gradient against fp32: master", state.master, wide.master, rtol=0, atol=0)
    check("lion_: param_out", state.param_out, wide.master.bfloat16(), rtol=0, atol=0)
    return compare("lion", "bf16 grad, bf16 weights out", numel, _ours(state, options), options)


def _ours(state: State, options: Options) -> list[Contender]:
    """One per backend, over the same tensors."""
    return [
        Contender("pyzero lion_" + suffix, functools.partial(state.step, backend=backend), _BYTES)
        for suffix, backend in options.backends.items()
    ]
