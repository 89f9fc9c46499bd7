"""Backward of many small parameters on several ranks: the host time of hooks, beside DDP's in C++ and none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pyzero

from .harness import relative
from .options import Options
from .ranks import join, launch, leave
from .rows import Row, timed_row
from .timing import clock, in_turns

_WIDTH = 8
_NUM_PARAMS = 1000
_OURS, _STAGE_1, _DDP = "pyzero, stage 2", "pyzero, stage 1", "DDP"
PLAIN = "no hooks, nothing sent"
_CASES = ("a backward that sends", "a backward in no_sync()", "a second backward in no_sync()")
_PEER = "ddp"


def run(options: Options) -> list[Row]:
    num_params = _NUM_PARAMS if options.numel is None else max(2, options.numel // _WIDTH**2)
    spec = {"num_params": num_params, "repeats": options.repeats, "ddp": options.wants(_PEER)}
    found: dict[str, dict[str, list[float]]] = launch(__name__, options.ranks, spec)
    rows = []
    for case, samples in found.items():
        title = f"{options.ranks} ranks, {num_params} x Linear({_WIDTH}), {case}"
        numel = num_params * _WIDTH**2
        rows += relative(
            [
                timed_row("backward", title, name, times, numel, peer=_PEER if name == _DDP else None)
                for name, times in samples.items()
            ]
        )
    return rows


# ---- in a rank ------------------------------------------------------------------------------------------------------


class _Layers(nn.Module):
    """Many layers side by side, so that their gradients come one by one."""

    def __init__(self, num_params: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(num_params))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x).sum() for layer in self.layers]).sum()


@dataclass(frozen=True)
class _Contender:
    """A model, and what is done with its gradients."""

    model: nn.Module
    no_sync: Callable[[], AbstractContextManager[Any]]
    clear: Callable[[], None]
    mean: Callable[[Tensor], Tensor | None]  # a parameter's gradient, averaged over the ranks

    def sample(self, case: str, x: Tensor) -> float:
        """Return the seconds of the backward alone."""
        sends, is_second = case == _CASES[0], case == _CASES[2]
        with nullcontext() if sends else self.no_sync():
            if is_second:
                self.model(x).backward()
            loss = self.model(x)
            dist.barrier()
            elapsed = clock(loss.backward)
        self.clear()
        return elapsed


def _ours(num_params: int, stage: int) -> _Contender:
    model = _Layers(num_params)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=0.0, weight_decay=0.0, stage=stage)

    def clear() -> None:
        optimizer.step()  # stage 1 sends here
        optimizer.zero_grad()

    return _Contender(model, optimizer.no_sync, clear, optimizer.full_grad)


def _ddp(num_params: int) -> _Contender:
    model = DistributedDataParallel(_Layers(num_params), gradient_as_bucket_view=True)
    return _Contender(model, model.no_sync, model.zero_grad, lambda param: param.grad)


def _plain(num_params: int) -> _Contender:
    model = _Layers(num_params)
    return _Contender(model, nullcontext, model.zero_grad, lambda param: None)


def check(contenders: dict[str, _Contender], x: Tensor) -> None:
    """Raise AssertionError if a contender that sends has another mean than that of the ranks' inputs."""
    inputs = [x.new_full(x.shape, 1.0 + rank) for rank in range(dist.get_world_size())]
    wanted = torch.stack(inputs).mean(0).sum(0).expand(_WIDTH, -1)
    for name, one in contenders.items():
        one.model(x).backward()
        found = one.mean(next(one.model.parameters()))
        assert found is None or torch.equal(found, wanted), f"{name} has a wrong mean of the gradients"
        one.clear()


def _rank() -> None:
    spec, _ = join()
    num_params = spec["num_params"]
    contenders = {_OURS: _ours(num_params, 2), _STAGE_1: _ours(num_params, 1)}
    if spec["ddp"]:
        contenders[_DDP] = _ddp(num_params)
    contenders[PLAIN] = _plain(num_params)
    x = torch.full((2, _WIDTH), 1.0 + dist.get_rank())
    check(contenders, x)
    found = {}
    for case in _CASES:
        samplers = {name: (lambda of=of, case=case: of.sample(case, x)) for name, of in contenders.items()}
        found[case] = in_turns(samplers, spec["repeats"], case)
    leave(found)


if __name__ == "__main__":
    _rank()
