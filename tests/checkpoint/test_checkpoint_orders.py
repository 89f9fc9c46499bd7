"""Checkpoints and state dicts in orders that are unusual, and legitimate."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from own_groups import OwnGroups
from resume import SAVED_AT, STEPS, assert_equal, build, make, outcome, train, uninterrupted
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.serialization import get_crc32_options

import pyzero
from pyzero.checkpoint import files, saving, storage
from pyzero.checkpoint.agreement import run_on_all_ranks
from pyzero.comm.group import Group

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
NUM_RANKS = pytest.mark.parametrize("size", [1, 2])


# ---- asynchronous saves ---------------------------------------------------------------------------------------------


def after_async(group: Any, path: Path, then: str) -> list[Any]:
    """What is loaded where a save is under way when the next call comes, earlier on one rank than on the other."""
    model = nn.ParameterList([nn.Parameter(torch.full((1 << 20,), 1.0))])
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    first = pyzero.async_save_checkpoint(path, model=model, optimizer=optimizer, step=1)
    with torch.no_grad():
        model[0].fill_(2.0)
    time.sleep(0.1 * group.rank())
    if then == "save":
        pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=2)
    elif then == "async":
        pyzero.async_save_checkpoint(path, model=model, optimizer=optimizer, step=2)
    extra = pyzero.load_checkpoint(path, model=model, optimizer=optimizer)
    return [first.result().name, extra["step"], float(model[0].min()), float(model[0].max())]


@NUM_RANKS
@pytest.mark.parametrize("then", ["save", "async", "load"])
def test_what_follows_an_asynchronous_save_waits_for_it(ranks, tmp_path, size, then):
    step = 1 if then == "load" else 2
    assert ranks.run(size, after_async, tmp_path, then) == [["step_1", step, step, step]] * size


def test_an_asynchronous_save_goes_where_it_was_sent(tmp_path, monkeypatch):
    big, small = nn.Linear(1500, 1500), nn.Linear(2, 2)
    monkeypatch.chdir(tmp_path)
    for name, model in (("first", big), ("second", small)):
        optimizer = pyzero.FusedZeroAdamW(model.parameters())
        future = pyzero.async_save_checkpoint(name, model=model, optimizer=optimizer, step=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert future.result() == tmp_path / "second" / "step_1"


@pytest.mark.parametrize("steps", [(1, 1), (1, 2)], ids=str)
def test_a_save_waits_for_another_optimizers_into_the_same_directory(tmp_path, steps):
    big, small = nn.Linear(1500, 1500), nn.Linear(2, 2)
    optimizer = pyzero.FusedZeroAdamW(big.parameters())
    first = pyzero.async_save_checkpoint(tmp_path, model=big, optimizer=optimizer, step=steps[0])
    del optimizer
    optimizer = pyzero.FusedZeroAdamW(small.parameters())
    pyzero.save_checkpoint(tmp_path, model=small, optimizer=optimizer, step=steps[1])
    assert first.result() == tmp_path / "step_1"
    assert pyzero.load_checkpoint(tmp_path, model=small, optimizer=optimizer)["step"] == steps[1]


def built_anew(group: Any, path: Path) -> tuple[int, float]:
    """What a run loads that begins again in its process, as after an error, while a save is under way."""
    for value in (1.0, 2.0):
        model = nn.ParameterList([nn.Parameter(torch.full((1 << 20,), value))])
        optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
        future = pyzero.async_save_checkpoint(path, model=model, optimizer=optimizer, step=int(value), keep=1)
        if value == 1.0:
            future.result()
    model = nn.ParameterList([nn.Parameter(torch.zeros(1 << 20))])
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    step = pyzero.load_checkpoint(path, model=model, optimizer=optimizer)["step"]
    return step, float(model[0].min())


@NUM_RANKS
def test_a_load_waits_for_another_optimizers_save(ranks, tmp_path, size):
    assert ranks.run(size, built_anew, tmp_path) == [(2, 2.0)] * size


def test_the_latest_is_found_while_another_job_saves(tmp_path, monkeypatch):
    """It replaces `latest` and removes the checkpoint before between two looks at the directory."""
    model = nn.Linear(2, 2)
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=2)
    texts = ["step_1\n", "step_2\n", "step_2\n"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *args, **options: texts.pop(0))
        assert pyzero.latest_checkpoint(tmp_path) == tmp_path / "step_2"
    (tmp_path / "latest").write_text("step_1\n")
    stat, seen = Path.stat, []

    def stat_before_it_goes(path: Path, **options: Any) -> os.stat_result:
        if path.name == files.INDEX and path.parent.name == "step_2":
            seen.append(path)
            if len(seen) > 1:
                raise FileNotFoundError(2, "No such file or directory", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", stat_before_it_goes)
    with pytest.raises(pyzero.CheckpointError, match="got 'step_1'; load one of these by its path: there is none"):
        pyzero.latest_checkpoint(tmp_path)


LAST_LINE = """
import sys
import torch
import pyzero

