"""step_scalars_ against the torch operations that it replaces, each of which is a launch of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyzero import ops
from pyzero.ops.step_scalars import NUM_SCALARS, STATS_COLUMNS

from .harness import Contender, check, compare
from .options import Options
from .rows import Row

_NUM_CALLS = 100  # timed together: one is too short
_NUM_ROWS, _NUM_PARAMS = 8, 1000
_MAX_NORM = 1.0
_PEER = "torch, one operation at a time"


def run(options: Options) -> list[Row]:
    contenders = []
    for suffix, backend in options.backends.items():
        _check(options.device, backend)
        contenders.append(Contender("pyzero step_scalars_" + suffix, _calls(_ours(options.device, backend)[0])))
    contenders.append(Contender(_PEER, _calls(_torch(options.device)[0]), peer="torch-foreach"))
    case = f"{_NUM_CALLS} calls, {_NUM_ROWS} rows, {_NUM_PARAMS} parameters"
    return compare("step_scalars", case, _NUM_CALLS, contenders, options, with_copy=False)


def _calls(call: Callable[[], Tensor]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(_NUM_CALLS):
            call()

    return calls


def _inputs(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics, 1 / loss scale, step counts, and which parameters have a gradient."""
    stats = torch.zeros(_NUM_ROWS, STATS_COLUMNS, dtype=torch.float64, device=device)
    stats[:, 1] = torch.arange(1, _NUM_ROWS + 1, device=device)
    used = (torch.arange(_NUM_PARAMS, device=device) % 3 != 0).float()
    return stats, torch.full((), 0.5, device=device), torch.zeros(_NUM_PARAMS, device=device), used


def _ours(device: str, backend: str) -> tuple[Callable[[], Tensor], Tensor]:
    stats, unscale, steps, used = _inputs(device)
    out = torch.empty(NUM_SCALARS, device=device)

    def call() -> Tensor:
        ops.step_scalars_(out, stats, steps=steps, used=used, max_norm=_MAX_NORM, unscale=unscale, backend=backend)
        return out

    return call, steps


def _torch(device: str) -> tuple[Callable[[], Tensor], Tensor]:
    stats, unscale, steps, used = _inputs(device)

    def call() -> Tensor:
        found = (stats[:, 0] != 0).any().float()
        norm = (stats[:, 1].sum().sqrt() * unscale).float()
        clip = (_MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        steps.add_(used * (1.0 - found))
        return torch.stack([found, norm, clip, clip * unscale])

    return call, steps


def _check(device: str, backend: str) -> None:
    (ours, our_steps), (theirs, their_steps) = _ours(device, backend), _torch(device)
    for _ in range(3):
        check("step_scalars_: scalars", ours(), theirs(), rtol=2**-23, atol=0)
    check("step_scalars_: steps", our_steps, their_steps, rtol=0, atol=0)
