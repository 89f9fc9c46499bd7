"""Checkpoints that were cut, damaged, swapped or made by an enemy: found, named, and nothing is half-loaded."""

from __future__ import annotations

import json
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resume import assert_equal, build, make, outcome, saved

import pyzero
from pyzero.checkpoint import files

NAMES = ["index.json", "common.pt", "rank_00000.pt", "__0_0.distcp", "__1_0.distcp"]


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory) -> Path:
    """A checkpoint of two ranks."""
    directory = tmp_path_factory.mktemp("whole")
    ranks.run(2, saved, "adamw", torch.bfloat16, 2, directory)
    return directory


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """Its folder, in a directory of its own."""
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy" / "step_3"


def refused(folder: Path) -> str:
    """What load_checkpoint says; model and optimizer are as they were."""
    model = build(torch.bfloat16, 1)
    optimizer = make("adamw", model, None)
    before = outcome(optimizer, model)
    with pytest.raises(pyzero.CheckpointError) as caught:
        pyzero.load_checkpoint(folder.parent, model=model, optimizer=optimizer)
    assert_equal(outcome(optimizer, model), before)
    return str(caught.value)


def loads(folder: Path) -> None:
    model = build(torch.bfloat16, 1)
    assert pyzero.load_checkpoint(folder, model=model, optimizer=make("adamw", model, None))["step"] == 3


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    """A bit in the middle; of tensors, in one that is loaded: 16-bit weights are not, masters are."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    if path.suffix == ".distcp":
        tensors = files.read_index(path.parent)["tensors"]
        boxes = [box for name, tensor in tensors.items() if name.endswith("exp_avg") for box in tensor["boxes"]]
        offset, length = max((length, offset) for _, _, name, offset, length, _ in boxes if name == path.name)[::-1]
        place = offset + length // 2
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("harm", [cut, flip, Path.unlink], ids=["cut", "flipped", "missing"])
def test_damage_is_found_and_named(copy, name, harm):
    harm(copy / name)
    text = refused(copy)
    if name == "index.json" and harm is Path.unlink:
        assert "expected" in text and "latest to name a checkpoint" in text
    else:
        assert name in text


def test_every_byte_of_the_tensors_is_covered(copy):
    """Each byte belongs to one item with a CRC-32."""
    index = files.read_index(copy)
    for path in copy.glob("*.distcp"):
        rows = [box[2:] for tensor in index["tensors"].values() for box in tensor["boxes"] if box[2] == path.name]
        spans = sorted({(offset, offset + length) for _, offset, length, _ in rows})
        gaps = [(end, begin) for (_, end), (begin, _) in zip(spans, spans[1:], strict=False) if end != begin]
        num_pickled = sum(end - begin for end, begin in gaps)
        assert all(end < begin for end, begin in gaps) and num_pickled + spans[0][0] < path.stat().st_size / 2


def test_swapped_files(copy):
    first, second = copy / "__0_0.distcp", copy / "__1_0.distcp"
    first.rename(copy / "spare")
    second.rename(first)
    (copy / "spare").rename(second)
    assert ".distcp is" in refused(copy)


def test_a_file_of_another_checkpoint(copy, ranks, tmp_path):
    ranks.run(2, saved, "adamw", torch.bfloat16, 1, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "step_3" / "rank_00001.pt", copy / "rank_00000.pt")
    assert "rank_00000.pt is damaged" in refused(copy)


def test_latest_that_names_nothing_offers_what_there_is(copy):
    (copy.parent / "latest").write_text("step_9\n")
    text = refused(copy)
    assert "got 'step_9'" in text and text.endswith("step_3")
    loads(copy)


@pytest.mark.parametrize("text", ["step_" + 300 * "1", 300 * "x", "a\0b", "step_3/step_3", "."])
def test_latest_that_can_be_no_name(copy, text):
    (copy.parent / "latest").write_text(text)
    assert "to name a checkpoint beside it, got" in refused(copy)


# ---- enemies ---------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def rewrite_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """With a right CRC-32."""
    index = json.loads(json.loads((folder / "index.json").read_bytes())["index"])
    change(index)
    body = json.dumps(index)
    (folder / "index.json").write_text(json.dumps({"crc32": zlib.crc32(body.encode()), "index": body}))


@pytest.mark.parametrize("name", ["common.pt", "rank_00000.pt", "__0_0.distcp"])
def test_no_file_runs_code(copy, tmp_path, name):
    """Check sums are right, as an enemy's would be."""
    pickled = pickle.dumps(Bomb(tmp_path / "ran"))

    def change(index: dict[str, Any]) -> None:
        row = [len(pickled), zlib.crc32(pickled)]
        if name in index["files"]:
            index["files"][name] = row
            return
        index["sizes"][name] = len(pickled)
        for tensor in index["tensors"].values():
            for box in tensor["boxes"]:
                if box[2] == name:
                    box[3:] = [0, *row]

    (copy / name).write_bytes(pickled)
    rewrite_index(copy, change)
    text = refused(copy)
    assert name in text and "which may run code" in text
    assert not (tmp_path / "ran").exists()


def test_the_pickled_index_of_torch_is_never_read(copy, tmp_path):
    (copy / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    loads(copy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", "a/b", ""])
def test_names_stay_in_the_folder(copy, name):
    def change(index: dict[str, Any]) -> None:
        next(iter(index["tensors"].values()))["boxes"][0][2] = name

    (copy.parent / "outside").write_bytes((copy / "__0_0.distcp").read_bytes())
    rewrite_index(copy, change)
    assert "which is no file beside it" in refused(copy)
    for name in (f"../{copy.parent.name}/step_3", f"../{copy.parent.name}", str(copy.parent)):
        (copy.parent / "latest").write_text(f"{name}\n")
        assert "to name a checkpoint beside it" in (text := refused(copy)) and text.endswith("step_3")


def edit(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(index: dict[str, Any]) -> None:
        tensor = next(t for t in index["tensors"].values() if len(t["boxes"]) > 1)
        for key, value in changes.items():
            if key == "drop":
                tensor["boxes"].pop()
            elif key == "offsets":
                tensor["boxes"][0][0] = value
            elif key in tensor:
                tensor[key] = value
            else:
                index[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edit(drop=True), "elements, expected"),
        (edit(offsets=[-1, 0]), "outside of its shape"),
        (edit(offsets=[10**9, 0]), "outside of its shape"),
        (edit(dtype="load"), "has dtype 'load'"),
        (edit(format=2), "it has format 2, expected 1; update pyzero"),
        (edit(tensors=None), "index.json cannot be read"),
        (edit(files=[1]), "index.json cannot be read"),
    ],
)
def test_an_index_that_makes_no_sense(copy, change, said):
    rewrite_index(copy, change)
    assert said in refused(copy)
