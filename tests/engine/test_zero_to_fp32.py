"""deepspeed.utils.zero_to_fp32: whole fp32 weights from checkpoints of an engine, and from DeepSpeed's."""

import os
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_case import FOLDER
from torch import Tensor, nn

import pyzero
from pyzero.checkpoint import from_deepspeed
from pyzero.deepspeed import zero_to_fp32


def build() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    return model


def save(group: Any, path: str, stage: int) -> dict[str, Tensor]:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 2.0**-6}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
    }
    engine = pyzero.initialize(model=build(), config=config)[0]
    for tag in ("first", None):
        engine.backward(engine(torch.arange(8.0).view(2, 4)).float().square().sum())
        engine.step()
        engine.save_checkpoint(path, tag)
    masters = engine.get_fp32_state_dict()
    return {name: value.clone() for name, value in masters.items()}


def _with_path() -> dict[str, str]:
    """Return an environment in which a script elsewhere imports this pyzero."""
    return {**os.environ, "PYTHONPATH": str(Path(pyzero.__file__).parents[1])}


@pytest.mark.parametrize("stage", [2, 3])
def test_of_the_engine(ranks, tmp_path, stage):
    wanted = ranks.run(4, save, str(tmp_path), stage)[0]
    found = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert found["0.weight"] is found["1.weight"] and found["2.num_batches_tracked"].dtype == torch.int64
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert not torch.equal(wanted["0.weight"], wanted["0.weight"].bfloat16().float())  # masters, not weights
    first = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path, tag="first")
    assert first.keys() == found.keys() and not torch.equal(first["0.weight"], found["0.weight"])
    model = zero_to_fp32.load_state_dict_from_zero_checkpoint(build(), tmp_path)
    assert torch.equal(model[1].weight, wanted["0.weight"])
    for is_safe, name in ((False, "pytorch_model.bin"), (True, "model.safetensors")):
        zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "out", safe_serialization=is_safe)
        assert (tmp_path / "out" / name).stat().st_size > 0
    script, out = tmp_path / "zero_to_fp32.py", tmp_path / "by_script"
    command = [sys.executable, str(script), str(tmp_path), str(out), "--tag", "first", "--max_shard_size", "1GB"]
    subprocess.run(command, check=True, timeout=100, env=_with_path())
    assert torch.equal(torch.load(out / "pytorch_model.bin", weights_only=True)["0.weight"], first["0.weight"])
    written = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(written[name], value) for name, value in found.items())


def test_of_deepspeed(tmp_path: Path):
    with zipfile.ZipFile(FOLDER / "bf16-stage2.zip") as archive:
        archive.extractall(tmp_path)
    found = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path, tag="saved")
    theirs = from_deepspeed.read(tmp_path, "saved")
    assert found.keys() == theirs.module.keys()
    for name, values in theirs.params.items():
        assert torch.equal(found[name], values["master"])


def cut_short(value: Any, file: Any) -> None:
    """Write as torch.save does on a disk that becomes full."""
    with open(file, "wb") if isinstance(file, Path) else nullcontext(file) as opened:
        opened.write(b"PK")
        raise OSError("No space left on device")


def test_a_write_that_is_broken_off_leaves_the_file_before(tmp_path, monkeypatch):
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "Adam"}}
    engine = pyzero.initialize(model=build(), config=config)[0]
    engine.save_checkpoint(tmp_path)
    engine.save_16bit_model(tmp_path / "16bit", "model.bin")
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "fp32")
    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(OSError, match="No space"):
        engine.save_16bit_model(tmp_path / "16bit", "model.bin")
    with pytest.raises(OSError, match="No space"):
        zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "fp32")
    monkeypatch.undo()
    for path in (tmp_path / "16bit" / "model.bin", tmp_path / "fp32" / "pytorch_model.bin"):
        assert torch.load(path).keys() == engine.module.state_dict().keys()
        assert [*path.parent.iterdir()] == [path]


def test_what_there_is_not(tmp_path):
    with pytest.raises(FileNotFoundError, match="latest"):
        zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="pass it to engine.save_checkpoint"):
        zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path, exclude_frozen_parameters=True)


@pytest.mark.parametrize("by_latest", [False, True])
@pytest.mark.parametrize("tag", ["../other/first", "{root}/other/first", "..", ""])
def test_a_tag_that_leads_out_of_the_folder_is_refused(tmp_path, tag, by_latest):
    other, folder = tmp_path / "other", tmp_path / "own"
    folder.mkdir()
    model = nn.Linear(2, 2)
    optimizer = pyzero.FusedZeroAdam(model.parameters())
    pyzero.save_checkpoint(other / "first", model=model, optimizer=optimizer, step=1)
    tag = tag.format(root=tmp_path)
    if by_latest:
        (folder / "latest").write_text(tag)
    with pytest.raises(ValueError, match="expected a tag"):
        zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder, None if by_latest else tag)
