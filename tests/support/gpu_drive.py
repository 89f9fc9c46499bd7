"""python tests/support/gpu_drive.py CASE: a case for several ranks, on two gloo ranks that share the GPU, or on CPUs.

A case trains without and with its subject, from the same weights on the same data. It checks that the losses are equal,
and prints the time of a step. Two processes take turns on the GPU, so that the times show only what is far too slow.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pyzero
from pyzero import deepspeed
from pyzero.deepspeed import launcher

NUM_RANKS = 2
WIDTH, DEPTH, ROWS, STEPS = 256, 4, 8, 6
LR, MUON_LR = 1e-3, 0.02
OFFLOADED = {"stage": 3, "offload_param": {"device": "cpu"}}
Step = Callable[[Tensor], Tensor]  # returns the loss


class Run(NamedTuple):
    who: str
    losses: list[float]
    step_s: float


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(DEPTH)])


def run(who: str, step: Step, rank: int | None = None) -> Run:
    """Train. rank: the rank whose data is used; None: this one."""
    losses, seconds = [], []
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(1000 * number + (dist.get_rank() if rank is None else rank))
        x = torch.randn(ROWS, WIDTH, generator=generator, device="cpu").to(launcher.device())
        start = time.perf_counter()
        losses.append(float(step(x)))
        seconds.append(time.perf_counter() - start)
    return Run(who, losses, statistics.median(seconds[1:]))


def by_engine(net: nn.Module, config: dict[str, Any], **arguments: Any) -> Step:
    optimizer = {"type": "AdamW", "params": {"lr": LR}}
    config = {"train_micro_batch_size_per_gpu": ROWS, "optimizer": optimizer, **config}
    engine, *_ = pyzero.initialize(model=net, config=config, **arguments)

    def step(x: Tensor) -> Tensor:
        loss = engine(x).float().sub(1).square().mean()
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def by_hand(net: nn.Module, optimizer: Any) -> Step:
    dtype = next(net.parameters()).dtype

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = net(x.to(dtype)).float().sub(1).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def offload_param() -> Iterator[Run]:
    """Stage 3 with shards on the host; and the same with a model that is built there one weight at a time."""
    bf16 = {"bf16": {"enabled": True}}
    yield run("on the device", by_engine(model(), {**bf16, "zero_optimization": {"stage": 3}}))
    config = {**bf16, "zero_optimization": OFFLOADED}
    yield run("offload_param", by_engine(model(), config))
    with deepspeed.zero.Init(config_dict_or_path={"train_micro_batch_size_per_gpu": ROWS, **config}):
        built = model()
    yield run("and zero.Init", by_engine(built, config))


def tensor_parallel() -> Iterator[Run]:
    net = model().to(launcher.device())
    yield run("whole layers", by_hand(net, torch.optim.AdamW(net.parameters(), lr=LR)), rank=0)
    ranks = list(range(dist.get_world_size()))
    alone = [dist.new_group([rank]) for rank in ranks][dist.get_rank()]
    # With init_device_mesh its groups would be NCCL's, which refuses two ranks on one GPU.
    table = torch.tensor([ranks], device="cpu")
    groups = [alone, dist.group.WORLD]
    mesh = DeviceMesh.from_group(groups, launcher.device().type, table, mesh_dim_names=("dp", "tp"))
    plan = {f"{index}.0": ("colwise", "rowwise")[index % 2] for index in range(DEPTH)}
    config = {"tensor_parallel": {"autotp_size": len(ranks)}, "zero_optimization": {"stage": 1}}
    yield run("split layers", by_engine(model(), config, mesh=mesh, tp_plan=plan), rank=0)


def cpu_offload(shards: bool = False) -> Iterator[Run]:
    for offload in (False, True):
        net = model().to(launcher.device(), torch.bfloat16)
        if shards:
            mesh = DeviceMesh.from_group(dist.group.WORLD, launcher.device().type)
            for part in (*net, net):
                fully_shard(part, mesh=mesh)
        optimizer = pyzero.FusedZeroAdamW(net.parameters(), lr=LR, max_grad_norm=1.0, cpu_offload=offload)
        yield run("cpu_offload" if offload else "on the device", by_hand(net, optimizer))


def sharded_offload() -> Iterator[Run]:
    """cpu_offload with fully_shard."""
    yield from cpu_offload(shards=True)


def muon() -> Iterator[Run]:
    """Only matrices. With torch, each rank orthogonalises all of them."""
    for is_ours in (False, True):
        net = model().to(launcher.device())
        matrices = [param for param in net.parameters() if param.requires_grad_(param.dim() > 1).requires_grad]
        if is_ours:
            yield run("ZeroMuon", by_hand(net, pyzero.ZeroMuon(matrices, lr=MUON_LR)))
        else:
            yield run("DDP", by_hand(DistributedDataParallel(net), torch.optim.Muon(matrices, lr=MUON_LR)))


CASES = {case.__name__: case for case in (offload_param, tensor_parallel, cpu_offload, sharded_offload, muon)}
# Relative. These sum in another order, and Muon then rounds to bf16. The other cases must give the same bits.
TOLERANCE = {"tensor_parallel": 1e-4, "muon": 1e-4}


def drive(group: Any, name: str) -> str:
    """Run a case on each rank, and return a line. Raises AssertionError if losses differ or do not fall."""
    first, *others = CASES[name]()
    for other in others:
        for wanted, got in zip(first.losses, other.losses, strict=True):
            assert abs(got - wanted) <= TOLERANCE.get(name, 0.0) * wanted, f"{first} against {other}"
    assert first.losses[-1] < first.losses[0], first
    times = ", ".join(f"{who} {1e3 * step_s:.1f} ms" for who, _, step_s in (first, *others))
    return f"{name}: same losses; a step: {times}"


def _start(rank: int, store: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=NUM_RANKS)
    line = drive(None, name)
    if rank == 0:
        print(line, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_start, (folder, *sys.argv[1:]), NUM_RANKS)
