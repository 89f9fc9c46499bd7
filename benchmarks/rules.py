"""What the benches of update rules share: one contender per backend, and peers that are checked first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

from torch import Tensor

from pyzero.ops.backend import SEGMENT_GRANULE

from .harness import Contender, check
from .options import Options


class State(Protocol):
    """Flat tensors of one rule."""

    master: Tensor

    def step(self, **kwargs: object) -> None:
        """One call of the op."""


def apart(grad: Tensor, num_grads: int) -> tuple[list[Tensor], list[int]]:
    """A gradient in so many parts, each in memory of its own, and where they begin."""
    size = -(-grad.numel() // num_grads // SEGMENT_GRANULE) * SEGMENT_GRANULE
    return [part.clone() for part in grad.split(size)], list(range(0, grad.numel(), size))


def per_backend(name: str, state: State, num_bytes: int, options: Options) -> list[Contender]:
    """One per backend, over the same tensors. num_bytes: per element."""
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
    """Peers whose weights agree with every backend's after so many steps; ours must agree with the first, torch's."""
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