model = torch.nn.Linear(512, 512)
optimizer = pyzero.FusedZeroAdamW(model.parameters())
pyzero.async_save_checkpoint(sys.argv[1], model=model, optimizer=optimizer, step=1)
"""


def test_an_asynchronous_save_changes_nothing_for_other_threads(tmp_path, monkeypatch):
    """Filters of warnings are one list for all threads; what two of them put back in turn is not what it was."""
    model = nn.Linear(2, 2)
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    is_writing, may_go_on = threading.Event(), threading.Event()
    lookup = storage._AliasPlanner.lookup_object

    def slow(*args: Any) -> Any:
        is_writing.set()
        assert may_go_on.wait(60)
        return lookup(*args)

    monkeypatch.setattr(storage._AliasPlanner, "lookup_object", slow)
    before = [*warnings.filters], get_crc32_options()
    saving = pyzero.async_save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    try:
        assert is_writing.wait(60)
        assert ([*warnings.filters], get_crc32_options()) == before
    finally:
        may_go_on.set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saving.result()
        pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=2)
        assert pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer)["step"] == 2
    assert ([*warnings.filters], get_crc32_options()) == before


def test_a_program_that_ends_waits_for_an_asynchronous_save(tmp_path):
    """Where no executor takes work any more."""
    subprocess.run([sys.executable, "-c", LAST_LINE, str(tmp_path)], check=True, timeout=120)
    model = nn.Linear(512, 512)
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    assert pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer)["step"] == 1


FORK = """
import os
import sys
import threading
import torch
import pyzero
from pyzero.checkpoint import files

parent, child = sys.argv[1:]
model = torch.nn.Linear(2, 2)  # no OpenMP, whose threads a child has not either
optimizer = pyzero.FusedZeroAdamW(model.parameters())
forked, commit = threading.Event(), files.commit
files.commit = lambda *args: (forked.wait(), commit(*args))
saving = pyzero.async_save_checkpoint(parent, model=model, optimizer=optimizer, step=1)
pid = os.fork()
if not pid:
    files.commit = commit
    pyzero.save_checkpoint(child, model=model, optimizer=optimizer, step=2)
    pyzero.async_save_checkpoint(child, model=model, optimizer=optimizer, step=3).result()
    os._exit(0)
status = os.waitpid(pid, 0)[1]
forked.set()
saving.result()
sys.exit(status != 0)
"""


def test_a_forked_child_waits_for_no_save_of_its_parent(tmp_path):
    """Whose thread it has not."""
    parent, child = tmp_path / "parent", tmp_path / "child"
    subprocess.run([sys.executable, "-c", FORK, str(parent), str(child)], check=True, timeout=60)
    assert [pyzero.latest_checkpoint(folder).name for folder in (parent, child)] == ["step_1", "step_3"]


def cancelled(group: Any, path: Path) -> list[Any]:
    """What becomes of a save that one rank wants to cancel while it waits for another's end, and of the next one."""
    models = [nn.Linear(2, 2) for _ in range(2)]
    optimizers = [pyzero.FusedZeroAdamW(model.parameters(), process_group=group) for model in models]
    before, commit = threading.Event(), files.commit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "commit", lambda *args: (before.wait(), commit(*args)))
        first, second = (
            pyzero.async_save_checkpoint(path / str(number), model=model, optimizer=optimizer, step=1)
            for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True))
        )
        found = [group.rank() == 0 and second.cancel()]
        before.set()
        names = [saving.result().name for saving in (first, second)]
    names.append(pyzero.save_checkpoint(path / "1", model=models[1], optimizer=optimizers[1], step=2).name)
    return found + names


