"""Shared by the benches of update rules: one contender per backend, and peers that are checked before timing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from pyzero.ops.backend import SEGMENT_GRANULE
from pyzero.ops.rounding import ceil_div, round_up

from . import peers
from .harness import Contender, check, compare
from .options import Options
from .rows import Row

CHECKED_STEPS = 3
NUMS_GRADS = (100, 3000)  # tensors that the gradient is split into
_MOMENT_BYTES = 20  # gradient, master and moment in; master, moment and weights out


class State(Protocol):
    """Flat tensors of one rule."""

    master: Tensor

    def step(self, **kwargs: object) -> None:
        """One call of the op."""


class OneMoment:
    """Flat tensors of a rule with one moment: all (numel,). A subclass calls the op in `step`."""

    def __init__(self, weights: Tensor, grad: Tensor, param_out: Tensor | None = None, num_grads: int = 0) -> None:
        self.master = weights.float().clone()
        self.moment = torch.zeros_like(self.master)
        self.grad: Tensor | list[Tensor] = grad
        self.outputs: dict[str, Any] = {"param_out": param_out}
        if num_grads:
            self.grad, self.outputs["grad_offsets"] = apart(grad, num_grads)

    def step(self, **kwargs: object) -> None:
        """One call of the op."""
        raise NotImplementedError


def run_one_moment(
    op: str,
    state: type[OneMoment],
    made_peers: Mapping[str, tuple[str, Callable[..., Any]]],
    tolerance: Mapping[str, float],
    options: Options,
) -> list[Row]:
    """Time fp32 beside peers, then bf16 gradients, whole and in parts, with bf16 weights out, checked against fp32."""
    numel, bench, name = options.size, op.removesuffix("_"), f"pyzero {op}"
    weights, grad = peers.normal(numel, 0, options), peers.normal(numel, 1, options, std=1e-2)
    grad.masked_fill_(grad == 0, 1e-2)  # DeepSpeed's Lion takes 1 or -1 as the sign of 0: two such of 16M would differ
    theirs = checked_peers(op, made_peers, weights, grad, state, CHECKED_STEPS, tolerance, _MOMENT_BYTES, options)
    ours = per_backend(name, state(weights, grad), _MOMENT_BYTES, options)
    found = compare(bench, "fp32", numel, [*ours, *theirs], options)
    del ours, theirs

    grad = grad.bfloat16()
    wide = state(weights, grad.float())
    wide.step()
    made = {name: state(weights, grad, weights.bfloat16())}
    made |= {f"same, {num:,} gradients": state(weights, grad, weights.bfloat16(), num) for num in NUMS_GRADS}
    contenders = []
    for name, one in made.items():
        one.step()
        check(f"{name} with a bf16 gradient against fp32: master", one.master, wide.master, rtol=0, atol=0)
        check(f"{name}: param_out", one.outputs["param_out"], wide.master.bfloat16(), rtol=0, atol=0)
        contenders += per_backend(name, one, _MOMENT_BYTES, options)
    del wide
    return found + compare(bench, "bf16 grad, bf16 weights out", numel, contenders, options)


def apart(grad: Tensor, num_grads: int) -> tuple[list[Tensor], list[int]]:
    """The parts of a gradient, each in memory of its own, and the offsets where they begin."""
    size = round_up(ceil_div(grad.numel(), num_grads), SEGMENT_GRANULE)
    return [part.clone() for part in grad.split(size)], list(range(0, grad.numel(), size))


def per_backend(name: str, state: State, num_bytes: int, options: Options) -> list[Contender]:
    """One contender per backend, over the same tensors. num_bytes: bytes per element."""
    return [
        Contender(name + suffix, functools.partial(state.step, backend=backend), num_bytes)
        for suffix, backend in options.backends.items()
    ]


def checked_peers(
    op: str,
    made: Mapping[str, tuple[str, Callable[..., Any]]],
    weights: Tensor,
    grad: Tensor,
    make: Callable[[Tensor, Tensor], State],
    num_steps: int,
    tolerance: Mapping[str, float],
    num_bytes: int,
    options: Options,
) -> list[Contender]:
    """Peers whose weights agree with every backend's after `num_steps`. Ours must agree with the first peer."""
    theirs = []
    for number, (name, (key, make_peer)) in enumerate(made.items()):
        with options.trying(name) if number else nullcontext():
            param, optimizer = make_peer(weights, grad)
            for _ in range(num_steps):
                optimizer.step()
            for backend in options.backends.values():
                fresh = make(weights, grad)
                for _ in range(num_steps):
                    fresh.step(backend=backend)
                check(f"{op} against {name}: master", fresh.master, param.detach(), **tolerance)
            theirs.append(Contender(name, optimizer.step, num_bytes, key))
    return theirs
