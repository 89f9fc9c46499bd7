"""cpu_offload: masters and state of a GPU in memory of the host, with the bits of those that are not."""

import logging
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from models import assert_same, build, loss_of, micro_batch, params_of
from torch import Tensor, nn

import pyzero
from pyzero import memory

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: no GPU")],
)


def on_gpu(test: Any) -> Any:
    skips = pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: no GPU")
    return pytest.mark.cuda(skips(test))


OPTIMIZERS = [pyzero.FusedZeroAdamW, pyzero.FusedZeroLion, pyzero.FusedZeroSGD, pyzero.ZeroLamb]


def made(device: str, dtype: torch.dtype, offload: bool, of: Any = pyzero.FusedZeroAdamW, **options: Any) -> Any:
    model = build(dtype).to(device)
    return model, of(model.parameters(), lr=1e-2, cpu_offload=offload, max_grad_norm=0.5, **options)


def trained(model: nn.Module, optimizer: Any, steps: range) -> list[Tensor]:
    device = next(model.parameters()).device
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, micro_batch(step, 0).to(device))
        optimizer.backward(loss * float("inf") if step == 2 else loss)
        optimizer.step()
    return [*params_of(model), *(optimizer.full_master(param).cpu() for param in model.parameters())]


@pytest.mark.parametrize("of", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_bits_are_those_without(device, dtype, of):
    kept, offloaded = (trained(*made(device, dtype, offload, of), range(5)) for offload in (False, True))
    assert_same(kept, offloaded)


def test_cpus_have_nothing_to_offload(caplog):
    with caplog.at_level(logging.INFO, logger="pyzero"):
        made("cpu", torch.float32, True)
    assert "cpu_offload has nothing to do" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc of Linux")
def test_a_fork_copies_no_pinned_page(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Mock(cudaHostRegister=lambda *args: 0))
    monkeypatch.setattr(memory, "_unpin", lambda *args: None)
    pages = memory._PinnedPages(4 << 20, torch.device("cuda", 0))
    (address, _), flags = pages.__cuda_array_interface__["data"], []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(span[1], 16) <= address < int(span[2], 16)
        elif line.startswith("VmFlags:") and is_there:
            flags = line.split()
    assert "dc" in flags


@on_gpu
def test_masters_and_state_take_none_of_the_device():
    numel, shrinks = 1 << 22, {}
    for offload in (False, True):
        param = nn.Parameter(torch.ones(numel, device="cuda", dtype=torch.bfloat16))
        before = torch.cuda.memory_allocated()
        optimizer = pyzero.FusedZeroAdamW([param], cpu_offload=offload)
        shrinks[offload] = torch.cuda.memory_allocated() - before
        del optimizer, param
    assert shrinks[False] - shrinks[True] == 12 * numel


@on_gpu
def test_pages_are_unpinned_with_the_last_tensor_on_them(monkeypatch: pytest.MonkeyPatch):
    unpinned = []
    unpin = memory._unpin
    monkeypatch.setattr(memory, "_unpin", lambda *pages: unpinned.append(unpin(*pages)))
    tensor = memory.pinned(100, torch.float32, torch.device("cuda", 0))
    view = tensor[3:7].fill_(2.0)
    assert tensor.device == torch.device("cuda", 0)
    del tensor
    assert view.sum().item() == 8.0 and not unpinned
    del view
    assert unpinned == [None]


@on_gpu
def test_it_waits_for_nothing_and_can_be_captured():
    model, optimizer = made("cuda", torch.bfloat16, True)
    eager, other = made("cuda", torch.bfloat16, True)
    for net, step in ((model, optimizer), (eager, other)):
        step.backward(loss_of(net, micro_batch(0, 0).cuda()))
        step.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    for _ in range(2):
        other.step()
    assert_same(params_of(model), params_of(eager))


@on_gpu
@pytest.mark.parametrize("loads_offloaded", [True, False])
def test_it_loads_wherever_state_lies(tmp_path: Path, loads_offloaded: bool):
    model, optimizer = made("cuda", torch.bfloat16, True)
    trained(model, optimizer, range(2))
    pyzero.save_checkpoint(tmp_path / "saved", model=model, optimizer=optimizer, step=2)
    wanted = trained(model, optimizer, range(2, 5))
    other, resumed = made("cuda", torch.bfloat16, loads_offloaded)
    pyzero.load_checkpoint(tmp_path / "saved", model=other, optimizer=resumed)
    assert_same(trained(other, resumed, range(2, 5)), wanted)


@on_gpu
def test_state_dicts_go_round():
    model, optimizer = made("cuda", torch.bfloat16, True)
    trained(model, optimizer, range(2))
    whole, own = optimizer.full_state_dict(), optimizer.state_dict()
    for state in (whole, own):
        other, resumed = made("cuda", torch.bfloat16, True)
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(state)
        for param, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert_same(list(optimizer.full_state(param).values()), list(resumed.full_state(theirs).values()))