@NUM_RANKS
def test_a_save_that_waits_is_not_cancelled(ranks, tmp_path, size):
    assert ranks.run(size, cancelled, tmp_path) == [[False, "step_1", "step_1", "step_2"]] * size


def interrupted(group: Any, path: Path, error: type[BaseException], interrupted_rank: int) -> list[str]:
    """What a save and a load raise while one rank is interrupted."""
    from pyzero.checkpoint.storage import ChecksummedWriter, IndexedReader

    model = nn.Linear(2, 2)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=1)
    found = []
    for owner, name in ((ChecksummedWriter, "write_data"), (IndexedReader, "read_data")):
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank(group) == interrupted_rank:
                patch.setattr(owner, name, lambda *_: (_ for _ in ()).throw(error("now")))
            with pytest.raises((pyzero.CheckpointError, error)) as caught:
                if owner is ChecksummedWriter:
                    pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=2)
                else:
                    pyzero.load_checkpoint(path, model=model, optimizer=optimizer)
        found.append(f"{type(caught.value).__name__}: {caught.value}")
    return found


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupt_is_no_failure_of_a_checkpoint(ranks, tmp_path, error, rank):
    """Which a loop may catch, and go on. The other rank is told."""
    found = ranks.run(2, interrupted, tmp_path, error, rank)
    assert found[rank] == [f"{error.__name__}: now"] * 2
    assert all(text.startswith("CheckpointError: ") and error.__name__ in text for text in found[1 - rank])


# ---- modules --------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """With extra state, of one kind or another."""

    def __init__(self, kind: str, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.kind, self.count = kind, count

    def forward(self, inputs: Tensor) -> Any:
        return self.linear(inputs)

    def get_extra_state(self) -> Any:
        count = torch.tensor(self.count)
        return {"int": self.count, "tensor": count, "dict": {"a": count}, "list": [count]}[self.kind]

    def set_extra_state(self, state: Any) -> None:
        self.count = int(state["a"] if self.kind == "dict" else state[0] if self.kind == "list" else state)


@pytest.mark.parametrize("wrap", [nn.Identity, torch.compile], ids=["plain", "compiled"])
@pytest.mark.parametrize("kind", ["int", "tensor", "dict", "list"])
def test_extra_state_of_modules_comes_back(tmp_path, kind, wrap):
    counts = []
    for count, call in ((7, "save"), (0, "load")):
        module = Counting(kind, count)
        model = nn.ModuleDict({"inner": module})
        wrapped = torch.compile(model) if wrap is torch.compile else model
        optimizer = pyzero.FusedZeroAdamW(model.parameters())
        if call == "save":
            folder = pyzero.save_checkpoint(tmp_path, model=wrapped, optimizer=optimizer, step=1)
        else:
            pyzero.load_checkpoint(tmp_path, model=wrapped, optimizer=optimizer)
        counts.append(module.count)
    assert counts == [7, 7]
    theirs = {"model": nn.ModuleDict({"inner": Counting(kind, 0)}).state_dict()}
    dcp.load(theirs, checkpoint_id=folder)
    assert_equal(theirs["model"]["inner._extra_state"], Counting(kind, 7).get_extra_state())


def of_ddp(group: Any, path: Path) -> list[Any]:
    found = []
    for count, seed in ((7, 1), (0, 2)):
        torch.manual_seed(seed)
        module = Counting("int", count)
        model = DistributedDataParallel(module, process_group=group)
        optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, reduce_grads=False)
        if count:
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=1)
        else:
            pyzero.load_checkpoint(path, model=model, optimizer=optimizer)
        found.append([module.state_dict(), optimizer.full_state_dict()])
    return found


