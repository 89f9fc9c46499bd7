"""export_safetensors leaves the old file or the new one, whatever happens. The harness that says so sees enough."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from crash import Fault, Outcome, strike_each
from safetensors.torch import load_file, save_file

from pyzero.checkpoint.export import export_safetensors

OLD, NEW = {"w": torch.zeros(5)}, {"w": torch.ones(7), "b": torch.arange(3)}


def export(path: Path) -> None:
    export_safetensors(NEW, path)


def export_in_place(path: Path) -> None:
    """Wrong: a kill leaves half of it."""
    save_file(OLD, path)
    with open(path, "wb") as file:
        file.write(b"half")
        file.write(b"and half")


def export_unsynced(path: Path) -> None:
    """Wrong: the new name may be on the disk before the bytes are."""
    with open(f"{path}.tmp", "wb") as file:
        shutil.copyfileobj(open(path, "rb"), file)
    os.replace(f"{path}.tmp", path)


def equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


def strike_all(fault: Fault, folder: Path, write=export) -> tuple[list[str], list[Outcome]]:
    path, outcomes = folder / "model.safetensors", []

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_file(OLD, path)

    def check(outcome: Outcome) -> None:
        outcomes.append(outcome)
        found = load_file(path)
        assert equal(found, OLD) or equal(found, NEW), "neither the old file nor the new one"
        if not outcome.was_struck:
            assert equal(found, NEW)
        elif outcome.fault in (Fault.DISK_FULL, Fault.READ_ONLY):
            assert isinstance(outcome.error, OSError), f"no error: {outcome.error!r}"

    return strike_each(fault, folder, write, (path,), prepare=prepare, check=check), outcomes


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
def test_the_old_file_or_the_new_one(tmp_path, fault):
    operations, outcomes = strike_all(fault, tmp_path / "folder")
    assert operations == ["open", "write", "fsync", "replace", "fsync"]
    assert [len(outcome.operations) >= outcome.number for outcome in outcomes] == [True] * 5 + [False]
    if fault is Fault.DISK_FULL:
        assert all("unlink" in outcome.operations for outcome in outcomes[1:4])  # nothing is left behind


@pytest.mark.parametrize(("write", "fault"), [(export_in_place, Fault.KILL), (export_unsynced, Fault.POWER_CUT)])
def test_a_writer_that_is_wrong_is_found(tmp_path, write, fault):
    with pytest.raises(AssertionError, match=f"{fault.value} at operation"):
        strike_all(fault, tmp_path / "folder", write)


def everything(folder: Path) -> None:
    """Each kind of operation, by each kind of call."""
    sub = folder / "sub"
    sub.mkdir()
    (sub / "text").write_text("text")
    with open(sub / "text", "a") as file:
        file.write("more")
    with open(sub / "raw", "wb", buffering=0) as file:
        file.write(b"1")
        file.truncate(0)
    with os.fdopen(os.open(sub / "fd", os.O_WRONLY | os.O_CREAT), "w") as file:
        file.write("2")
    shutil.copyfile(sub / "raw", sub / "copy")
    os.link(sub / "raw", sub / "link")
    (sub / "link").rename(sub / "renamed")
    torch.save({"w": torch.ones(3)}, open(sub / "torch", "wb"))
    shutil.rmtree(sub)
    (folder.parent / "outside").write_text("not counted")


def test_the_harness_sees_each_operation(tmp_path):
    folder = tmp_path / "folder"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    operations = strike_each(Fault.KILL, folder, everything, (folder,), prepare=prepare, check=lambda outcome: None)
    head = "mkdir open write open write open write ftruncate open write open link rename open write".split()
    assert [name for name in operations if name != "sendfile"][: len(head)] == head
    assert operations[-1] == "rmdir" and operations.count("unlink") == 6
