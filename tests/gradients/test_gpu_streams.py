"""Reduction beside backward on one device: what crosses streams is neither read too early nor freed too soon.

A process group of one rank that takes the path of many. On a GPU each case runs twice: with the side stream made late
by a sleeping kernel and freed memory overwritten with NaN, and with the device waited for around every exchange. On the
CPU, where there are no streams, the second run is one without overlap.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from models import assert_same
from torch import Tensor, nn

import pyzero
from pyzero.comm import group
from pyzero.gradients.reduced.exchange import BucketExchange
from pyzero.gradients.reduced.reduction import ReducedGradients

LATE_CYCLES = 30_000_000  # some 15 ms
WIDTH, DEPTH, STEPS = 256, 6, 3
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: no GPU")],
)


class Many(int):
    """One, that says it is more than one."""

    def __gt__(self, other: int) -> bool:
        return other == 1 or int.__gt__(self, other)

    def __eq__(self, other: object) -> bool:
        return other != 1 and int.__eq__(self, other)  # type: ignore[arg-type]

    __hash__ = int.__hash__


@pytest.fixture(scope="module", params=["cpu", GPU])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.device]:
    """With a default process group of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    backend = "nccl" if request.param == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield torch.device(request.param)
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    world_size = dist.get_world_size
    monkeypatch.setattr(group.dist, "get_world_size", lambda group=None: Many(world_size(group)))


def waited_for(method):
    def waiting(*args, **kwargs):
        torch.cuda.synchronize()
        result = method(*args, **kwargs)
        torch.cuda.synchronize()
        return result

    return waiting


def overwrite_freed_memory(device: torch.device) -> None:
    for numel in (1, 1, 1, WIDTH * WIDTH, 2 * WIDTH * WIDTH, 4 * WIDTH * WIDTH):
        torch.full((numel,), float("nan"), device=device)


def trained(
    device: torch.device, dtype: torch.dtype, stage: int, micro: int, no_sync: bool, late: bool
) -> list[Tensor]:
    torch.manual_seed(0)
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = nn.Sequential(*layers).to(device, dtype)
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(),
        lr=1e-2,
        stage=stage,
        bucket_cap_mb=2 * WIDTH * WIDTH * 2 / 2**20,
        max_grad_norm=1.0,
        loss_scale="dynamic" if dtype == torch.float16 else 1024.0,
        overlap=late or device.type == "cuda",
    )
    gradients = optimizer._gradients
    assert isinstance(gradients, ReducedGradients), "the path of one rank was taken"
    for step in range(STEPS):
        for index in range(micro):
            x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(10 * step + index)).to(device, dtype)
            with optimizer.no_sync() if no_sync and index < micro - 1 else nullcontext():
                loss = model(x).float().square().mean()
                if late and device.type == "cuda":
                    torch.cuda.synchronize()
                    with torch.cuda.stream(gradients._exchange._stream):
                        torch.cuda._sleep(LATE_CYCLES)
                optimizer.backward(loss)
                overwrite_freed_memory(device)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 0
    return [param.detach().cpu().clone() for param in model.parameters()]


@pytest.mark.parametrize(("micro", "no_sync"), [(1, False), (2, True), (3, True), (3, False)])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_late_side_stream_changes_no_bit(device, monkeypatch, dtype, stage, micro, no_sync):
    late = trained(device, dtype, stage, micro, no_sync, late=True)
    if device.type == "cuda":
        for name in ("send_packed", "_receive"):
            monkeypatch.setattr(BucketExchange, name, waited_for(getattr(BucketExchange, name)))
    assert_same(late, trained(device, dtype, stage, micro, no_sync, late=False))


def test_memory_of_gradients_comes_back(device):
    if device.type == "cpu":
        pytest.skip("the allocator counts on a GPU only")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    trained(device, torch.bfloat16, 2, 2, True, late=True)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 16)


class FakeStream:
    def wait_stream(self, other: object) -> None:
        """Do nothing."""


def test_all_that_the_packing_stream_reads_is_recorded(device, monkeypatch):
    """Of a bf16 gradient of two backwards, written on another stream: the fp32 sum, and `.grad` to compare."""
    param = nn.Parameter(torch.ones(64, dtype=torch.bfloat16, device=device))
    optimizer = pyzero.FusedZeroAdamW([param], stage=2, transport="exact", loss_scale=None)
    with optimizer.no_sync():
        for _ in range(2):
            param.float().sum().backward()
    packing, writing, recorded, read = FakeStream(), FakeStream(), set(), set()
    exchange, (grads,) = optimizer._gradients._exchange, optimizer._gradients._records.buckets
    (record,) = grads.records
    compare = type(record)._take_unseen_writes

    def reading(self, main_grad: Tensor, local: Tensor) -> None:
        read.update((main_grad.data_ptr(), local.data_ptr()))
        compare(self, main_grad, local)

    with monkeypatch.context() as patch:
        patch.setattr(exchange, "_stream", packing)
        patch.setattr(exchange, "_writers", {writing})
        patch.setattr(torch.cuda, "current_stream", lambda device=None: packing)
        patch.setattr(Tensor, "record_stream", lambda self, stream: recorded.add(self.data_ptr()))
        patch.setattr(type(record), "_take_unseen_writes", reading)
        exchange._wait_for_writers(grads)
        assert torch.equal(record.local_sum(), torch.full((64,), 2.0, device=device))
    assert len(read) == 2 and read <= recorded
