"""A save that is struck at any of its file operations leaves a checkpoint that loads, the one before or the new one."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crash import Fault, Outcome, armed, strike_each
from torch import nn

import pyzero
import pyzero.checkpoint.storage  # noqa: F401  once, in the process that the struck ones are forked from


def make(value: float) -> tuple[nn.Module, Any]:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)
    return model, pyzero.FusedZeroAdamW(model.parameters())


def save(directory: Path, number: int) -> None:
    model, optimizer = make(number)
    pyzero.save_checkpoint(directory, model=model, optimizer=optimizer, step=number, keep=1, number=number)


def load(directory: Path) -> int:
    """The number of the checkpoint that is there, all of it."""
    model, optimizer = make(0)
    number: int = pyzero.load_checkpoint(directory, model=model, optimizer=optimizer)["number"]
    assert all((param == number).all() for param in model.parameters())
    return number


@pytest.fixture
def memory_path(tmp_path) -> Iterator[Path]:
    """A folder in memory, where a thousand fsyncs take no time: what a power cut takes away, the harness knows."""
    shm = Path("/dev/shm")
    if not (shm.is_dir() and os.access(shm, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shm) as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(Fault))
def test_a_checkpoint_is_whole_whatever_happens(memory_path, fault):
    save(memory_path / "before", 1)
    directory = memory_path / "checkpoints"

    def prepare() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(memory_path / "before", directory)

    def check(outcome: Outcome) -> None:
        number = load(directory)
        assert number in (1, 2)
        if not outcome.was_struck:
            assert number == 2
        elif number == 1 and fault in (Fault.DISK_FULL, Fault.READ_ONLY):
            assert isinstance(outcome.error, pyzero.CheckpointError), outcome.error
            assert "No space left" in str(outcome.error) or "Read-only file system" in str(outcome.error)
        if outcome.number % 5:
            return
        save(directory, 3)  # what was left is no hindrance
        assert load(directory) == 3 and {path.name for path in directory.iterdir()} == {"latest", "step_3"}

    # Where a disk takes no more, one refused write is much as the next, and a kill loses less than a power cut there:
    # some of them are struck, beside every power cut.
    stride = {Fault.KILL: 2, Fault.DISK_FULL: 3, Fault.READ_ONLY: 5}.get(fault, 1)
    operations = strike_each(fault, memory_path, save, (directory, 2), prepare=prepare, check=check, stride=stride)
    assert operations.count("fsync") >= 8 and {"rename", "replace", "rmdir"} <= set(operations)


def test_the_last_step_is_the_name_in_latest(tmp_path, monkeypatch):
    """Between the rename of the folder and that of `latest`, the checkpoint before is the latest."""
    from pyzero.checkpoint import files as checkpoint_files

    save(tmp_path, 1)
    monkeypatch.setattr(Path, "replace", lambda *args: (_ for _ in ()).throw(OSError("struck")))
    with pytest.raises(pyzero.CheckpointError, match="struck"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert load(tmp_path) == 1 and checkpoint_files.find(tmp_path / "step_2") == tmp_path / "step_2"


def test_a_disk_that_is_full_in_the_middle_of_a_tensor_is_told_of(tmp_path):
    """As a system refuses to write beyond a size: torch reports where its archive would have gone on."""
    model = nn.Linear(300, 300)
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(pyzero.CheckpointError, match="File too large"):
            pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def of_two_ranks(group: Any, directory: Path, fails_on: int) -> tuple[str, float]:
    model, optimizer = nn.Linear(2, 1), None
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    pyzero.save_checkpoint(directory, model=model, optimizer=optimizer, step=1)
    number = 2 if group.rank() == fails_on else 10**6
    began = time.perf_counter()
    with armed(Fault.DISK_FULL, number, directory), pytest.raises(pyzero.CheckpointError) as caught:
        pyzero.save_checkpoint(directory, model=model, optimizer=optimizer, step=2)
    took_s = time.perf_counter() - began
    assert pyzero.load_checkpoint(directory, model=model, optimizer=optimizer)["step"] == 1
    pyzero.save_checkpoint(directory, model=model, optimizer=optimizer, step=2)
    return str(caught.value), took_s


@pytest.mark.parametrize("fails_on", [0, 1])
def test_a_full_disk_of_one_rank_is_an_error_on_all(ranks, tmp_path, fails_on):
    for text, took_s in ranks.run(2, of_two_ranks, tmp_path, fails_on):
        assert f"failed on rank {fails_on} of 2" in text and "No space left" in text
        assert took_s < 30  # nobody waits for a timeout
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step_1", "step_2"}