def test_a_wrapped_model(ranks, tmp_path):
    for before, after in ranks.run(2, of_ddp, tmp_path):
        assert_equal(after, before)


# ---- parameters that were frozen ------------------------------------------------------------------------------------


def unfrozen(group: Any, dtype: torch.dtype, path: Path, how: str, when: int) -> list[Any]:
    """Train, save after step `when`, resume; parameters are unfrozen after or before the optimizer is built."""

    def make_one(seed: int, frozen: bool) -> tuple[Any, Any]:
        model = build(dtype, seed)
        for index in (1, 4):
            model.weights[index].requires_grad_(not frozen)
        optimizer = make("adamw", model, group, bucket_cap_mb=4e-4)
        model.requires_grad_(True)
        return model, optimizer

    model, optimizer = make_one(0, True)
    train(optimizer, model, range(when), group)
    state = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    if how == "checkpoint":
        pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=when)
    train(optimizer, model, range(when, STEPS), group)
    found = [outcome(optimizer, model)[1:]]
    for frozen in (True, False):
        model, optimizer = make_one(1, frozen)
        if how == "checkpoint":
            pyzero.load_checkpoint(path, model=model, optimizer=optimizer)
        else:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        train(optimizer, model, range(when, STEPS), group)
        found.append(outcome(optimizer, model)[1:])
    return found


@NUM_RANKS
@DTYPES
@pytest.mark.parametrize(("how", "when"), [("checkpoint", 0), ("checkpoint", SAVED_AT), ("state_dict()", SAVED_AT)])
def test_it_does_not_matter_when_parameters_were_unfrozen(ranks, tmp_path, size, dtype, how, when):
    for wanted, *resumed in ranks.run(size, unfrozen, dtype, tmp_path, how, when):
        for got in resumed:
            assert_equal(got, wanted)


# ---- state dicts ----------------------------------------------------------------------------------------------------


def in_place(group: Any, dtype: torch.dtype, stage: int, path: Path) -> list[Any]:
    """torch's state dicts are the state itself: what is read into them before the first step is there."""
    for seed in (0, 1):
        model = build(dtype, seed)
        optimizer = make("adamw", model, group, stage=stage, bucket_cap_mb=4e-4)
        if seed == 0:
            train(optimizer, model, range(SAVED_AT), group)
            state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
            dcp.save(state, checkpoint_id=path, process_group=group)
    state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=path, process_group=group)
    train(optimizer, model, range(SAVED_AT, STEPS), group)
    return [values for values in outcome(optimizer, model)[1]["state"].values()]


@DTYPES
@pytest.mark.parametrize("stage", [1, 2])
def test_what_is_written_in_place_survives_the_first_step(ranks, tmp_path, stage, dtype):
    wanted = list(ranks.run(2, uninterrupted, "adamw", dtype)[0][1]["state"].values())
    for got in ranks.run(2, in_place, dtype, stage, tmp_path):
        assert_equal(got, wanted)


