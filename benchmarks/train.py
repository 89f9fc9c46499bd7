"""Forward, backward and step on two ranks of one host: FusedZeroAdamW beside DDP, FSDP2, and DeepSpeed if installed.

What an iteration takes beyond forward and backward alone is communication and step: rows of their own compare that.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import pyzero

from .harness import Options, Row, quantile
from .ranks import NUM_RANKS, launch

_LR = 1e-4
_LAYERS, _WIDTH, _ROWS = 16, 1024, 16
_PEER = "DDP, AdamW(fused), no masters"
_FSDP = "FSDP2, AdamW(fused), no masters, summed in fp32"
_DEEPSPEED = "DeepSpeed ZeRO-2, AdamW(fused)"
_COMPUTE = "forward and backward alone"
_OTHER_LOSS = (_PEER, _FSDP, _COMPUTE)  # no masters, no step
_NOT_COUNTED = (_FSDP, _DEEPSPEED, _COMPUTE)  # gradients are not in .grad, or nobody frees them
_SAME = "DDP, AdamW(fused), fp32 masters by hand"  # the peer that does the same job: ours must reach its loss
_CHECKED_STEPS = 3
# Gradients are averaged in bf16 by one and in fp32 by the other: 2^-9 of each, and a loss over 16k outputs sees less.
_CHECK_RTOL = 2**-8


def run(options: Options) -> list[Row]:
    width = _WIDTH if options.numel is None else max(8, int((options.numel / _LAYERS) ** 0.5))
    found = launch(__name__, width, options.repeats)
    case = f"{NUM_RANKS} ranks, {_LAYERS} x Linear({width}), bf16"
    compute = found[_COMPUTE][0]
    beyond = {name: [a - b for a, b in zip(samples, compute, strict=True)] for name, (samples, _) in found.items()}
    del beyond[_COMPUTE]
    names = {
        name: name if live is None else f"{name}; {live:.0%} of gradients alive at a time"
        for name, (_, live) in found.items()
    }
    numel = _LAYERS * width * (width + 1)
    rows = _rows(case, numel, {names[name]: samples for name, (samples, _) in found.items()}, names[_PEER])
    return rows + _rows(f"{case}, beyond compute", numel, beyond, _PEER)


def _rows(case: str, numel: int, samples: dict[str, list[float]], peer: str) -> list[Row]:
    medians = {name: quantile(times, 0.5) for name, times in samples.items()}
    return [
        Row(
            "train",
            case,
            name,
            numel,
            medians[name],
            quantile(times, 0.2),
            quantile(times, 0.8),
            speedup=medians[peer] / medians[name],
        )
        for name, times in samples.items()
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


class _Loop:
    """An iteration of a plain training loop."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model = model
        self.optimizer = optimizer

    def step(self, x: Tensor) -> Tensor:
        loss: Tensor = self.model(x).float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class _Compute(_Loop):
    """Forward and backward, and nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__(_model(width), None)

    def step(self, x: Tensor) -> Tensor:
        loss: Tensor = self.model(x).float().square().mean()
        loss.backward()
        self.model.zero_grad()
        return loss.detach()


class _DeepSpeed(_Loop):
    """ZeRO-2 in bf16 with torch's fused AdamW: DeepSpeed's own is to be compiled, and none is on a CPU without it."""

    def __init__(self, width: int) -> None:
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": _ROWS,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        }
        model = _model(width)
        engine, *_ = deepspeed.initialize(model=model, optimizer=_adamw(model), config=config)
        super().__init__(engine, None)

    def step(self, x: Tensor) -> Tensor:
        loss: Tensor = self.model(x).float().square().mean()
        self.model.backward(loss)
        self.model.step()
        return loss.detach()


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=1e-2, fused=True)


def _zero(width: int, in_groups: bool = False, **options: object) -> _Loop:
    """in_groups: weights and biases in two groups, as for weight decay (here the same for both, to compare losses)."""
    model = _model(width)
    groups: Any = [{"params": [p for p in model.parameters() if p.dim() == dim]} for dim in (2, 1)]
    params = groups if in_groups else model.parameters()
    return _Loop(model, pyzero.FusedZeroAdamW(params, lr=_LR, weight_decay=1e-2, **options))


def _ddp(width: int) -> _Loop:
    model = DistributedDataParallel(_model(width), gradient_as_bucket_view=True)
    return _Loop(model, _adamw(model))


def _ddp_masters(width: int) -> _Loop:
    model = DistributedDataParallel(_model(width), gradient_as_bucket_view=True)
    return _Loop(model, _Masters(list(model.parameters())))


def _fsdp(width: int) -> _Loop:
    """Layer by layer, weights kept from forward to backward, summed in fp32: what ZeRO-2 sends."""
    model = _model(width)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model, model):
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return _Loop(model, _adamw(model))


_CONTENDERS: dict[str, Callable[[int], _Loop]] = {
    "FusedZeroAdamW, stage 2": lambda width: _zero(width, stage=2),
    "FusedZeroAdamW, stage 2, two groups": lambda width: _zero(width, in_groups=True, stage=2),
    "FusedZeroAdamW, stage 1": lambda width: _zero(width, stage=1),
    "FusedZeroAdamW, stage 2, exact": lambda width: _zero(width, stage=2, transport="exact"),
    "FusedZeroAdamW, stage 2, collective": lambda width: _zero(width, stage=2, transport="collective"),
    _SAME: _ddp_masters,
    _PEER: _ddp,
    _FSDP: _fsdp,
    _COMPUTE: _Compute,
}
if importlib.util.find_spec("deepspeed") is not None:
    _CONTENDERS[_DEEPSPEED] = _DeepSpeed


def _live_gradients(loop: _Loop, x: Tensor) -> float:
    """The largest share of all gradients' bytes that one backward keeps at a time."""
    params = list(loop.model.parameters())
    most = 0

    def count(param: Tensor) -> None:
        nonlocal most
        grads = [p.grad for p in params if p.grad is not None and not isinstance(p.grad, pyzero.ShardedGrad)]
        most = max(most, sum(grad.nbytes for grad in grads))

    handles = [param.register_post_accumulate_grad_hook(count) for param in params]
    loop.step(x)
    for handle in handles:
        handle.remove()
    return most / sum(param.nbytes for param in params)


def _rank(width: int, repeats: int) -> None:
    dist.init_process_group("gloo")
    loops = {name: make(width) for name, make in _CONTENDERS.items()}
    torch.manual_seed(1 + dist.get_rank())
    x = torch.randn(_ROWS, width).bfloat16()
    losses = {name: [float(loop.step(x)) for _ in range(_CHECKED_STEPS)][-1] for name, loop in loops.items()}
    for name, loss in losses.items():
        if name not in _OTHER_LOSS and abs(loss - losses[_SAME]) > _CHECK_RTOL * losses[_SAME]:
            raise AssertionError(f"{name} reached a loss of {loss}, which differs from the peer: {losses[_SAME]}")
    samples: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(repeats):
        for name, loop in loops.items():
            dist.barrier()
            start = time.perf_counter()
            loop.step(x)
            samples[name].append(time.perf_counter() - start)
    live = {name: None if name in _NOT_COUNTED else _live_gradients(loop, x) for name, loop in loops.items()}
    if dist.get_rank() == 0:
        print(json.dumps({name: (samples[name], live[name]) for name in loops}))
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(int(sys.argv[1]), int(sys.argv[2]))
