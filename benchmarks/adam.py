"""adam_ against torch.optim.AdamW(fused=True), and the forms that torch has no peer for."""

from __future__ import annotations

import torch
from torch import Tensor

from pyzero import ops

from . import peers
from .harness import Contender, Options, Row, check, compare

LR = 1e-3
HYPER = dict(lr=LR, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2, decoupled_weight_decay=True)
_CHECKED_STEPS = 3
# Per step some 8 roundings of the update, each 2^-24 of at most lr (the bias-corrected ratio is at most about 1 here),
# and one of the weight itself.
CHECK = dict(rtol=2**-22 * _CHECKED_STEPS, atol=LR * 2**-18 * _CHECKED_STEPS)


class State:
    """Flat tensors for adam_: all (numel,)."""

    def __init__(self, weights: Tensor, grad: Tensor, param_out: Tensor | None = None) -> None:
        self.master = weights.float().clone()
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        self.grad = grad
        self.param_out = param_out
        self.num_steps = 0

    def step(self, **kwargs: object) -> None:
        self.num_steps += 1
        ops.adam_(
            self.master,
            self.exp_avg,
            self.exp_avg_sq,
            self.grad,
            param_out=self.param_out,
            step=self.num_steps,
            **HYPER,
            **kwargs,
        )


def run(options: Options) -> list[Row]:
    rows = _fp32(options)
    return rows + _mixed(options)


def _fp32(options: Options) -> list[Row]:
    numel = options.size(quick=16_000_000, full=50_000_000)
    weights, grad = peers.normal(numel, 0, options), peers.normal(numel, 1, options, std=1e-2)
    ours = State(weights, grad)
    contenders = [Contender("pyzero adam_", ours.step, 28)]
    for name, make in peers.adamw_peers(options).items():
        param, optimizer = make(weights, grad)
        fresh = State(weights, grad)
        for _ in range(_CHECKED_STEPS):
            fresh.step()
            optimizer.step()
        check(f"adam_ against {name}: master", fresh.master, param.detach(), **CHECK)
        contenders.append(Contender(name, optimizer.step, 28))
    return compare("adam", "fp32", numel, contenders, options, peer=contenders[1].name)


def _mixed(options: Options) -> list[Row]:
    """bf16 gradient in, fp32 state, bf16 weights out: one pass; 28 B per element too."""
    numel = options.size(quick=16_000_000, full=50_000_000)
    weights, grad = peers.normal(numel, 0, options), peers.normal(numel, 1, options, std=1e-2).bfloat16()
    ours = State(weights, grad, weights.bfloat16())
    wide = State(weights, grad.float())
    ours.step()
    wide.step()
    check("adam_ with a bf16 gradient against fp32: master", ours.master, wide.master, rtol=0, atol=0)
    check("adam_ param_out", ours.param_out, wide.master.bfloat16(), rtol=0, atol=0)
    contenders = [Contender("pyzero adam_", ours.step, 28)]
    return compare("adam", "bf16 grad, bf16 weights out", numel, contenders, options)
