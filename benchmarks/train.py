"""Forward, backward and step on two ranks over gloo: FusedZeroAdamW beside DDP with torch's fused AdamW.

One process per rank, one thread each on a CPU, so that what is compared is what each makes of the same cores and links.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pyzero

from .harness import Options, Row, quantile

_NUM_RANKS = 2
_LR = 1e-4
_LAYERS, _WIDTH, _ROWS = 16, 1024, 16
_PEER = "DDP, AdamW(fused), no masters"
_SAME = "DDP, AdamW(fused), fp32 masters by hand"  # the peer that does the same job: ours must reach its loss
_CHECKED_STEPS = 3
# Gradients are averaged in bf16 by one and in fp32 by the other: 2^-9 of each, and a loss over 16k outputs sees less.
_CHECK_RTOL = 2**-8


def run(options: Options) -> list[Row]:
    root = Path(__file__).resolve().parent.parent
    width = _WIDTH if options.numel is None else max(8, int((options.numel / _LAYERS) ** 0.5))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={_NUM_RANKS}", "-m"]
    command += [__name__, str(width), str(options.repeats)]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise AssertionError(f"the ranks failed:\n{done.stderr[-2000:]}")
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    medians = {name: quantile(samples, 0.5) for name, (samples, _) in found.items()}
    case = f"{_NUM_RANKS} ranks, {_LAYERS} x Linear({width}), bf16"
    return [
        Row(
            "train",
            case,
            f"{name}; {live:.0%} of gradients alive at a time",
            _LAYERS * width * (width + 1),
            medians[name],
            quantile(samples, 0.2),
            quantile(samples, 0.8),
            speedup=medians[_PEER] / medians[name],
        )
        for name, (samples, live) in found.items()
    ]


def _model(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(_LAYERS)]).bfloat16()


class _Masters:
    """fp32 masters of bf16 weights, by foreach copies either way."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights
        self.masters = [nn.Parameter(weight.detach().float()) for weight in weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=_LR, weight_decay=1e-2, fused=True)
        for master in self.masters:
            master.grad = torch.empty_like(master)

    @torch.no_grad()
    def step(self) -> None:
        grads = [weight.grad for weight in self.weights]
        torch._foreach_copy_([master.grad for master in self.masters], grads)
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.masters)

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None


def _step(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    loss: Tensor = model(x).float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _zero(width: int, in_groups: bool = False, **options: object) -> tuple[nn.Module, Any]:
    """in_groups: weights and biases in two groups, as for weight decay (here the same for both, to compare losses)."""
    model = _model(width)
    groups: Any = [{"params": [p for p in model.parameters() if p.dim() == dim]} for dim in (2, 1)]
    params = groups if in_groups else model.parameters()
    return model, pyzero.FusedZeroAdamW(params, lr=_LR, weight_decay=1e-2, **options)


def _ddp(width: int) -> tuple[nn.Module, Any]:
    model = DistributedDataParallel(_model(width), gradient_as_bucket_view=True)
    return model, torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=1e-2, fused=True)


def _ddp_masters(width: int) -> tuple[nn.Module, Any]:
    model = DistributedDataParallel(_model(width), gradient_as_bucket_view=True)
    return model, _Masters(list(model.parameters()))


_CONTENDERS: dict[str, Callable[[int], tuple[nn.Module, Any]]] = {
    "FusedZeroAdamW, stage 2": lambda width: _zero(width, stage=2),
    "FusedZeroAdamW, stage 2, two groups": lambda width: _zero(width, in_groups=True, stage=2),
    "FusedZeroAdamW, stage 1": lambda width: _zero(width, stage=1),
    "FusedZeroAdamW, stage 2, exact": lambda width: _zero(width, stage=2, transport="exact"),
    "FusedZeroAdamW, stage 2, collective": lambda width: _zero(width, stage=2, transport="collective"),
    _SAME: _ddp_masters,
    _PEER: _ddp,
}


def _live_gradients(model: nn.Module, optimizer: Any, x: Tensor) -> float:
    """The largest share of all gradients' bytes that one backward keeps at a time."""
    params = list(model.parameters())
    most = 0

    def count(param: Tensor) -> None:
        nonlocal most
        grads = [p.grad for p in params if p.grad is not None and not isinstance(p.grad, pyzero.ShardedGrad)]
        most = max(most, sum(grad.nbytes for grad in grads))

    handles = [param.register_post_accumulate_grad_hook(count) for param in params]
    _step(model, optimizer, x)
    for handle in handles:
        handle.remove()
    return most / sum(param.nbytes for param in params)


def _rank(width: int, repeats: int) -> None:
    dist.init_process_group("gloo")
    made = {name: make(width) for name, make in _CONTENDERS.items()}
    torch.manual_seed(1 + dist.get_rank())
    x = torch.randn(_ROWS, width).bfloat16()
    losses = {name: [float(_step(*pair, x)) for _ in range(_CHECKED_STEPS)][-1] for name, pair in made.items()}
    for name, loss in losses.items():
        if name != _PEER and abs(loss - losses[_SAME]) > _CHECK_RTOL * losses[_SAME]:
            raise AssertionError(f"{name} reached a loss of {loss}, which differs from the peer: {losses[_SAME]}")
    samples: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(repeats):
        for name, pair in made.items():
            dist.barrier()
            start = time.perf_counter()
            _step(*pair, x)
            samples[name].append(time.perf_counter() - start)
    live = {name: _live_gradients(*pair, x) for name, pair in made.items()}
    if dist.get_rank() == 0:
        print(json.dumps({name: (samples[name], live[name]) for name in made}))
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(int(sys.argv[1]), int(sys.argv[2]))
