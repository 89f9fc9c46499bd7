"""The mixed-precision step (clip, check, fp32 masters, bf16 weights out) by ops and by optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import pyzero
from pyzero import ops

from . import peers
from .adam import State
from .harness import Contender, check, compare
from .options import Options
from .rows import Row

_NUM_TENSORS = 48
_TORCH = ("torch-fused", "torch-foreach")
MAX_NORM = 1.0  # well below the gradients' norm, so that clipping has an effect
CHECKED_STEPS = 3
# Like adam.CHECK, plus the norm: torch adds squares in fp32, which changes the clip coefficient by some 2^-20. Except
# for eps, Adam's ratio hardly depends on it. A master near the middle of two bf16 values may round either way: one bf16
# unit.
CHECK = dict(rtol=2**-22 * CHECKED_STEPS, atol=peers.LR * 2**-15 * CHECKED_STEPS)
CHECK_BF16 = dict(rtol=2**-7, atol=peers.LR)
CHECK_NORM = dict(rtol=2**-14, atol=0.0)
# The job reads bf16 gradients once for the norm and once for Adam; state and weights are as in adam_.
_BYTES = 2 + 28


class OpsStep:
    """The step in two passes: one that checks and takes the norm, and only reads; and adam_."""

    def __init__(self, weights: Tensor, grad: Tensor, backend: str = "auto") -> None:
        self.backend = backend
        self.state = State(weights, grad, weights.clone())
        self.found_inf = torch.zeros(1, device=weights.device)
        self.sumsq = torch.zeros(1, device=weights.device)
        self.norm = torch.zeros(1, device=weights.device)

    def step(self) -> None:
        self.found_inf.zero_()
        self.sumsq.zero_()
        ops.unscale_([self.state.grad], 1.0, found_inf=self.found_inf, sumsq=self.sumsq, backend=self.backend)
        self.norm = self.sumsq.sqrt()
        coefficient = (MAX_NORM / (self.norm + 1e-6)).clamp_(max=1.0)
        self.state.step(grad_scale=coefficient.squeeze(), found_inf=self.found_inf, backend=self.backend)


def run(options: Options) -> list[Row]:
    numel = options.size
    weights = peers.normal(numel, 0, options).bfloat16()
    grad = peers.normal(numel, 1, options, std=1e-2).bfloat16()
    return _by_ops(weights, grad, options) + _by_optimizer(weights, grad, options)


class Theirs:
    """The peers that run here, each after the checked steps."""

    def __init__(self, weights: Tensor, grad: Tensor, options: Options) -> None:
        self.made: dict[str, tuple[str, Any]] = {}
        for name, (key, make) in peers.mixed_peers(options, MAX_NORM).items():
            with options.trying(name) if key not in _TORCH else nullcontext():
                peer = make(peers.split(weights, _NUM_TENSORS), peers.split(grad, _NUM_TENSORS))
                for _ in range(CHECKED_STEPS):
                    peer.step()
                self.made[name] = key, peer

    def check(self, what: str, norm: Tensor, weights: Tensor, master: Tensor | None, options: Options) -> None:
        """Compare ours with each peer. If torch differs, ours is wrong. Any other library that differs is not timed."""
        for name, (key, peer) in list(self.made.items()):
            if key in _TORCH:
                check(f"{what} against {name}: norm", norm.squeeze(), peer.norm, **CHECK_NORM)
                check(f"{what} against {name}: weights", weights, flat(peer.weights), **CHECK_BF16)
                if master is not None:
                    check(f"{what} against {name}: masters", master, flat(peer.masters), **CHECK)
                continue
            del self.made[name]
            with options.trying(name):
                check(f"{what} against {name}: weights", weights, flat(peer.weights), **CHECK_BF16)
                self.made[name] = key, peer

    def contenders(self) -> list[Contender]:
        return [Contender(name, peer.step, _BYTES, key) for name, (key, peer) in self.made.items()]


def _by_ops(weights: Tensor, grad: Tensor, options: Options) -> list[Row]:
    ours = {suffix: OpsStep(weights, grad, backend) for suffix, backend in options.backends.items()}
    theirs = Theirs(weights, grad, options)
    for step in ours.values():
        for _ in range(CHECKED_STEPS):
            step.step()
        theirs.check("mixed step", step.norm, step.state.param_out, step.state.master, options)
    contenders = [Contender("pyzero unscale_, adam_" + suffix, step.step, _BYTES) for suffix, step in ours.items()]
    contenders += theirs.contenders()
    return compare("step", f"ops, bf16, {_NUM_TENSORS} tensors", weights.numel(), contenders, options)


def _by_optimizer(weights: Tensor, grad: Tensor, options: Options) -> list[Row]:
    theirs = Theirs(weights, grad, options)
    contenders = []
    for suffix, backend in options.backends.items():
        params = [Parameter(piece) for piece in peers.split(weights, _NUM_TENSORS)]
        for param, piece in zip(params, peers.split(grad, _NUM_TENSORS), strict=True):
            param.grad = piece
        hyper = dict(lr=peers.LR, weight_decay=peers.WEIGHT_DECAY, max_grad_norm=MAX_NORM)
        optimizer = pyzero.FusedZeroAdamW(params, backend=backend, **hyper)
        for _ in range(CHECKED_STEPS):
            optimizer.step()
        theirs.check("FusedZeroAdamW", optimizer.grad_norm, flat(params), None, options)
        contenders.append(Contender("pyzero FusedZeroAdamW" + suffix, optimizer.step, _BYTES))
    contenders += theirs.contenders()
    return compare("step", f"optimizer, bf16, {_NUM_TENSORS} tensors", weights.numel(), contenders, options)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
