"""Folders that DeepSpeed wrote (tests/support/make_deepspeed_fixtures.py), read without it, and running nothing."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_case import (
    BETAS,
    CASES,
    CLIENT_STATE,
    DECAY,
    FOLDER,
    LR,
    SAVED_AT,
    SCALING,
    STEPS,
    Case,
    Model,
    mean_gradients,
)
from logs import logged
from tolerances import ADAM

import pyzero
from pyzero.__main__ import main
from pyzero.checkpoint import convert
from pyzero.checkpoint import from_deepspeed as deepspeed_checkpoint
from pyzero.checkpoint.from_deepspeed import LossScaleState
from pyzero.ops.loss_scale import loss_scale_state

BY_NAME = {case.name: case for case in CASES}
MODEL_FILE = "saved/mp_rank_00_model_states.pt"
OPTIM_FILE = "saved/zero_pp_rank_1_mp_rank_00_optim_states.pt"


def unpacked(name: str, folder: Path) -> Path:
    shutil.unpack_archive(FOLDER / f"{name}.zip", folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return unpacked("fp16-stage2-2ranks", tmp_path)


def build(case: Case, group: Any = None) -> tuple[Model, Any]:
    """Our model and optimizer, whose weights are others than DeepSpeed's until they are loaded."""
    model = Model().to(case.dtype)
    for param in model.parameters():
        param.data.fill_(0.5)
    scale: Any = None
    if case.precision == "fp16":
        scale = pyzero.LossScale(
            growth_interval=SCALING["loss_scale_window"], hysteresis=SCALING["hysteresis"], min_scale=1, growth_delay=1
        )
    if "fp16" in case.config:
        scale = case.config["fp16"]["loss_scale"]
    make = pyzero.FusedZeroAdam if case.params.get("adam_w_mode") is False else pyzero.FusedZeroAdamW
    groups = [{**hyper, "lr": hyper.get("lr", LR)} for hyper in model.groups()]
    for hyper in groups if "elastic_checkpoint" not in case.zero else ():  # an elastic one has no hyper-parameters
        hyper.update(lr=1.0, weight_decay=0.5)
    return model, make(groups, betas=BETAS, process_group=group, loss_scale=scale, bucket_cap_mb=1e-4)


def load(directory: Path, model: Model, optimizer: Any, tag: str | None = None) -> dict[str, Any]:
    convert.import_deepspeed(directory, directory / "ours", tag)
    return pyzero.load_checkpoint(directory / "ours", model=model, optimizer=optimizer)


