"""adam_ against torch.optim.AdamW(fused=True), and variants for which torch has no peer."""

from __future__ import annotations

import torch
from torch import Tensor

from pyzero import ops
from pyzero.ops.backend import SEGMENT_GRANULE
from pyzero.ops.rounding import ceil_div

from . import peers
from .harness import check, compare
from .options import Options
from .peers import LR, WEIGHT_DECAY
from .rows import Row
from .rules import CHECKED_STEPS, NUMS_GRADS, apart, checked_peers, per_backend

HYPER = dict(lr=LR, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=WEIGHT_DECAY, decoupled_weight_decay=True)
_NUM_SEGMENTS = 16
_NUM_OUTS = 4  # like an update that writes its weights to 4 ranks
_BYTES = 28  # gradient, master and moments in; master, moments and weights out
# Each step rounds the update some 8 times, by 2^-24 of at most lr (the bias-corrected ratio is at most about 1 here),
# and the weight once.
CHECK = dict(rtol=2**-22 * CHECKED_STEPS, atol=LR * 2**-18 * CHECKED_STEPS)


class State:
    """Flat tensors for adam_: all (numel,)."""

    def __init__(
        self,
        weights: Tensor,
        grad: Tensor,
        param_out: Tensor | list[Tensor] | None = None,
        segment_ids: Tensor | None = None,
        num_grads: int = 0,
    ) -> None:
        self.master = weights.float().clone()
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        self.grad: Tensor | list[Tensor] = grad
        self.offsets: list[int] | None = None
        self.param_out = param_out
        self.num_bytes = _BYTES + (2 * (len(param_out) - 1) if isinstance(param_out, list) else 0)  # per element
        self.num_steps = 0
        self.segments: dict[str, Tensor] = {}
        if segment_ids is not None:
            self.counts = torch.zeros(_NUM_SEGMENTS, device=weights.device)
            self.segments = {"segment_ids": segment_ids, "active": torch.ones_like(self.counts)}
        if num_grads:
            self.grad, self.offsets = apart(grad, num_grads)

    def step(self, **kwargs: object) -> None:
        self.num_steps += 1
        if self.segments:
            self.counts += 1
        ops.adam_(
            self.master,
            self.exp_avg,
            self.exp_avg_sq,
            self.grad,
            param_out=self.param_out,
            grad_offsets=self.offsets,
            step=self.counts if self.segments else self.num_steps,
            **self.segments,
            **HYPER,
            **kwargs,
        )


def run(options: Options) -> list[Row]:
    return _fp32(options) + _mixed(options)


def _fp32(options: Options) -> list[Row]:
    numel = options.size
    weights, grad = peers.normal(numel, 0, options), peers.normal(numel, 1, options, std=1e-2)
    ours = per_backend("pyzero adam_", State(weights, grad), _BYTES, options)
    made = peers.adamw_peers(options)
    theirs = checked_peers("adam_", made, weights, grad, State, CHECKED_STEPS, CHECK, _BYTES, options)
    return compare("adam", "fp32", numel, [*ours, *theirs], options)


def _mixed(options: Options) -> list[Row]:
    """bf16 gradient in, fp32 state, bf16 weights out, in one pass. The optimizer calls it with segments."""
    numel = options.size
    weights, grad = peers.normal(numel, 0, options), peers.normal(numel, 1, options, std=1e-2).bfloat16()
    granules = torch.arange(ceil_div(numel, SEGMENT_GRANULE), device=weights.device)
    segment_ids = (granules * _NUM_SEGMENTS // len(granules)).to(torch.int32)
    wide = State(weights, grad.float())
    wide.step()
    made = {
        "pyzero adam_": State(weights, grad, weights.bfloat16()),
        f"same, {_NUM_SEGMENTS} segments": State(weights, grad, weights.bfloat16(), segment_ids),
    }
    outs = [weights.bfloat16() for _ in range(_NUM_OUTS)]
    made[f"same, weights to {_NUM_OUTS} buffers"] = State(weights, grad, outs)
    made |= {f"same, {num:,} gradients": State(weights, grad, weights.bfloat16(), num_grads=num) for num in NUMS_GRADS}
    for name, state in made.items():
        state.step()
        check(f"{name} with a bf16 gradient against fp32: master", state.master, wide.master, rtol=0, atol=0)
        for out in state.param_out if isinstance(state.param_out, list) else [state.param_out]:
            check(f"{name}: param_out", out, wide.master.bfloat16(), rtol=0, atol=0)
    del wide
    contenders = [
        contender for name, state in made.items() for contender in per_backend(name, state, state.num_bytes, options)
    ]
    return compare("adam", "bf16 grad, bf16 weights out", numel, contenders, options)