def own_files(group: Any, stage: int, moment: int) -> Any:
    """Buckets of one small parameter each, whole on rank 0; rank 1 loads what it saved before step `moment`."""
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.randn(60)) for _ in range(4)])
    states = []

    def run(optimizer: Any, num_steps: int, order: list[int]) -> None:
        for _ in range(num_steps):
            file = io.BytesIO()
            torch.save((list(model.state_dict().values()), optimizer.state_dict()), file)
            states.append(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
            values = torch.zeros(())
            for index in order:  # gradients come in reversed order
                values = (values + (index + 1) * model[index].sum()).tanh() + model[index].square().sum()
            values.backward()
            optimizer.step()
            optimizer.zero_grad()

    def build_one() -> Any:
        return pyzero.FusedZeroAdamW(model.parameters(), stage=stage, process_group=group, bucket_cap_mb=1e-5, lr=0.1)

    run(build_one(), 3, [2, 0, 3, 1])
    wanted = [param.detach().clone() for param in model]
    weights, _ = states[2]
    _, state = states[2 if group.rank() == 0 else moment]
    model.load_state_dict(dict(zip("0123", weights, strict=True)))
    optimizer = build_one()
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        return str(error)
    run(optimizer, 1, [2, 0, 3, 1])
    return [param.detach().clone() for param in model], wanted


def test_a_rank_that_holds_all_takes_over_the_cut(ranks):
    for got, wanted in ranks.run(2, own_files, 2, 2):
        assert_equal(got, wanted)


@pytest.mark.parametrize("stage", [1, 2])
def test_files_of_different_saves_are_refused(ranks, stage):
    for text in ranks.run(2, own_files, stage, 0):
        assert "expected state dicts that all ranks saved at once" in text


# ---- one rank that is not as the others -----------------------------------------------------------------------------


def spoiled(group: Any, path: Path, call: str, harm: str, model_parallel: bool) -> str:
    """What is raised where the last rank's parameters are not as its optimizer has them; then all goes on."""
    options: dict[str, Any] = {"process_group": group}
    if model_parallel:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        options = {"process_group": mesh["dp"], "model_parallel_group": mesh["tp"]}
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 3)])
    model[1].requires_grad_(False)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), **options)
    pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=1)
    state = optimizer.full_state_dict()
    weight, params = model[0].weight, optimizer.param_groups[0]["params"]
    is_bad = group.rank() == group.size() - 1
    if harm == "unfrozen":
        model[1].requires_grad_(True)
    if is_bad and harm == "converted":
        weight.data = weight.data.double()
    elif is_bad:
        del params[0]
    if is_bad and harm == "hook":
        params.insert(0, weight)
        optimizer.register_load_state_dict_pre_hook(lambda *_: {}["of the caller"])

    def act() -> None:
        if call == "load_state_dict":
            optimizer.load_state_dict(state)
        elif call == "load":
            pyzero.load_checkpoint(path, model=model, optimizer=optimizer, strict=harm != "unfrozen")
        else:
            pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=2)

    with pytest.raises((LookupError, RuntimeError, TypeError, ValueError)) as raised:
        act()
    if is_bad and harm == "converted":
        weight.data = weight.data.float()
    elif is_bad and harm != "hook":
        params.insert(0, weight)
    optimizer._optimizer_load_state_dict_pre_hooks.clear()
    if harm == "unfrozen" and call == "load_state_dict":
        state = optimizer.full_state_dict()
    act()
    return f"{type(raised.value).__name__}: {raised.value}"


@pytest.mark.parametrize(
    ("call", "harm"),
    [(call, harm) for call in ("load_state_dict", "load", "save") for harm in ("converted", "taken out", "unfrozen")]
    + [("load_state_dict", "hook")],
)
def test_a_rank_whose_parameters_do_not_fit_is_told_of_on_all(ranks, tmp_path, call, harm):
    """At once: it left the others to wait until their collective timed out, and ranks out of step."""
    other, bad = ranks.run(2, spoiled, tmp_path, call, harm, False)
    said = {"converted": "TypeError: expected a parameter in float32", "hook": "KeyError: 'of the caller'"}
    assert said.get(harm, "ValueError: expected the parameters in the groups") in bad
    assert "on rank 1 of 2" in other or "rank 1 could not" in other
    assert bad.split(": ", 1)[1][:40] in other


@pytest.mark.parametrize("call", ["load", "save"])
def test_so_is_one_of_another_part_of_the_model(ranks, tmp_path, call):
    for harm in ("converted", "taken out"):
        *others, _ = ranks.run(4, spoiled, tmp_path / harm, call, harm, True)
        assert all("on rank 3 of 4: " in other for other in others)


