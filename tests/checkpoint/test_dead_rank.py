"""A rank that dies in a save, or saves alone: the other says so. The checkpoint before a death is the latest."""

from __future__ import annotations

import multiprocessing
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pyzero

TIMEOUT_S = 20
PLACES = {
    "its own file": "pyzero.checkpoint.files.write_file",
    "its tensors": "pyzero.checkpoint.storage.ChecksummedWriter.write_data",
    "after its tensors": "pyzero.checkpoint.writer.Writer._index",  # of rank 0 alone
}


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_twice(rank: int, folder: Path, place: str, dying: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S)
    )
    model = nn.Linear(5, 3)
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    pyzero.save_checkpoint(folder / "saved", model=model, optimizer=optimizer, step=1)
    if rank == dying:
        pytest.MonkeyPatch().setattr(place, die)
    try:
        pyzero.save_checkpoint(folder / "saved", model=model, optimizer=optimizer, step=2)
    except RuntimeError as error:
        (folder / "said").write_text(f"{type(error).__name__}: {error}")
        os._exit(0)  # the group that is left waits for the dead


@pytest.mark.parametrize("where", PLACES)
def test_the_other_rank_says_so(tmp_path, where):
    dying = 0 if where == "after its tensors" else 1
    context = multiprocessing.get_context("spawn")
    args = (tmp_path, PLACES[where], dying)
    processes = [context.Process(target=save_twice, args=(rank, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(4 * TIMEOUT_S)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if r == dying else 0 for r in range(2)]
    said = (tmp_path / "said").read_text()
    assert said.startswith("CollectiveError: ") and f"failed on rank {1 - dying} of 2" in said
    assert pyzero.latest_checkpoint(tmp_path / "saved") == tmp_path / "saved" / "step_1"
    model = nn.Linear(5, 3)
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    assert pyzero.load_checkpoint(tmp_path / "saved", model=model, optimizer=optimizer)["step"] == 1
    pyzero.save_checkpoint(tmp_path / "saved", model=model, optimizer=optimizer, step=2)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"latest", "step_1", "step_2"}


def save_on_rank_0_alone(rank: int, folder: Path, num_saves_before: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S)
    )
    model = nn.Linear(5, 3)
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    for step in range(num_saves_before):
        pyzero.save_checkpoint(folder / "saved", model=model, optimizer=optimizer, step=step)
    try:
        if rank == 0:
            pyzero.save_checkpoint(folder / "saved", model=model, optimizer=optimizer, step=9)
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
    except RuntimeError as error:
        (folder / f"said{rank}").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)


@pytest.mark.parametrize("num_saves_before", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_save_on_rank_0_alone_is_named(tmp_path, num_saves_before):
    context = multiprocessing.get_context("spawn")
    args = (tmp_path, num_saves_before)
    processes = [context.Process(target=save_on_rank_0_alone, args=(rank, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(4 * TIMEOUT_S)
    said = (tmp_path / "said1").read_text()
    assert said.startswith("CollectiveError: ")
    assert "the start of a save or load (every rank must call it)" in said
    if num_saves_before == 0:
        assert "rank 0, before the first backward, waits for" in said  # within some seconds, not at the timeout
