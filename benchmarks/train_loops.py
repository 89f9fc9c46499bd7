"""A training iteration with FusedZeroAdamW and with its peers, on any number of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import pyzero

from .workloads import Workload

_LR, _WEIGHT_DECAY = 1e-4, 1e-2
Mark = Callable[[str], None]


class Marks:
    """Records when the phases of an iteration end. On a GPU it records events, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, phase: str) -> None:
        self._ends.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """The seconds of each phase."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        pairs = zip(self._ends, self._ends[1:], strict=False)
        return {
            name: end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3
            for (_, start), (name, end) in pairs
        }


class Loop:
    """One iteration of a plain training loop."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model = model
        self.optimizer = optimizer

    def step(self, x: Tensor, mark: Mark = lambda phase: None) -> Tensor:
        loss: Tensor = self.model(x)
        mark("forward")
        self._backward(loss)
        mark("backward")
        self._update()
        mark("step")
        return loss.detach()

    def weights(self) -> Tensor:
        """All weights in one flat tensor. Sharded weights are gathered from all ranks."""
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        return torch.cat([weight.detach().flatten() for weight in whole])

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class _Compute(Loop):
    """Forward and backward only."""

    def _update(self) -> None:
        self.model.zero_grad()


class _Masters:
    """fp32 masters of bf16 weights, copied in both directions by foreach calls."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights
        self.masters = [nn.Parameter(weight.detach().float()) for weight in weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=_LR, weight_decay=_WEIGHT_DECAY, fused=True)
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


class _DeepSpeed(Loop):
    """ZeRO-2 in bf16 with torch's fused AdamW: DeepSpeed's own, on a CPU too, must first be compiled."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,  # it scales nothing
            "gradient_clipping": 0.0,  # since 0.19 its default is to clip to 1.0; no other contender clips
            "bf16": {"enabled": True},
            # The fastest of those tried on CPUs; docs/experiments.md has the others
            "zero_optimization": {"stage": 2, "contiguous_gradients": False, "reduce_bucket_size": 10_000_000},
            "zero_allow_untested_optimizer": True,
        }
        model = make_model(workload, device)
        engine, *_ = deepspeed.initialize(model=model, optimizer=_adamw(model), config=config)
        super().__init__(engine, None)

    def _backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def _update(self) -> None:
        self.model.step()


def make_model(workload: Workload, device: torch.device) -> Any:
    """A workload's Model in bf16, the same on all ranks."""
    torch.manual_seed(0)
    return workload.model().to(device, torch.bfloat16)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=_WEIGHT_DECAY, fused=True)


def _zero(workload: Workload, device: torch.device, in_groups: bool = False, **options: object) -> Loop:
    """in_groups: weights and biases in two groups, as for weight decay (here the same for both, to compare weights)."""
    model = make_model(workload, device)
    groups: Any = [{"params": [p for p in model.parameters() if p.dim() == dim]} for dim in (2, 1)]
    params = groups if in_groups else model.parameters()
    return Loop(model, pyzero.FusedZeroAdamW(params, lr=_LR, weight_decay=_WEIGHT_DECAY, **options))


def _ddp(workload: Workload, device: torch.device) -> nn.Module:
    return DistributedDataParallel(make_model(workload, device), gradient_as_bucket_view=True)


def _ddp_plain(workload: Workload, device: torch.device) -> Loop:
    model = _ddp(workload, device)
    return Loop(model, _adamw(model))


def _ddp_masters(workload: Workload, device: torch.device) -> Loop:
    model = _ddp(workload, device)
    return Loop(model, _Masters(list(model.parameters())))


def _zero_redundancy(workload: Workload, device: torch.device) -> Loop:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # here, because the import warns

    model = _ddp(workload, device)
    hyper = dict(lr=_LR, weight_decay=_WEIGHT_DECAY, fused=True)
    made = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.AdamW, parameters_as_bucket_view=True, **hyper
    )
    return Loop(model, made)


def _fsdp(workload: Workload, device: torch.device, reduce_dtype: torch.dtype | None = None) -> Loop:
    """FSDP2 block by block; weights are kept from forward to backward. reduce_dtype: of sent gradients; None: bf16."""
    model = make_model(workload, device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*model.blocks, model):
        policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return Loop(model, _adamw(model))


@dataclass(frozen=True)
class Entry:
    """One contender."""

    make: Callable[[Workload, torch.device], Loop]  # on each rank
    peer: str | None = None  # key of peers.PEERS; None: ours
    same_as: str | None = None  # whose weights its own must follow; None: it is checked against nothing
    cpu_only: bool = False


OURS = "FusedZeroAdamW, stage 2"
MASTERS = "DDP, AdamW(fused), fp32 masters by hand"
PLAIN = "DDP, AdamW(fused), no masters"
COMPUTE = "forward and backward alone"


def _ours(**options: object) -> Callable[[Workload, torch.device], Loop]:
    return lambda workload, device: _zero(workload, device, **options)


ENTRIES = {
    OURS: Entry(_ours(stage=2), same_as=MASTERS),
    f"{OURS}, two groups": Entry(_ours(stage=2, in_groups=True), same_as=MASTERS),
    "FusedZeroAdamW, stage 1": Entry(_ours(stage=1), same_as=MASTERS),
    f"{OURS}, exact": Entry(_ours(stage=2, transport="exact"), same_as=MASTERS, cpu_only=True),
    f"{OURS}, collective": Entry(_ours(stage=2, transport="collective"), same_as=MASTERS),
    MASTERS: Entry(_ddp_masters, "ddp"),
    PLAIN: Entry(_ddp_plain, "ddp"),
    "FSDP2, AdamW(fused), no masters": Entry(_fsdp, "fsdp2", same_as=PLAIN),
    "FSDP2, AdamW(fused), no masters, summed in fp32": Entry(
        lambda workload, device: _fsdp(workload, device, torch.float32), "fsdp2", same_as=PLAIN
    ),
    "DDP, ZeroRedundancyOptimizer, no masters": Entry(_zero_redundancy, "zero-redundancy", same_as=PLAIN),
    "DeepSpeed ZeRO-2, AdamW(fused)": Entry(_DeepSpeed, "deepspeed", same_as=MASTERS),
    COMPUTE: Entry(lambda workload, device: _Compute(make_model(workload, device), None)),
}