def unfrozen_alone(group: Any, path: Path, call: str) -> tuple[str, float]:
    """What is said, and after how many seconds."""
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 3)])
    model[1].requires_grad_(False)
    optimizer = pyzero.FusedZeroAdamW([{"params": part.parameters()} for part in model], process_group=group)
    state = optimizer.full_state_dict()
    pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=0)

    def act() -> None:
        if call == "load_state_dict":
            optimizer.load_state_dict(state)
        elif call == "save":
            pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=1)
        else:
            pyzero.load_checkpoint(path, model=model, optimizer=optimizer)

    model[1].bias.requires_grad_(group.rank() == 1)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="expected the same parameters to be trained") as raised:
        act()
    took = time.monotonic() - begin
    model[1].requires_grad_(False)
    act()
    return str(raised.value), took


@pytest.mark.parametrize("call", ["load_state_dict", "load", "save"])
def test_parameters_unfrozen_on_one_rank_alone_are_told_of(ranks, tmp_path, call):
    for said, took in ranks.run(2, unfrozen_alone, tmp_path, call):
        assert "got parameter 1 of group 1 no longer frozen on rank 1 of 2 alone; unfreeze it on all ranks" in said
        assert took < 4.0  # after 5 s a rank that waits asks the others


def comparisons(group: Any, path: Path) -> list[int]:
    """How often a save compares what is no longer frozen: before and after something is."""
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 3)])
    model[1].requires_grad_(False)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    found = []
    for is_unfrozen in (False, True):
        model[1].requires_grad_(is_unfrozen)
        with mock.patch.object(saving, "check_unfrozen", wraps=saving.check_unfrozen) as check:
            pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=0)
        found.append(check.call_count)
    return found


def test_a_save_compares_what_is_no_longer_frozen_once(ranks, tmp_path):
    assert ranks.run(3, comparisons, tmp_path) == [[0, 1]] * 3


def test_an_error_of_a_load_or_a_save_keeps_nothing_alive(tmp_path):
    """Neither what was given, nor what the callers have: a state dict may be the most that a process has."""
    model = nn.Linear(3, 4)
    optimizer = pyzero.FusedZeroAdamW(model.parameters())

    def fails(act: Any) -> weakref.ref[Tensor]:
        kept = torch.ones(4)
        with contextlib.suppress(ValueError, pyzero.CheckpointError):
            act({"state": {0: {"exp_avg": kept}}, "param_groups": []})
            raise AssertionError
        return weakref.ref(kept)

    found = []
    gc.collect()
    gc.disable()
    try:
        found.append(fails(optimizer.load_state_dict))
        found.append(fails(lambda _: pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer)))
        found.append(fails(lambda _: pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=-1)))
        del optimizer.param_groups[0]["params"][1]
        found.append(fails(optimizer.load_state_dict))
        found.append(fails(lambda _: pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)))
        alive = [ref() is not None for ref in found]
    finally:
        gc.enable()
    assert not any(alive)


# ---- names, steps, folders ------------------------------------------------------------------------------------------


def test_names_of_parameters_stay_with_the_groups(tmp_path):
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    named = list(model.named_parameters())
    optimizer = pyzero.FusedZeroAdamW([{"params": named[:2]}, {"params": named[2:]}], lr=0.5)
    pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    optimizer = pyzero.FusedZeroAdamW([{"params": named[:0:-1]}, {"params": named[:1]}])
    pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    found = [(group["lr"], group["param_names"]) for group in optimizer.param_groups]
    assert found == [(0.5, ["1.bias", "1.weight", "0.bias"]), (0.5, ["0.weight"])]


@pytest.mark.parametrize("step", [-1, 1.5, "1"])
def test_a_step_is_a_whole_number(tmp_path, step):
    model = nn.Linear(2, 2)
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    with pytest.raises(ValueError, match="expected step as a whole number from 0 on, got"):
        pyzero.save_checkpoint(tmp_path / "none", model=model, optimizer=optimizer, step=step)
    assert not list(tmp_path.iterdir())


def steps_differ(group: Any, path: Path) -> str:
    model = nn.Linear(2, 2)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    with pytest.raises(ValueError, match="expected the same step on every rank") as caught:
        pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=1 + dist.get_rank(group))
    return str(caught.value)