def resumed(group: Any, name: str, ours: Path) -> tuple[dict[str, dict[str, Any]], list[float]]:
    """What our optimizer makes of the steps that DeepSpeed took from "saved" to "later"."""
    case = BY_NAME[name]
    model, optimizer = build(case, group)
    pyzero.load_checkpoint(ours, model=model, optimizer=optimizer)
    for step in range(SAVED_AT, STEPS):
        optimizer.zero_grad()
        optimizer.backward(model(mean_gradients(model, case, step)))
        optimizer.step()
    state = {n: optimizer.full_state(p) for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    return state, optimizer._scaler.state.tolist()


@pytest.mark.parametrize("name", BY_NAME)
def test_partitions_are_put_together(name, tmp_path):
    case, checkpoint = BY_NAME[name], deepspeed_checkpoint.read(unpacked(name, tmp_path))
    model, optimizer = build(case)
    extra = load(tmp_path, model, optimizer)
    assert extra["step"] == SAVED_AT and extra["client_state"] == CLIENT_STATE
    assert checkpoint.global_steps == SAVED_AT
    assert checkpoint.client_state == CLIENT_STATE and checkpoint.shared == {"head.weight": "embedding.weight"}
    assert checkpoint.skipped_steps == optimizer.skipped_steps == (1 if case.precision == "fp16" else 0)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    assert named.keys() == checkpoint.params.keys()
    for param_name, param in named.items():
        saved = checkpoint.params[param_name]
        assert torch.equal(saved["master"].to(case.dtype), checkpoint.module[param_name])  # DeepSpeed's own weights
        assert not torch.equal(saved["master"], saved["master"].to(case.dtype).float())  # more than those have
        assert torch.equal(param, checkpoint.module[param_name])
        state = optimizer.full_state(param)
        assert all(torch.equal(state[slot], saved[slot]) for slot in ("master", "exp_avg", "exp_avg_sq", "step"))
    assert torch.equal(model.frozen.weight, checkpoint.module["frozen.weight"]) and int(model.num_batches) == 5
    assert [group["lr"] for group in optimizer.param_groups] == [LR, LR / 2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", BY_NAME)
def test_the_next_steps_are_deepspeeds(ranks, name, size, tmp_path):
    later = deepspeed_checkpoint.read(unpacked(name, tmp_path), tag="later")
    command = ["import-deepspeed", str(tmp_path), str(tmp_path / "ours")]
    assert main(command) == 0
    found, scaler = ranks.run(size, resumed, name, tmp_path / "ours")[0]
    tolerance, steps = ADAM[torch.float32], STEPS - SAVED_AT
    largest = 3.0 if BY_NAME[name].num_ranks == 3 else 1.0  # of |gradient|
    assert found.keys() == later.params.keys()
    for param_name, theirs in later.params.items():
        ours = found[param_name]
        magnitude = max(float(theirs["master"].abs().max()), 1.0)
        allowed = {
            "master": math.sqrt(2) * tolerance.master(steps, magnitude, LR, BETAS[1], 1 - LR * DECAY),
            "exp_avg": math.sqrt(2) * tolerance.exp_avg(largest),
            "exp_avg_sq": math.sqrt(2) * tolerance.exp_avg_sq(largest, BETAS[1]),
            "step": 0.0,
        }
        for slot, bound in allowed.items():
            assert float((ours[slot] - theirs[slot]).abs().max()) <= bound, (param_name, slot)
    saved = later.loss_scale
    assert scaler[0] == (saved.scale or 1.0)  # bf16 has none
    if saved.growth_interval is not None:
        assert scaler[1] == saved.growth_tracker and max(scaler[2], 1) == saved.hysteresis_left  # at 1 theirs stays
    assert scaler[3] == later.skipped_steps


def loaded_by_an_engine(group: Any, folder: Path, tag: str) -> tuple[Any, ...]:
    model, optimizer = build(BY_NAME["fp16-stage2-2ranks"], group)
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "fp16": {"enabled": True}}
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}
    engine = pyzero.initialize(model=model, optimizer=optimizer, config={**config, "scheduler": schedule})[0]
    found = engine.load_checkpoint(folder, tag)
    counters = (engine.global_steps, engine.global_samples / engine.world_size, engine.micro_steps)
    masters = {n: optimizer.full_master(p) for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    return found, counters, masters, engine.cur_scale, engine.skipped_steps


def on_all(ranks: Any, size: int, fn: Any, *args: Any) -> list[Any]:
    return ranks.run(size, fn, *args) if size > 1 else [fn(None, *args)]


@pytest.mark.parametrize("size", [1, 4])
def test_an_engine_loads_deepspeeds_folder(ranks, size, tmp_path):
    folder = unpacked("fp16-stage2-2ranks", tmp_path)
    theirs, before = deepspeed_checkpoint.read(folder, "saved"), sorted(folder.rglob("*"))
    for found, counters, masters, scale, skipped in on_all(ranks, size, loaded_by_an_engine, folder, "saved"):
        assert found == (str(folder / "saved"), CLIENT_STATE)
        assert counters == (SAVED_AT, SAVED_AT * 2 * 3, SAVED_AT * 3)
        assert masters.keys() == theirs.params.keys()
        assert all(torch.equal(masters[name], values["master"]) for name, values in theirs.params.items())
        assert (scale, skipped) == (theirs.loss_scale.scale, theirs.skipped_steps)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("size", [1, 4])
def test_an_engine_says_what_is_wrong_with_deepspeeds_folder(ranks, size, tmp_path):
    folder = unpacked("fp16-stage2-2ranks", tmp_path)
    (folder / OPTIM_FILE).unlink()
    for error in on_all(ranks, size, not_loaded_by_an_engine, folder):
        assert "got 1" in error and "copy the files of all ranks" in error
    assert not list(folder.glob(".translated*"))


def test_what_an_engine_saved_over_deepspeeds_is_what_it_loads(folder):
    """Under one tag, as "best": the folder holds both."""
    case = BY_NAME["fp16-stage2-2ranks"]
    model, optimizer = build(case)
    config = {"train_micro_batch_size_per_gpu": 1, "fp16": {"enabled": True}}
    engine = pyzero.initialize(model=model, optimizer=optimizer, config=config)[0]
    engine.load_checkpoint(folder, "saved")
    engine.global_steps += 10
    with torch.no_grad():
        model.linear.weight.fill_(0.25)
    engine.save_checkpoint(folder, "saved", client_state={"whose": "ours"})
    model.linear.weight.data.fill_(0.5)
    assert engine.load_checkpoint(folder, "saved")[1] == {"whose": "ours"}
    assert engine.global_steps == SAVED_AT + 10 and torch.equal(
        model.linear.weight.unique().float(), torch.tensor([0.25])
    )


def not_loaded_by_an_engine(group: Any, folder: Path) -> str:
    with pytest.raises((ValueError, pyzero.CheckpointError)) as caught:
        loaded_by_an_engine(group, folder, "saved")
    return str(caught.value)


def test_before_the_first_step_there_are_masters_alone(tmp_path):
    checkpoint = deepspeed_checkpoint.read(unpacked("fp16-stage1", tmp_path), tag="fresh")
    model, optimizer = build(BY_NAME["fp16-stage1"])
    load(tmp_path, model, optimizer, "fresh")
    assert torch.equal(model.norm.weight, Model().norm.weight.half())
    state = optimizer.full_state(model.norm.weight)
    assert torch.equal(state["master"], checkpoint.params["norm.weight"]["master"])
    assert state["step"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()
    assert optimizer._scaler.state.tolist() == [16.0, -1.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize("num_overflows", [0, 1])
@pytest.mark.parametrize("num_clean", range(6))
def test_the_growth_tracker_is_ours_after_as_many_steps(num_overflows, num_clean):
    state = loss_scale_state(16.0, 1, "cpu", growth_delay=1)
    for found in num_overflows * [1.0] + num_clean * [0.0]:
        pyzero.ops.loss_scale_update_(state, torch.tensor([found]), growth_interval=2, growth_delay=1)
    theirs = LossScaleState(16.0, growth_interval=2, num_clean_steps=num_clean)
    assert state[1] == theirs.growth_tracker


# ---- what is refused ------------------------------------------------------------------------------------------------


class Malicious:
    """Makes a folder when it is unpickled by what will run it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def deepspeed_class(name: str) -> type:
    """A class that pickles under one of DeepSpeed's names."""
    module, _, qualname = name.rpartition(".")
    return type(qualname, (), {"__module__": module, "__qualname__": qualname})


@pytest.fixture
def as_deepspeed(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(name: str) -> Any:
        cls = deepspeed_class(name)
        parts = cls.__module__.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
        setattr(sys.modules[cls.__module__], cls.__name__, cls)
        return cls()

    return make


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("file", [MODEL_FILE, OPTIM_FILE])
def test_a_malicious_file_runs_nothing(folder, file, zipped, tmp_path):
    target = tmp_path / "was_run"
    torch.save({"module": {}, "evil": Malicious(target)}, folder / file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"{Path(file).name}, got one that asks for \w+\.mkdir; nothing"):
        deepspeed_checkpoint.read(folder)
    assert not target.exists()
    torch.load(folder / file, weights_only=False)  # it would have been
    assert target.exists()


def test_a_bare_pickle_runs_nothing(folder, tmp_path):
    target = tmp_path / "was_run"
    (folder / MODEL_FILE).write_bytes(pickle.dumps({"module": Malicious(target)}, protocol=2))
    with pytest.raises(ValueError, match=MODEL_FILE):
        deepspeed_checkpoint.read(folder)
    assert not target.exists()


@pytest.mark.filterwarnings("ignore:.*looks like a TorchScript archive")
def test_a_torchscript_archive_runs_nothing(folder, tmp_path):
    target = tmp_path / "was_run"
    with zipfile.ZipFile(folder / MODEL_FILE, "a") as archive:
        prefix = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{prefix}/constants.pkl", pickle.dumps(Malicious(target), protocol=2))
    with pytest.raises(ValueError, match="expected a whole file of torch.save"):
        deepspeed_checkpoint.read(folder)
    assert not target.exists()


def test_other_classes_of_deepspeed_are_refused_by_name(folder, as_deepspeed):
    scaler = as_deepspeed("deepspeed.runtime.engine.DeepSpeedEngine")
    torch.save({"optimizer_state_dict": {"loss_scaler": scaler}}, folder / OPTIM_FILE)
    with pytest.raises(ValueError, match=r"asks for deepspeed\.runtime\.engine\.DeepSpeedEngine"):
        deepspeed_checkpoint.read(folder)


def test_what_is_allowed_is_so_for_this_file_alone(folder):
    before = torch.serialization.get_safe_globals()
    deepspeed_checkpoint.read(folder)
    assert set(torch.serialization.get_safe_globals()) == set(before)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / OPTIM_FILE, weights_only=True)


@pytest.mark.parametrize("tag", ["../saved", "/etc", "..", ".", "", "saved/../.."])
def test_a_tag_does_not_lead_outside(folder, tag):
    (folder / "latest").write_text(tag)
    with pytest.raises(ValueError, match="expected a tag that names a folder"):
        deepspeed_checkpoint.read(folder)
    with pytest.raises(ValueError, match="expected a tag that names a folder"):
        deepspeed_checkpoint.read(folder / "saved", tag=tag)


def test_a_tag_may_be_a_path(folder):
    """DeepSpeed joins it to the folder, as it is."""
    wanted = deepspeed_checkpoint.read(folder).module
    (folder / "runs").mkdir()
    (folder / "saved").rename(folder / "runs" / "first")
    (folder / "latest").write_text("runs/first")
    for tag in (None, "runs/first"):
        found = deepspeed_checkpoint.read(folder, tag).module
        assert (
            wanted and found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
        )


def flip_a_bit(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        place = max(archive.infolist(), key=lambda info: info.file_size if "/data/" in info.filename else 0)
    data = bytearray(path.read_bytes())
    data[place.header_offset + 200] ^= 4
    path.write_bytes(data)


def overwrite(path: Path, found: bytes, by: bytes) -> None:
    data = path.read_bytes()
    assert found in data
    path.write_bytes(data.replace(found, by, 1))


DAMAGES = {
    "truncated": lambda folder: os.truncate(folder / OPTIM_FILE, 3000),
    "empty": lambda folder: os.truncate(folder / OPTIM_FILE, 0),
    "flipped": lambda folder: flip_a_bit(folder / OPTIM_FILE),
    "another directory": lambda folder: overwrite(folder / OPTIM_FILE, b"PK\1\2", b"PK\1\3"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(folder, damage):
    DAMAGES[damage](folder)
    with pytest.raises(ValueError, match=f"expected a whole file of torch.save, got .*{Path(OPTIM_FILE).name}"):
        deepspeed_checkpoint.read(folder)


def make_universal(folder: Path) -> None:
    """As ds_to_universal.py does, in which each parameter has a folder."""
    for path in folder.glob("*_optim_states.pt"):
        path.unlink()
    (folder / "zero" / "embedding.weight").mkdir(parents=True)


MISFITS = {
    r"those of \[0\]|2 ranks|files of \[2, 2\] ranks": lambda folder: (folder / OPTIM_FILE).unlink(),
    r"those of \[1\]": lambda folder: (folder / OPTIM_FILE.replace("rank_1_mp", "rank_0_mp")).unlink(),
    r"files of \[2, 2\] ranks .* got 3": lambda folder: shutil.copy(
        folder / OPTIM_FILE, folder / OPTIM_FILE.replace("rank_1_mp", "rank_2_mp")
    ),
    r"expected .*mp_rank_00_model_states\.pt, got no such file": lambda folder: (folder / MODEL_FILE).unlink(),
    r"zero_pp_rank_0_mp_rank_00_model_states\.pt .* stage 3": lambda folder: shutil.copy(
        folder / MODEL_FILE, folder / "saved/zero_pp_rank_0_mp_rank_00_model_states.pt"
    ),
    r"mp_rank_01_model_states\.pt": lambda folder: shutil.copy(
        folder / MODEL_FILE, folder / "saved/mp_rank_01_model_states.pt"
    ),
    r"optimizer_state_dict as a dict": lambda folder: shutil.copy(folder / MODEL_FILE, folder / OPTIM_FILE),
    r"expected \d+ values of master of \S+": lambda folder: shutil.copy(
        folder / OPTIM_FILE.replace("rank_1_mp", "rank_0_mp"), folder / OPTIM_FILE
    ),
    r"a universal checkpoint in .* the tag that it was made from": lambda folder: make_universal(folder / "saved"),
    r"latest, which names the newest": lambda folder: (folder / "latest").unlink(),
    r"the files of one save in .*, got these steps by rank: {0: 2.0, 1: 5.0}": lambda folder: shutil.copy(
        folder / OPTIM_FILE.replace("saved", "later"), folder / OPTIM_FILE
    ),
}


@pytest.mark.parametrize("message", MISFITS)
def test_files_that_do_not_belong_together(folder, message):
    MISFITS[message](folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        deepspeed_checkpoint.read(folder)


def test_a_folder_of_our_own_needs_no_conversion(tmp_path, capsys):
    model = torch.nn.Linear(2, 2)
    engine, *_ = pyzero.initialize(model=model, config={"train_batch_size": 1, "optimizer": {"type": "Adam"}})
    engine.save_checkpoint(tmp_path / "saved")
    assert main(["import-deepspeed", str(tmp_path / "saved"), str(tmp_path / "ours")]) == 1
    assert "got pyzero's own checkpoint, which needs no conversion; pass" in capsys.readouterr().err


def test_a_model_file_of_another_save_is_told_of(folder):
    with logged() as lines:
        deepspeed_checkpoint.read(folder)
        assert not lines
        shutil.copy(folder / MODEL_FILE.replace("saved", "later"), folder / MODEL_FILE)
        deepspeed_checkpoint.read(folder)
    (line,) = lines
    assert "are not the masters of the optimizer's files, embedding.weight first" in line


def test_deepspeeds_own_folder_takes_no_checkpoint_of_ours(folder):
    """Whose `latest` would be lost."""
    with pytest.raises(ValueError, match="expected a folder for the new checkpoint other than .*, got the same"):
        convert.import_deepspeed(folder, folder / "saved" / "..")
    assert (folder / "latest").read_text() == "saved" and not [*folder.glob("step_*")]


def test_a_folder_that_is_none(tmp_path, capsys):
    assert main(["import-deepspeed", str(tmp_path / "nothing"), str(tmp_path / "ours")]) == 1
    assert "python -m pyzero import-deepspeed: " in capsys.readouterr().err and not (tmp_path / "ours").exists()
