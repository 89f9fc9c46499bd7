"""The mixed-precision step (clip, check, fp32 masters, bf16 weights out) by ops and by optimizer, and host cost."""

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
_MAX_NORM = 1.0  # well below the gradients' norm: clipping is at work
_CHECKED_STEPS = 3
# As adam.CHECK, plus the norm: torch adds up squares in fp32, which moves the clip coefficient by some 2^-20. Adam's
# ratio hardly sees that, eps aside. A master on the edge between two bf16 values may round either way: one bf16 unit.
CHECK = dict(rtol=2**-22 * _CHECKED_STEPS, atol=LR * 2**-15 * _CHECKED_STEPS)
CHECK_BF16 = dict(rtol=2**-7, atol=LR)
CHECK_NORM = dict(rtol=2**-14, atol=0.0)
# What the job needs: bf16 gradients once for the norm and once for Adam, state and weights as in adam_.
_BYTES = 2 + 28
_NUM_SMALL, _SMALL_NUMEL = 1000, 64


class OpsStep:
    """The step in two passes: a check and norm that only reads, and adam_."""

    def __init__(self, weights: Tensor, grad: Tensor) -> None:
        self.state = State(weights, grad, weights.clone())
        self.found_inf = torch.zeros(1, device=weights.device)
        self.sumsq = torch.zeros(1, device=weights.device)
        self.norm = torch.zeros(1, device=weights.device)

    def step(self) -> None:
        self.found_inf.zero_()
        self.sumsq.zero_()
        ops.unscale_([self.state.grad], 1.0, found_inf=self.found_inf, sumsq=self.sumsq)
        self.norm = self.sumsq.sqrt()
        coefficient = (_MAX_NORM / (self.norm + 1e-6)).clamp_(max=1.0)
        self.state.step(grad_scale=coefficient.squeeze(), found_inf=self.found_inf)


def run(options: Options) -> list[Row]:
    numel = options.size(quick=16_000_000, full=50_000_000)
    weights = peers.normal(numel, 0, options).bfloat16()
    grad = peers.normal(numel, 1, options, std=1e-2).bfloat16()
    rows = _by_ops(weights, grad, options)
    rows += _by_optimizer(weights, grad, options)
    return rows + _host_cost(options)


def _mixed_peers(weights: Tensor, grad: Tensor, options: Options) -> dict[str, peers.MixedStep]:
    pieces = _split(weights.clone()), _split(grad)
    made = {
        "torch foreach, fused AdamW": peers.MixedStep(*pieces, _MAX_NORM, folded=False),
        "same, clip folded into AdamW": peers.MixedStep(_split(weights.clone()), pieces[1], _MAX_NORM, folded=True),
    }
    return made


def _by_ops(weights: Tensor, grad: Tensor, options: Options) -> list[Row]:
    ours = OpsStep(weights, grad)
    theirs = _mixed_peers(weights, grad, options)
    for _ in range(_CHECKED_STEPS):
        ours.step()
        for peer in theirs.values():
            peer.step()
    for name, peer in theirs.items():
        check(f"mixed step against {name}: norm", ours.norm.squeeze(), peer.norm, **CHECK_NORM)
        check(f"mixed step against {name}: masters", ours.state.master, _flat(peer.masters), **CHECK)
        check(f"mixed step against {name}: weights", ours.state.param_out, _flat(peer.weights), **CHECK_BF16)
    contenders = [Contender("pyzero unscale_, adam_", ours.step, _BYTES), *_contenders(theirs)]
    return compare(
        "step", f"ops, bf16, {_NUM_TENSORS} tensors", weights.numel(), contenders, options, peer=_first(theirs)
    )


def _by_optimizer(weights: Tensor, grad: Tensor, options: Options) -> list[Row]:
    params = [Parameter(piece) for piece in _split(weights.clone())]
    for param, piece in zip(params, _split(grad), strict=True):
        param.grad = piece
    optimizer = pyzero.FusedZeroAdamW(params, lr=LR, weight_decay=1e-2, max_grad_norm=_MAX_NORM)
    theirs = _mixed_peers(weights, grad, options)
    for _ in range(_CHECKED_STEPS):
        optimizer.step()
        for peer in theirs.values():
            peer.step()
    for name, peer in theirs.items():
        check(f"FusedZeroAdamW against {name}: norm", optimizer.grad_norm, peer.norm, **CHECK_NORM)
        check(f"FusedZeroAdamW against {name}: weights", _flat(params), _flat(peer.weights), **CHECK_BF16)
    contenders = [Contender("pyzero FusedZeroAdamW", optimizer.step, _BYTES), *_contenders(theirs)]
    case = f"optimizer, bf16, {_NUM_TENSORS} tensors"
    return compare("step", case, weights.numel(), contenders, options, peer=_first(theirs))


def _host_cost(options: Options) -> list[Row]:
    """Many small fp32 parameters on one rank: what remains is the time on the host."""
    numel = _NUM_SMALL * _SMALL_NUMEL
    weights, grad = peers.normal(numel, 0, options), peers.normal(numel, 1, options, std=1e-2)
    ours, theirs = ([Parameter(piece) for piece in weights.clone().split(_SMALL_NUMEL)] for _ in range(2))
    for params in (ours, theirs):
        for param, piece in zip(params, grad.clone().split(_SMALL_NUMEL), strict=True):
            param.grad = piece
    optimizer = pyzero.FusedZeroAdamW(ours, lr=LR, weight_decay=1e-2, max_grad_norm=_MAX_NORM)
    peer = peers.adamw(theirs)
    unclipped = grad.split(_SMALL_NUMEL)

    def torch_step() -> None:
        torch.nn.utils.clip_grad_norm_(theirs, _MAX_NORM, foreach=True)
        peer.step()

    for _ in range(_CHECKED_STEPS):
        optimizer.step()
        torch._foreach_copy_([param.grad for param in theirs], list(unclipped))  # torch clips in place
        torch_step()
    check("1,000 small parameters: weights", _flat(ours), _flat(theirs), **CHECK)
    contenders = [
        Contender("pyzero FusedZeroAdamW", optimizer.step),
        Contender("torch clip, fused AdamW", torch_step),
    ]
    case = f"{_NUM_SMALL} parameters x {_SMALL_NUMEL}, fp32"
    return compare("step", case, numel, contenders, options, peer="torch clip, fused AdamW", with_copy=False)


def _contenders(theirs: dict[str, peers.MixedStep]) -> list[Contender]:
    return [Contender(name, peer.step, _BYTES) for name, peer in theirs.items()]


def _first(theirs: dict[str, peers.MixedStep]) -> str:
    return next(iter(theirs))


def _split(flat: Tensor) -> list[Tensor]:
    return list(flat.tensor_split(_NUM_TENSORS))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