def test_ranks_at_different_steps_are_told(ranks, tmp_path):
    assert all("got [1, 2]" in text for text in ranks.run(2, steps_differ, tmp_path))
    assert not list(tmp_path.iterdir())


def lacks_a_path(group: Any, path: Path) -> list[str]:
    """Rank 1 thinks that only rank 0 needs one."""
    model = nn.Linear(2, 2)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=1)
    mine: Any = None if dist.get_rank(group) else path
    found = []
    for call, options in ((pyzero.save_checkpoint, {"step": 1}), (pyzero.load_checkpoint, {})):
        with pytest.raises((TypeError, pyzero.CheckpointError)) as caught:
            call(mine, model=model, optimizer=optimizer, **options)
        found.append(str(caught.value))
    return found


def test_a_rank_without_a_path_leaves_no_other_waiting(ranks, tmp_path):
    first, second = ranks.run(2, lacks_a_path, tmp_path)
    assert all("failed on rank 1 of 2: TypeError: expected str" in text for text in first)
    assert all(text.startswith("expected str") for text in second)


def different(group: Any, path: Path, how: str) -> Any:
    """Rank 1 looks into another folder, or still sees an old `latest`."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    for step in (1, 2):
        pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=step)
    weights = model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    if how == "folder":
        with pytest.raises(pyzero.CheckpointError) as caught:
            pyzero.load_checkpoint(path / f"step_{1 + group.rank()}", model=model, optimizer=optimizer)
        assert not model.weight.any()
        return str(caught.value)
    if group.rank() == 1:
        stale = path.with_name("stale")
        stale.mkdir()
        for step in (1, 2):
            (stale / f"step_{step}").symlink_to(path / f"step_{step}")
        (stale / "latest").write_text("step_1")
        path = stale
    step = pyzero.load_checkpoint(path, model=model, optimizer=optimizer)["step"]
    return step, torch.equal(model.weight, weights)


def test_ranks_load_one_checkpoint(ranks, tmp_path):
    said = "got step 1 on rank 0 and another, of step 2, on rank 1"
    assert all(said in text for text in ranks.run(2, different, tmp_path / "one", "folder"))
    assert ranks.run(2, different, tmp_path / "two", "latest") == [(2, True)] * 2


def test_checkpoints_without_latest_are_not_overlooked(tmp_path):
    """A run that is told that there is none would begin anew, and remove them with keep=."""
    model = nn.Linear(2, 2)
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    for step in (1, 2):
        pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=step)
        (tmp_path / "latest").unlink()
        if step == 1:
            assert pyzero.latest_checkpoint(tmp_path) == tmp_path / "step_1"
    with pytest.raises(pyzero.CheckpointError, match="to name one of step_1, step_2, got no such file"):
        pyzero.latest_checkpoint(tmp_path)


def test_a_save_in_a_thread_is_on_the_gpu_of_its_optimizer(tmp_path, monkeypatch):
    """A thread begins on the first GPU, where torch's writer would make a context for every rank."""
    seen = []

    @contextlib.contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        seen.append(device)
        yield
        seen.append("left")

    monkeypatch.setattr(saving, "on_device", on_device)
    model = nn.Linear(2, 1)
    optimizer = pyzero.FusedZeroAdamW([{"params": []}, {"params": model.parameters()}])
    pyzero.async_save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1).result()
    assert seen == [torch.device("cpu"), "left"]


# ---- interrupts, and groups that are gone ---------------------------------------------------------------------------


def interrupted_phase(group: Any) -> tuple[str, str]:
    """One rank is interrupted in a step of a save; the next one is in step again."""
    ours = Group(group)

    def act() -> int:
        if ours.rank == 0:
            raise KeyboardInterrupt
        return 1

    try:
        run_on_all_ranks(ours, "the save", act)
        said = "nothing"
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    return said, str(run_on_all_ranks(ours, "the next", lambda: ours.rank))


