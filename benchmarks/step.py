"""The mixed-precision step (clip, check, fp32 masters, bf16 weights out) by ops and by optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

import pyzero
from pyzero import ops

from . import peers
from .adam import LR, State
from .harness import Contender, Options, Row, check, compare

_NUM_TENSORS = 48
MAX_NORM = 1.0  # well below the gradients' norm: clipping is at work
CHECKED_STEPS = 3
# As adam.CHECK, plus the norm: torch adds up squares in fp32, which moves the clip coefficient by some 2^-20. Adam's
# ratio hardly sees that, eps aside. A master on the edge between two bf16 values may round either way: one bf16 unit.
CHECK = dict(rtol=2**-22 * CHECKED_STEPS, atol=LR * 2**-15 * CHECKED_STEPS)
CHECK_BF16 = dict(rtol=2**-7, atol=LR)
CHECK_NORM = dict(rtol=2**-14, atol=0.0)
# What the job needs: bf16 gradients once for the norm and once for Adam, state and weights as in adam_.
_BYTES = 2 + 28


class OpsStep:
    """The step in two passes: a check and norm that only reads, and adam_."""

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


def _mixed_peers(weights: Tensor, grad: Tensor, options: Options) -> dict[str, peers.MixedStep]:
    pieces = peers.split(weights, _NUM_TENSORS), peers.split(grad, _NUM_TENSORS)
    made = {
        "torch foreach, fused AdamW": peers.MixedStep(*pieces, MAX_NORM, folded=False),
        "same, clip folded into AdamW": peers.MixedStep(
            peers.split(weights, _NUM_TENSORS), pieces[1], MAX_NORM, folded=True
        ),
    }
    return made


def _by_ops(weights: Tensor, grad: Tensor, options: Options) -> list[Row]:
    ours = {suffix: OpsStep(weights, grad, backend) for suffix, backend in options.backends.items()}
    theirs = _mixed_peers(weights, grad, options)
    for _ in range(CHECKED_STEPS):
        for contender in (*ours.values(), *theirs.values()):
            contender.step()
    for step in ours.values():
        for name, peer in theirs.items():
            check(f"mixed step against {name}: norm", step.norm.squeeze(), peer.norm, **CHECK_NORM)
            check(f"mixed step against {name}: masters", step.state.master, flat(peer.masters), **CHECK)
            check(f"mixed step against {name}: weights", step.state.param_out, flat(peer.weights), **CHECK_BF16)
    contenders = [Contender("pyzero unscale_, adam_" + suffix, step.step, _BYTES) for suffix, step in ours.items()]
    contenders += _contenders(theirs)
    case = f"ops, bf16, {_NUM_TENSORS} tensors"
    return compare("step", case, weights.numel(), contenders, options, peer=_first(theirs))


def _by_optimizer(weights: Tensor, grad: Tensor, options: Options) -> list[Row]:
    theirs = _mixed_peers(weights, grad, options)
    for peer in theirs.values():
        for _ in range(CHECKED_STEPS):
            peer.step()
    contenders = []
    for suffix, backend in options.backends.items():
        params = [Parameter(piece) for piece in peers.split(weights, _NUM_TENSORS)]
        for param, piece in zip(params, peers.split(grad, _NUM_TENSORS), strict=True):
            param.grad = piece
        optimizer = pyzero.FusedZeroAdamW(params, lr=LR, weight_decay=1e-2, max_grad_norm=MAX_NORM, backend=backend)
        for _ in range(CHECKED_STEPS):
            optimizer.step()
        for name, peer in theirs.items():
            check(f"FusedZeroAdamW against {name}: norm", optimizer.grad_norm, peer.norm, **CHECK_NORM)
            check(f"FusedZeroAdamW against {name}: weights", flat(params), flat(peer.weights), **CHECK_BF16)
        contenders.append(Contender("pyzero FusedZeroAdamW" + suffix, optimizer.step, _BYTES))
    contenders += _contenders(theirs)
    case = f"optimizer, bf16, {_NUM_TENSORS} tensors"
    return compare("step", case, weights.numel(), contenders, options, peer=_first(theirs))


def _contenders(theirs: dict[str, peers.MixedStep]) -> list[Contender]:
    return [Contender(name, peer.step, _BYTES) for name, peer in theirs.items()]


def _first(theirs: dict[str, peers.MixedStep]) -> str:
    return next(iter(theirs))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
