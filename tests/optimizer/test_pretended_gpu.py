"""The paths for GPUs, on machines without one: the same bits as on the CPU, no mix of devices, and nothing waits."""

from __future__ import annotations

import multiprocessing
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pretended_gpu
import pytest
import torch
import torch.distributed as dist
from models import assert_same, build, loss_of, micro_batch, params_of
from torch import Tensor

import pyzero

pytestmark = pytest.mark.skipif(
    torch.backends.cuda.is_built(), reason="this torch has CUDA; the GPU that is not there needs one without"
)

TIMEOUT_S = 120
NUM_STEPS = 4

CASES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32, "max_grad_norm": 0.5},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16, "max_grad_norm": 0.5, "loss_scale": pyzero.LossScale(init_scale=8.0)},
    "stage 1": {"dtype": torch.bfloat16, "stage": 1},
    "small buckets": {"dtype": torch.bfloat16, "bucket_cap_mb": 1e-3},
    "collective": {"dtype": torch.bfloat16, "transport": "collective"},
    "offload": {"dtype": torch.bfloat16, "cpu_offload": True},
    "accumulation": {"dtype": torch.bfloat16, "num_backwards": 2},
    "clip": {"dtype": torch.bfloat16, "clips": True},
    "skip": {"dtype": torch.bfloat16, "overflows": True},
    "resumed": {"dtype": torch.bfloat16, "resumes": True},
    "Lion": {"dtype": torch.bfloat16, "optimizer": pyzero.FusedZeroLion},
    "SGD": {"dtype": torch.bfloat16, "optimizer": pyzero.FusedZeroSGD, "momentum": 0.9},
    "LAMB": {"dtype": torch.bfloat16, "optimizer": pyzero.ZeroLamb},
}


def start(group: Any, device: str, dtype: torch.dtype, optimizer: Any = pyzero.FusedZeroAdamW, **options: Any) -> Any:
    model = build(dtype).to(device)
    return model, optimizer(model.parameters(), lr=1e-2, process_group=group, backend="reference", **options)


def train(group: Any, device: str, name: str, folder: Path) -> tuple[list[Tensor], list[str]]:
    """Return the weights, and where the host waited for the GPU in all steps but an optimizer's first."""
    options = {**CASES[name]}
    num_backwards, clips = options.pop("num_backwards", 1), options.pop("clips", False)
    overflows, resumes = options.pop("overflows", False), options.pop("resumes", False)
    model, optimizer = start(group, device, **options)
    waits: list[str] = []
    for step in range(NUM_STEPS):
        is_first = step == 0 or (resumes and step == 2)  # of an optimizer, whose buckets move at its end
        if is_first and step > 0:
            place = folder / f"{device}, {group.size()} ranks"
            pyzero.save_checkpoint(place, model=model, optimizer=optimizer, step=step)
            model, optimizer = start(group, device, **options)
            pyzero.load_checkpoint(place, model=model, optimizer=optimizer)
        numbers = [group.rank() * num_backwards + micro for micro in range(num_backwards)]
        losses = [loss_of(model, micro_batch(step, number).to(device)) for number in numbers]
        pretended_gpu.waits.clear()  # of what goes before
        for loss in losses:
            optimizer.backward(loss * float("inf") if overflows and step == 1 else loss)
        if clips:
            optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
        waits += [] if is_first else pretended_gpu.waits
    assert optimizer.skipped_steps == overflows
    assert all(str(param.device) == device for param in model.parameters())
    return [param.cpu() for param in params_of(model)], waits


def show_that_it_can_fail() -> tuple[str, int]:
    """Return what an operation on both devices raises, and how often these reads make the host wait."""
    on_gpu, on_cpu = torch.ones(2, device="cuda:0"), torch.ones(2)
    try:
        on_gpu.add_(on_cpu)
        said = ""
    except RuntimeError as error:
        said = str(error)
    pretended_gpu.waits.clear()
    on_gpu.sum().item(), on_gpu.cpu(), on_gpu.tolist(), bool(on_gpu[0]), on_cpu.copy_(on_gpu), on_gpu.copy_(on_cpu)
    on_gpu.mul_(torch.tensor(2.0)), on_cpu.copy_(on_gpu, non_blocking=True), on_cpu.sum().item()  # these do not
    return said, len(pretended_gpu.waits)


def on_cpu(group: Any, name: str, folder: Path) -> list[Tensor]:
    return train(group, "cpu", name, folder)[0]


def serve(rank: int, folder: Path, outbox: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    groups = {size: dist.new_group(list(range(size)), timeout=timedelta(seconds=TIMEOUT_S)) for size in (1, 2)}
    pretended_gpu.install()
    if rank == 0:
        outbox.put(("can fail", True, show_that_it_can_fail()))
    for size, group in groups.items():
        for name in CASES if rank < size else ():
            try:
                outbox.put(((rank, size, name), True, train(group, "cuda:0", name, folder)))
            except Exception:
                outbox.put(((rank, size, name), False, traceback.format_exc()))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What two processes with a pretended GPU return, by rank, number of ranks and case."""
    context = multiprocessing.get_context("spawn")
    outbox, folder = context.Queue(), tmp_path_factory.mktemp("pretended")
    processes = [context.Process(target=serve, args=(rank, folder, outbox), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        told = [outbox.get(timeout=TIMEOUT_S) for _ in range(1 + 3 * len(CASES))]
    finally:
        for process in processes:
            process.join(TIMEOUT_S)
    return {key: (succeeded, result) for key, succeeded, result in told}


def test_the_pretended_gpu_can_fail(on_gpu):
    _, (said, num_waits) = on_gpu["can fail"]
    assert said == "expected all tensors of aten::add_ on one device, got [(2, 'cuda'), (2, 'cpu')]"
    assert num_waits == 6


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_and_no_waiting(ranks, on_gpu, tmp_path, size, name):
    wanted = ranks.run(size, on_cpu, name, tmp_path)
    for rank in range(size):
        succeeded, result = on_gpu[rank, size, name]
        assert succeeded, result
        params, waits = result
        assert_same(params, wanted[rank])
        assert not waits or name == "collective"  # gloo's own reduce-scatter reads GPUs through the host