def test_an_interrupt_is_told_to_the_other_ranks(ranks):
    [(mine, first), (theirs, second)] = ranks.run(2, interrupted_phase)
    assert mine.startswith("KeyboardInterrupt") and (first, second) == ("0", "1")
    assert theirs == "CheckpointError: the save failed on rank 0 of 2: KeyboardInterrupt: "


def interrupted_wait(group: Any, path: Path) -> tuple[str, float]:
    """Rank 0 is interrupted while torch waits for the other one in a save. What each raises, and after how long."""

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    model = nn.Linear(2, 2)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    begin = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        if group.rank() == 0:
            patch.setattr(storage, "_save_state_dict", interrupt)
        with pytest.raises((KeyboardInterrupt, pyzero.CollectiveError)) as caught:
            pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=1)
    return type(caught.value).__name__, time.monotonic() - begin


def test_an_interrupt_in_torchs_wait_for_another_rank_is_raised_at_once(ranks, tmp_path):
    run = OwnGroups(ranks, timeout_s=6)
    [(mine, seconds), (theirs, _)] = run(2, interrupted_wait, tmp_path)
    assert (mine, theirs) == ("KeyboardInterrupt", "CollectiveError")
    assert seconds < 5


def failed_load(group: Any, path: Path) -> str:
    """Rank 1 cannot read."""
    model = nn.Linear(2, 2)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(pyzero.CheckpointError) as caught:
        if group.rank() == 1:
            patch.setattr(storage.IndexedReader, "read_data", lambda *_: (_ for _ in ()).throw(MemoryError("8 GB")))
        pyzero.load_checkpoint(path, model=model, optimizer=optimizer)
    return str(caught.value)


def test_the_rank_that_could_not_load_is_named(ranks, tmp_path):
    theirs, mine = ranks.run(2, failed_load, tmp_path)
    assert "failed on rank 1 of 2" in theirs and "rank 0" not in theirs + mine
    assert mine.endswith("failed: MemoryError: 8 GB")


def without_a_process_group(group: Any, path: Path, warm: bool) -> list[str]:
    """Of each call after the group is gone; warm: a checkpoint was saved before."""
    model = nn.Linear(4, 2)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    full = optimizer.full_state_dict()
    if warm:
        pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=1)
    acts = [
        lambda: pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=2),
        lambda: pyzero.async_save_checkpoint(path, model=model, optimizer=optimizer, step=2),
        lambda: pyzero.load_checkpoint(path, model=model, optimizer=optimizer),
        lambda: optimizer.load_state_dict(full),
        *([] if warm else [optimizer.state_dict]),
    ]
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        for act in acts:
            with pytest.raises(RuntimeError) as caught:
                act()
            texts.append(str(caught.value))
    return texts


@pytest.mark.parametrize("warm", [False, True])
def test_what_comes_after_the_process_group_is_gone_is_an_error(ranks, tmp_path, warm):
    for text in sum(ranks.run(2, without_a_process_group, tmp_path, warm), []):
        assert "got it destroyed; save and load before torch.distributed.destroy_process_group()" in text


def test_a_save_whose_process_group_is_gone_is_an_error(tmp_path, monkeypatch):
    """torch would have each rank write the same files, as if it were alone."""
    monkeypatch.setattr(storage.dist, "is_initialized", lambda: False)
    with pytest.raises(pyzero.CheckpointError, match=r"call result\(\) of what async_save_checkpoint has returned"):
        storage.write({}, tmp_path, object(), {}, print)
    assert not [*tmp_path.iterdir()]


def test_what_is_not_complete_takes_no_checkpoints_place(tmp_path):
    model = nn.Linear(4, 2)
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1, keep=1)
    index = files.read_index(tmp_path / "step_1")
    next(iter(index["tensors"].values()))["boxes"].pop()
    folder = files.begin(tmp_path, 2)
    with pytest.raises(pyzero.CheckpointError, match="is not complete: .* elements, expected"):
        files.commit(folder, index, keep=1)
    assert (tmp_path / "latest").read_text() == "step_1\n" and (tmp_path / "step_1").is_dir()
