"""Flat buffers: what they hold, and that their memory goes with them."""

import errno
import gc
import mmap
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pyzero
from pyzero import memory
from pyzero.estimate import estimate

LARGE = 8 << 20  # bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_bytes", [0, 4, 1 << 20, LARGE, LARGE + 4])
def test_size_dtype_and_zeros(dtype, num_bytes):
    numel = num_bytes // dtype.itemsize
    for make in (memory.empty, memory.zeros):
        buffer = make(numel, dtype, torch.device("cpu"))
        assert buffer.shape == (numel,) and buffer.dtype == dtype and buffer.is_contiguous()
        assert buffer.untyped_storage().nbytes() == numel * dtype.itemsize
        buffer.fill_(1)
        assert int(buffer.sum(dtype=torch.float64)) == numel
    assert not memory.zeros(numel, dtype, torch.device("cpu")).any()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages are asked for on this system")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EAGAIN], ids=errno.errorcode.get)
def test_a_kernel_that_refuses_huge_pages(monkeypatch, number):
    """EINVAL: it was built without them."""
    refused = []

    class Pages(mmap.mmap):
        def madvise(self, *args):
            refused.append(args)
            raise OSError(number, "no huge pages here")

    monkeypatch.setattr(mmap, "mmap", Pages)
    monkeypatch.setattr(memory, "_shared", memory.PagePool(memory._KEPT_BYTES))
    for make in (memory.empty, memory.zeros):
        buffer = make(LARGE // 4, torch.float32, torch.device("cpu"))
        buffer.fill_(1)
        assert int(buffer.sum(dtype=torch.float64)) == LARGE // 4
    assert refused == [(mmap.MADV_HUGEPAGE,)] * 2


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large buffers are torch's on this system")
def test_pages_of_one_size_are_used_again(monkeypatch):
    kept = memory.PagePool(memory._KEPT_BYTES)
    monkeypatch.setattr(memory, "_shared", kept)
    cpu = torch.device("cpu")
    first = memory.empty(LARGE // 4, torch.float32, cpu).fill_(1)
    place, view = first.data_ptr(), first[3:5]
    del first
    assert not kept._pages and view.sum() == 2  # a view keeps them
    assert memory.empty(LARGE // 4, torch.float32, cpu).data_ptr() != place
    del view
    assert memory.empty(LARGE // 2, torch.float32, cpu).data_ptr() != place  # another size
    assert not memory.zeros(LARGE // 4, torch.float32, cpu).any()
    second = memory.empty(LARGE // 2, torch.bfloat16, cpu)
    assert second.data_ptr() == place and second.numel() == LARGE // 2
    buffers = [memory.empty(LARGE // 4, torch.float32, cpu) for _ in range(2 * memory._KEPT_BYTES // LARGE)]
    del buffers
    assert sum(map(len, kept._pages)) == memory._KEPT_BYTES
    large = memory.empty(memory._KEPT_BYTES + 1, torch.uint8, cpu)
    del large
    assert sum(map(len, kept._pages)) == memory._KEPT_BYTES  # it displaces none that may be used again


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large buffers are torch's on this system")
def test_a_pool_of_one_buffer_keeps_its_pages_alone():
    size = LARGE // 4, torch.float32, torch.device("cpu")
    pool = memory.PagePool.of_one(*size[:2])
    first, second = pool.empty(*size), pool.empty(*size)
    place = second.data_ptr()
    del first, second
    assert sum(map(len, pool._pages)) == LARGE
    again = pool.empty(*size)
    assert again.data_ptr() == place and not pool._pages


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_goes_with_the_last_view():
    gc.collect()
    before = resident_bytes()
    buffer = memory.empty(64 << 20, torch.bfloat16, torch.device("cpu"))
    view = buffer.fill_(1)[5:10]
    del buffer
    assert resident_bytes() - before > 100 << 20 and view.sum() == 5
    del view
    assert resident_bytes() - before < 20 << 20


def kept_for_gradients(group: Any) -> list[int]:
    """Bytes that an optimizer keeps for gradient shards between steps, the estimate, and pools that outlive it."""
    model = nn.Linear(4096, 2048, dtype=torch.bfloat16)  # a shard of 16 MiB in fp32
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    places = set()
    for _ in range(4):
        model(torch.ones(1, 4096, dtype=torch.bfloat16)).float().sum().backward()
        places |= {grads.shard.data_ptr() for grads in optimizer._gradients._records.buckets}
        optimizer.step()
        optimizer.zero_grad()
    assert len(places) <= 2, "the first step's, and that of all later ones, in the buckets that are planned then"
    pools = [weakref.ref(grads._shard_pages) for grads in optimizer._gradients._records.buckets]
    kept = [len(pages) for pool in pools for pages in pool()._pages]
    del optimizer, model
    gc.collect()
    with torch.device("meta"):
        wanted = estimate(nn.Linear(4096, 2048, dtype=torch.bfloat16), num_ranks=group.size()).kept
    return [sum(kept), wanted, sum(pool() is not None for pool in pools)]


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large buffers are torch's on this system")
def test_gradients_lie_in_the_same_pages_in_every_step_and_go_with_the_optimizer(ranks):
    for kept, wanted, num_left in ranks.run(2, kept_for_gradients):
        assert 16 << 20 <= kept == wanted <= 18 << 20 and num_left == 0


def left_of_dropped_models(group: Any) -> list[str]:
    """In which states of its gradient a parameter outlives its optimizer and all references to it."""
    left = []
    for stage in (1, 2):
        for state in ("fresh", "reduced", "local", "cleared"):
            param = nn.Parameter(torch.ones(64))
            optimizer = pyzero.FusedZeroAdamW([param], stage=stage, process_group=group)
            if state != "fresh":
                param.sum().backward()
                optimizer.step()
            if state == "local":
                with optimizer.no_sync():
                    param.sum().backward()
            if state == "cleared":
                optimizer.zero_grad()
            died = weakref.ref(param)
            del param, optimizer
            gc.collect()
            left += [] if died() is None else [f"{state} in stage {stage}"]
    return left


def test_a_model_goes_with_its_gradients(ranks):
    """What stands in `.grad` knows its parameter, which holds it where no collector looks."""
    assert ranks.run(2, left_of_dropped_models) == [[], []]
