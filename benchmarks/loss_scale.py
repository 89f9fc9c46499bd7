"""loss_scale_update_ against the function that torch.amp.GradScaler calls."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyzero import ops
from pyzero.ops.loss_scale import loss_scale_state

from .harness import Contender, check, compare
from .options import Options
from .rows import Row

_NUM_CALLS = 100  # timed together: one is too short
_INIT_SCALE = 2.0**16
_PEER = "torch _amp_update_scale_"


def run(options: Options) -> list[Row]:
    contenders = []
    for suffix, backend in options.backends.items():
        _check(options.device, backend)
        contenders.append(Contender("pyzero loss_scale_update_" + suffix, _ours(options.device, backend)))
    contenders.append(Contender(_PEER, _torch(options.device), peer="torch-fused"))
    case = f"{_NUM_CALLS} calls"
    return compare("loss_scale", case, _NUM_CALLS, contenders, options, with_copy=False)


def _ours(device: str, backend: str) -> Callable[[], None]:
    state, found_inf = loss_scale_state(_INIT_SCALE, 1, device), torch.zeros(1, device=device)

    def calls() -> None:
        for _ in range(_NUM_CALLS):
            ops.loss_scale_update_(state, found_inf, backend=backend)

    return calls


def _torch(device: str) -> Callable[[], None]:
    scale, tracker = torch.full((), _INIT_SCALE, device=device), torch.zeros((), dtype=torch.int32, device=device)
    found_inf = torch.zeros((), device=device)

    def calls() -> None:
        for _ in range(_NUM_CALLS):
            torch._amp_update_scale_(scale, tracker, found_inf, 2.0, 0.5, 2000)

    return calls


def _check(device: str, backend: str) -> None:
    """Compare scale and growth tracker after each of some steps, which include growth and backoff."""
    state = loss_scale_state(_INIT_SCALE, 1, device)
    scale, tracker = torch.full((), _INIT_SCALE, device=device), torch.zeros((), dtype=torch.int32, device=device)
    for overflow in (1, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1):
        found_inf = torch.full((), float(overflow), device=device)
        ops.loss_scale_update_(state, found_inf.reshape(1), growth_interval=3, backend=backend)
        torch._amp_update_scale_(scale, tracker, found_inf, 2.0, 0.5, 3)
        check("loss_scale_update_: scale, tracker", state[:2], torch.stack([scale, tracker.float()]), rtol=0, atol=0)
