"""The names that DeepSpeed's scripts use on an engine do the same here."""

import copy
import csv
import dataclasses
import gc
import itertools
import logging
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyzero
from pyzero.comm import process
from pyzero.deepspeed import launcher
from pyzero.deepspeed.config.reader import load
from pyzero.deepspeed.engine.engine import Engine
from pyzero.deepspeed.monitor import Monitor
from pyzero.deepspeed.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from pyzero.deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from pyzero.deepspeed.ops.lamb import FusedLamb
from pyzero.deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from pyzero.deepspeed.pipe import PipelineModule

ADAM = {"type": "Adam", "params": {"lr": 0.25, "betas": [0.5, 0.5]}}


class Net(nn.Module):
    """A model whose gradients are sums of inputs, and so exact."""

    def __init__(self, wraps: Any = lambda y: y) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.wraps = wraps
        self.hidden_size = 4

    def forward(self, x: Tensor) -> Any:
        return self.wraps((x * self.weight).sum(1))

    def generate(self, num: int) -> list[int]:
        return list(range(num))


def start(model: nn.Module | None = None, **config: Any) -> Engine:
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": ADAM, **config}
    return pyzero.initialize(model=model or Net(), config=config)[0]


def ones(value: float = 1.0) -> Tensor:
    return torch.full((1, 4), value)


# ---- plain backward -------------------------------------------------------------------------------------------------


def moments(group: Any, how: str, section: dict[str, Any], stage: int) -> tuple[list[float], float, int]:
    """Return the first moments after a step on micro-batches 2 and 6: half of their mean."""
    engine = start(gradient_accumulation_steps=2, zero_optimization={"stage": stage}, **section)
    for value in (2.0, 6.0):
        loss = engine(ones(value)).float().sum()
        {
            "engine": lambda: engine.backward(loss),  # noqa: B023
            "loss": loss.backward,
            "scale": lambda: engine.scale(loss, retain_graph=True).backward(retain_graph=True),  # noqa: B023
            "unscaled by steps": lambda: engine.backward(loss / 2, scale_wrt_gas=False),  # noqa: B023
        }[how]()
        engine.step()
    state = engine.optimizer.full_state(engine.module.weight)
    return state["exp_avg"].tolist(), engine.get_global_grad_norm(), engine.global_steps


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("how", "section"),
    [
        ("engine", {}),
        ("loss", {}),
        ("scale", {}),
        ("unscaled by steps", {}),
        ("loss", {"bf16": {"enabled": True}}),
        ("engine", {"fp16": {"enabled": True, "initial_scale_power": 8}}),
        ("scale", {"fp16": {"enabled": True, "initial_scale_power": 8}}),
    ],
    ids=str,
)
def test_each_backward_divides_by_the_number_of_accumulation_steps(ranks, how, section, stage):
    wanted = ([2.0] * 4, 8.0, 1)
    assert moments(None, how, section, stage) == wanted
    assert ranks.run(4, moments, how, section, stage) == [wanted] * 4


@pytest.mark.parametrize("section", [{}, {"fp16": {"enabled": True}}], ids=["fp32", "fp16"])
def test_a_loss_that_is_kept_keeps_no_engine(section):
    engine = start(gradient_accumulation_steps=2, **section)
    weight, loss = engine.module.weight, engine(ones()).float().sum()
    optimizer = weakref.ref(engine.optimizer)
    del engine
    gc.collect()
    assert optimizer() is None
    if section:
        with pytest.raises(RuntimeError, match="call engine.backward"):
            loss.backward()
    else:
        loss.backward()
        assert torch.equal(weight.grad, torch.full((4,), 0.5))


def test_outputs_that_go_back_in_twice_are_divided_once():
    """The search behind the first input passes the second, and ends before it knows of it."""
    engine = start(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), gradient_accumulation_steps=2)
    twin = copy.deepcopy(engine.module)
    for model, steps in ((engine, 1), (twin, 2)):
        hidden = model(ones()) * 2.0
        ((model(hidden + 1.0) + model(hidden)).sum() / steps).backward()
    for param, other in zip(engine.module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad)


@dataclasses.dataclass
class Output:
    loss: Tensor
    name: str = "x"


@pytest.mark.parametrize(
    ("wraps", "reads"),
    [
        (lambda y: (y, 1), lambda out: out[0]),
        (lambda y: [None, {"a": y}], lambda out: out[1]["a"]),
        (Output, lambda out: out.loss),
    ],
    ids=["tuple", "nested", "dataclass"],
)
def test_outputs_of_any_shape_divide(wraps, reads):
    engine = start(Net(wraps), gradient_accumulation_steps=4)
    reads(engine(ones(8.0))).sum().backward()
    assert engine.module.weight.grad.tolist() == [2.0] * 4


class WithLogits(nn.Module):
    """Returns the loss and the logits that it was computed from, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = x * self.weight
        return {"loss": logits.sum(), "logits": logits}


@pytest.mark.parametrize("how", ["loss", "scale", "engine", "own"])
def test_a_loss_beside_its_logits_is_divided_once(how):
    engine = start(WithLogits(), gradient_accumulation_steps=4)
    out = engine(ones(8.0))
    if how == "engine":
        engine.backward(out["loss"])
    elif how == "scale":
        engine.scale(out["loss"]).backward()
    else:
        (out["loss"] if how == "loss" else out["logits"].sum()).backward()
    assert engine.module.weight.grad.tolist() == [2.0] * 4
    (out := engine(ones(8.0)))["logits"].mul_(3)  # as a temperature does
    (out["loss"] + out["logits"].sum()).backward()
    assert engine.module.weight.grad.tolist() == [2.0 + 2.0 + 6.0] * 4


class Parts(nn.Module):
    """Returns a loss and the tensors that it was computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        hidden = self.first(inputs)
        logits = self.second(hidden).tanh()
        return {"loss": logits.square().sum(), "logits": logits, "hidden": hidden}


USES = {
    "a loss beside its logits": lambda m, _, x: m(x)["loss"],
    "a loss of logits and hidden states": lambda m, _, x: m(x)["logits"].sum() + m(x)["hidden"].square().sum(),
    "all of one forward": lambda m, _, x: sum(out.square().sum() for out in m(x).values()),
    "twice": lambda m, _, x: m(m(x)["logits"])["loss"],
    "twice, and what came between": lambda m, _, x: (lambda y: y.sum() + m(y)["loss"])(m(x)["logits"]),
    "twice, and something between": lambda m, _, x: m(2 * m(x)["logits"])["loss"],
    "through another engine": lambda m, other, x: other(m(x)["logits"])["loss"],
    "through another engine and past it": lambda m, other, x: (lambda y: y.sum() + other(y)["loss"])(m(x)["logits"]),
}


@pytest.mark.parametrize("how", ["loss", "scale", "engine"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_gradients_are_divided_once(use, how):
    torch.manual_seed(1)
    models, inputs = [Parts(), Parts()], ones()
    engines = [start(copy.deepcopy(model), gradient_accumulation_steps=4) for model in models]
    loss = use(*engines, inputs)
    if how == "engine":
        engines[0].backward(loss)
    else:
        (engines[0].scale(loss) if how == "scale" else loss).backward()
    (use(*models, inputs) / 4).backward()
    for engine, model in zip(engines, models, strict=True):
        for got, wanted in zip(engine.module.parameters(), model.parameters(), strict=True):
            assert (got.grad is None) == (wanted.grad is None)
            assert got.grad is None or torch.equal(got.grad, wanted.grad)  # powers of two


def test_two_fp16_engines_in_one_graph():
    first, second = (start(Parts(), fp16={"enabled": True, "initial_scale_power": 8}) for _ in range(2))
    first.backward(second(first(ones())["logits"])["loss"])
    second.backward(second(ones())["loss"])
    second.step()
    assert second.was_step_applied()
    first.zero_grad()
    second.module.requires_grad_(False)
    first.backward(second(first(ones())["logits"])["loss"])
    first.step()
    assert first.was_step_applied() and all(param.grad is None for param in second.module.parameters())


@pytest.mark.parametrize("dtypes", [*itertools.product(["fp16", "bf16"], repeat=2)], ids=str)
def test_each_engine_has_gradients_of_its_own_scale(dtypes):
    sections = {"fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}}, "bf16": {"bf16": {"enabled": True}}}
    first, second = (start(WithLogits(), **sections[dtype]) for dtype in dtypes)
    loss = second(first(ones(8.0))["logits"])["loss"]
    if dtypes == ("bf16", "fp16"):
        with pytest.raises(RuntimeError, match=r"another engine, which has none.*module.requires_grad_\(False\)"):
            first.backward(loss)
        return
    first.backward(loss)
    for engine in (first, second):
        assert engine.optimizer.full_grad(engine.module.weight).tolist() == [8.0] * 4


@pytest.mark.parametrize("how", ["loss", "engine"])
def test_a_backward_through_two_engines_is_divided_once_in_each(how):
    generator = start(WithLogits(), gradient_accumulation_steps=4)
    critic = start(WithLogits(), gradient_accumulation_steps=2)
    loss = critic(generator(ones(8.0))["logits"])["loss"]
    loss.backward() if how == "loss" else generator.backward(loss)
    assert generator.module.weight.grad.tolist() == [2.0] * 4
    assert critic.module.weight.grad.tolist() == [4.0 if how == "loss" else 2.0] * 4


class Attributes(dict[str, Tensor]):
    """A dict with its items as attributes."""

    def __init__(self, **items: Tensor) -> None:
        super().__init__(items)
        self.__dict__ = self  # type: ignore[assignment]


@pytest.mark.parametrize("how", ["attribute", "kept by the module", "cached", "edited"])
def test_outputs_are_left_alone_and_divide_by_whatever_way_they_are_reached(how):
    kept = []
    engine = start(Net(lambda y: kept.append(y) or Attributes(y=y)), gradient_accumulation_steps=4)
    output = engine(ones(8.0))
    assert output.y is kept[0]
    if how == "edited":
        kept[0].mul_(1)
    {"attribute": output.y, "kept by the module": kept[0], "cached": output["y"], "edited": output.y}[
        how
    ].sum().backward()
    assert engine.module.weight.grad.tolist() == [2.0] * 4


@pytest.mark.parametrize("edit", [lambda y: y.div_(2), lambda y: y[:, 0].zero_(), lambda y: y.relu_()])
@pytest.mark.parametrize("section", [{"gradient_accumulation_steps": 2}, {"fp16": {"enabled": True}}], ids=str)
def test_an_edit_of_an_output_that_is_a_view_is_refused(edit, section):
    """The gradients bypass the hook."""
    engine = start(nn.Linear(4, 4), **section)
    output = engine(torch.ones(2, 3, 4))
    assert output._is_view()
    edit(output)
    with pytest.raises(RuntimeError, match=r"a view and was edited in place.*engine.backward\(loss\)"):
        output.float().square().sum().backward()
    engine.zero_grad()
    edit(output := engine(torch.ones(2, 3, 4)))
    engine.backward(output.float().square().sum())


def test_an_edit_of_a_view_beside_its_base_is_divided():
    engine = start(Net(lambda y: (y, y[:1])), gradient_accumulation_steps=4)
    whole, part = engine(ones(8.0))
    part.mul_(2)
    whole.sum().backward()
    assert engine.module.weight.grad.tolist() == [4.0] * 4


def test_an_output_that_is_given_twice_is_divided_once():
    kept = []
    engine = start(Net(lambda y: kept.append((y, 2 * y)) or kept[0]), gradient_accumulation_steps=4)
    engine(ones(8.0))
    sum(engine(ones(8.0))).sum().backward()
    assert engine.module.weight.grad.tolist() == [6.0] * 4


def test_outputs_that_are_given_again_beside_a_new_one_are_divided_once():
    kept = []
    engine = start(
        Net(lambda y: kept.append((y, 2 * y)) or (kept[0][1].sum(), *kept[0])), gradient_accumulation_steps=4
    )
    engine(ones(8.0))
    engine(ones(8.0))[0].backward()
    assert engine.module.weight.grad.tolist() == [4.0] * 4


@pytest.mark.parametrize("how", ["loss", "engine"])
def test_what_lies_ahead_of_the_module_is_divided_too(how):
    """As in DeepSpeed. Gradients of a tensor between two forwards are not divided by a plain backward."""
    engine, ahead, between = start(WithLogits(), gradient_accumulation_steps=4), ones(), torch.ones(4)
    ahead.requires_grad_()
    between.requires_grad_()
    loss = engine(between * engine(2 * ahead)["logits"])["loss"]
    loss.backward() if how == "loss" else engine.backward(loss)
    assert ahead.grad.tolist() == [[0.5] * 4]
    assert between.grad.tolist() == [2.0 if how == "loss" else 0.5] * 4


def test_a_long_history_ahead_of_the_module_is_looked_at_once():
    engine = start(WithLogits(), gradient_accumulation_steps=2)
    near, far = ones().requires_grad_(), ones().requires_grad_()
    for _ in range(20_000):
        far = far.tanh()

    def seconds(state: Tensor) -> float:
        begun = time.perf_counter()
        engine(state.tanh())
        return time.perf_counter() - begun

    assert min(seconds(far) for _ in range(8)) < 20 * min(seconds(near) for _ in range(8))


def test_outputs_in_eval_are_left_alone():
    engine = start(gradient_accumulation_steps=4)
    with torch.no_grad():
        assert not engine(ones()).requires_grad


def test_a_plain_backward_of_fp16_says_what_to_call():
    engine = start(fp16={"enabled": True})
    with pytest.raises(RuntimeError, match=r"call engine.backward\(loss\), or engine.scale\(loss\).backward\(\)"):
        engine(ones()).float().sum().backward()


# ---- boundaries -----------------------------------------------------------------------------------------------------


def test_another_number_of_accumulation_steps_begins_with_the_next_step():
    engine, acted = start(gradient_accumulation_steps=2), []
    for accumulation in (2, 4, 1, 3):
        engine.set_train_batch_size(accumulation)
        for _ in range(accumulation):
            engine.backward(engine(ones(3.0)).sum())
            engine.step()
            acted.append(engine.was_step_applied())
    assert acted == [False, True, *[False] * 3, True, True, False, False, True]


def test_the_caller_sets_the_boundary():
    engine = start(gradient_accumulation_steps=3)
    engine.set_gradient_accumulation_boundary(False)
    for _ in range(2):
        assert not engine.is_gradient_accumulation_boundary()
        engine.backward(engine(ones(3.0)).sum())
    engine.set_gradient_accumulation_boundary(True)
    assert engine.is_gradient_accumulation_boundary()
    engine.backward(engine(ones(3.0)).sum())
    engine.step()
    assert (engine.global_steps, engine.was_step_applied(), engine.global_samples) == (1, True, 3)
    assert engine.optimizer.full_state(engine.module.weight)["exp_avg"].tolist() == [1.5] * 4


def test_a_script_that_sets_the_micro_steps_moves_the_boundary():
    engine = start(gradient_accumulation_steps=3)
    for micro_steps, acts in ((None, False), (2, True), (None, False), (0, False), (None, False), (None, True)):
        if micro_steps is not None:
            engine.micro_steps = micro_steps
        engine.backward(engine(ones()).sum())
        engine.step()
        assert engine.was_step_applied() == acts
    assert (engine.global_steps, engine.micro_steps) == (2, 3)


def test_unmanaged_accumulation_steps_whenever_it_is_called():
    engine = start(gradient_accumulation_steps=2, managed_gradient_accumulation=False)
    assert not engine.managed_gradient_accumulation() and not engine.is_gradient_accumulation_boundary()
    for num_micro in (3, 1):
        for _ in range(num_micro):
            engine.backward(engine(ones()).sum())
        engine.step()
        assert engine.was_step_applied()
    assert (engine.global_steps, engine.global_samples) == (2, 4)
    with pytest.raises(RuntimeError, match="managed_gradient_accumulation=true"):
        engine.set_gradient_accumulation_boundary(True)


def coalesced(group: Any, stage: int) -> list[float]:
    engine = start(zero_optimization={"stage": stage})
    with engine.coalesce_grad_reduction():
        for value in (2.0, 6.0):
            engine.backward(engine(ones(value)).sum())
        engine.step()  # no boundary in here
        assert engine.global_steps == 0
    engine.step()
    return engine.optimizer.full_state(engine.module.weight)["exp_avg"].tolist()


@pytest.mark.parametrize("stage", [1, 2])
def test_coalesced_reduction(ranks, stage):
    assert coalesced(None, stage) == [4.0] * 4
    assert ranks.run(4, coalesced, stage) == [[4.0] * 4] * 4


@pytest.mark.parametrize("acts", [True, False])
def test_a_boundary_that_was_said_holds_after_a_coalesced_reduction(acts):
    engine = start(gradient_accumulation_steps=2 if acts else 1)
    engine.set_gradient_accumulation_boundary(acts)
    with engine.coalesce_grad_reduction():
        engine.backward(engine(ones()).sum())
    engine.step()
    assert engine.was_step_applied() == acts


def test_another_batch_size_is_another_number_of_steps():
    engine = start(train_batch_size=4)
    assert engine.get_batch_info() == (4, 1, 4)
    engine.set_train_batch_size(8)
    assert engine.get_batch_info() == (8, 1, 8)
    with pytest.raises(ValueError, match="wanted train_batch_size"):
        start(train_micro_batch_size_per_gpu=3, train_batch_size=6).set_train_batch_size(7)


# ---- what can be asked ----------------------------------------------------------------------------------------------


def test_the_module_shows_through():
    engine = start()
    assert (engine.generate(3), engine.hidden_size, engine.weight is engine.module.weight) == ([0, 1, 2], 4, True)
    assert engine.train(False) is engine and not engine.module.training
    assert engine.train().module.training
    with pytest.raises(AttributeError, match="no_such_name"):
        engine.no_such_name  # noqa: B018


def test_settings():
    engine = start(
        fp16={"enabled": True, "initial_scale_power": 4},
        zero_optimization={"stage": 2},
        gradient_clipping=0.5,
        steps_per_print=7,
        communication_data_type="fp32",
        scheduler={"type": "WarmupLR"},
    )
    assert (engine.fp16_enabled(), engine.bfloat16_enabled(), engine.torch_autocast_enabled()) == (True, False, False)
    assert (engine.zero_optimization(), engine.zero_optimization_stage()) == (True, 2)
    assert (engine.gradient_clipping(), engine.steps_per_print(), engine.dynamic_loss_scale()) == (0.5, 7, True)
    assert (engine.cur_scale, engine.get_loss_scale()) == (16.0, 16.0)
    assert (engine.optimizer_name(), engine.scheduler_name()) == ("adam", "WarmupLR")
    assert engine.communication_data_type() == torch.float32
    assert (engine.local_rank, engine.global_rank, engine.device) == (0, 0, torch.device("cpu"))
    assert engine.get_mom() == [(0.5, 0.5)]
    assert not start(zero_optimization={"stage": 0}).zero_optimization()
    assert not start(bf16={"enabled": True}).dynamic_loss_scale()
    assert start(bf16={"enabled": True}).bfloat16_enabled()


def test_compile_compiles_the_module():
    engine = start()
    engine.compile(backend="eager")
    assert torch.equal(engine(ones()), torch.zeros(1))
    engine.empty_partition_cache()


def test_autocast_by_the_config():
    seen = []
    engine = start(Net(lambda y: seen.append(torch.is_autocast_enabled("cpu")) or y), torch_autocast={"enabled": True})
    assert engine(ones()).dtype == torch.float32 and engine.module.weight.dtype == torch.float32
    assert seen == [True] and not torch.is_autocast_enabled("cpu")
    assert not engine.is_scaled
    assert start(torch_autocast={"enabled": True, "dtype": "fp16"}).cur_scale == 65536.0


def weights(group: Any, dtype: str, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[2].weight.requires_grad_(False)
    model[1].register_parameter("tied", model[0].weight)
    optimizer = {"type": "Adam", "params": {"lr": 0.013}}
    engine = start(model, optimizer=optimizer, **({dtype: {"enabled": True}} if dtype else {}))
    engine.backward(engine(torch.randn(6, 4)).float().square().sum())
    engine.step()
    assert engine.save_16bit_model(path) and engine.save_fp16_model(path, "again.bin")
    assert engine.save_16bit_model(path, "trained.bin", exclude_frozen_parameters=True)
    return engine.get_fp32_state_dict(), dict(engine.module_state_dict())


@pytest.mark.parametrize("dtype", ["", "bf16"])
@pytest.mark.parametrize("size", [1, 4])
def test_whole_weights(ranks, tmp_path, size, dtype):
    for found, own in ranks.run(size, weights, dtype, str(tmp_path)) if size > 1 else [weights(None, dtype, tmp_path)]:
        assert found.keys() == own.keys()
        for name, value in found.items():
            assert value.dtype == (torch.float32 if own[name].is_floating_point() else own[name].dtype)
            # A master is within half a unit of the last place of its bf16 weight.
            torch.testing.assert_close(value.to(own[name].dtype), own[name], rtol=0, atol=0)
        assert torch.equal(found["0.weight"], found["1.tied"])
        if dtype:
            assert not torch.equal(found["0.weight"], own["0.weight"].float())
    for name in ("pytorch_model.bin", "again.bin"):
        saved = torch.load(tmp_path / name, weights_only=True)
        assert saved.keys() == own.keys() and torch.equal(saved["0.weight"], own["0.weight"])
    trained = torch.load(Path(tmp_path, "trained.bin"), weights_only=True)
    assert own.keys() - trained.keys() == {"2.weight"} and all(torch.equal(trained[n], own[n]) for n in trained)


# ---- reports --------------------------------------------------------------------------------------------------------


def test_csv_files_of_a_run(tmp_path):
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    engine = start(gradient_accumulation_steps=2, csv_monitor=section, fp16={"enabled": True, "loss_scale": 4.0})
    assert engine.monitor.enabled
    for value in (2.0, 6.0, 2.0, 2.0):
        engine.backward(engine(ones()).float().sum() + value)
        engine.step()
    engine.monitor.write_events([("Eval/accuracy", 0.5, 9)])
    rows = {path.name: list(csv.reader(path.open())) for path in (tmp_path / "run").iterdir()}
    assert rows["Train_Samples_lr.csv"] == [["step", "lr"], ["2", "0.25"], ["4", "0.25"]]
    assert rows["Train_Samples_loss_scale.csv"][1:] == [["2", "4.0"], ["4", "4.0"]]
    assert rows["Train_Samples_train_loss.csv"][1] == ["2", "4.0"]  # the mean of both micro-batches
    assert rows["Eval_accuracy.csv"][1:] == [["9", "0.5"]]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_monitor_that_is_not_installed_says_so(name, monkeypatch):
    module = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {name}, or enable csv_monitor"):
        start(**{name: {"enabled": True}})
    with pytest.raises(ImportError, match=f"pip install {name}"):  # on a rank that writes nothing too
        Monitor(load({"train_batch_size": 1, name: {"enabled": True}}), is_first=False)


def test_a_disabled_monitor_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = start(csv_monitor={"enabled": False}, tensorboard={"enabled": False})
    engine.backward(engine(ones()).sum())
    engine.step()
    assert not engine.monitor.enabled and not list(tmp_path.iterdir())


def test_a_line_of_phases(caplog):
    engine = start(wall_clock_breakdown=True, steps_per_print=2)
    with caplog.at_level(logging.INFO, logger="pyzero"):
        for _ in range(4):
            engine.backward(engine(ones()).sum())
            engine.step()
    lines = [record.getMessage() for record in caplog.records if "forward" in record.getMessage()]
    assert len(lines) == 2
    for line in lines:
        assert [part.split()[0] for part in line.removeprefix("time (ms): ").split(", ")] == [
            "forward",
            "backward",
            "step",
        ]
        assert line.count("x 2") == 3


def test_phases_are_kept_by_the_rank_that_tells_of_them(monkeypatch):
    """Other ranks would keep two GPU events per phase until the end of the run."""
    monkeypatch.setattr(process, "rank_and_size", lambda: (1, 1))
    engine = start(wall_clock_breakdown=True)
    engine.backward(engine(ones()).sum())
    engine.step()
    assert engine.wall_clock_breakdown() and engine.timers.report() == "time (ms): nothing yet"


def test_what_means_something_else_here_is_told(caplog):
    with caplog.at_level(logging.INFO, logger="pyzero"):
        start(optimizer={"type": "OneBitAdam", "params": {"freeze_step": 9}}, zero_optimization={"stage": 3})
        start(gradient_clipping=0.0)
    told = {
        record.getMessage(): record.levelname for record in caplog.records if record.getMessage().startswith("config:")
    }
    assert len(told) == 2
    wanted_lines = [
        ("OneBitAdam: gradients are not", "WARNING"),
        ("nothing is clipped; DeepSpeed 0.19 clips to a norm of 1.0", "WARNING"),
    ]
    for (line, level), (words, wanted) in zip(told.items(), wanted_lines, strict=True):
        assert words in line and level == wanted


@pytest.mark.parametrize("configures", ["never", "before", "after"])
def test_the_log_is_shown_where_nobody_has_configured_logging(configures):
    program = f"""
import logging, torch, pyzero
if {configures == "before"}:
    logging.basicConfig(level=logging.ERROR)
config = {{"train_micro_batch_size_per_gpu": 1, "optimizer": {{"type": "Adam"}}, "steps_per_print": 1}}
for _ in range(2):
    engine = pyzero.initialize(model=torch.nn.Linear(2, 1), config=config)[0]
if {configures == "after"}:
    logging.basicConfig(level=logging.WARNING)
engine.backward(engine(torch.ones(1, 2)).sum())
engine.step()
logging.getLogger("pyzero").error("an error")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    lines = [line for line in done.stderr.splitlines() if "step=1, skipped=0" in line]
    assert len(lines) == (1 if configures == "never" else 0) and done.stderr.count("an error") == 1
    assert ("[pyzero] config:" in done.stderr) == (configures != "before")


# ---- optimizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "options"),
    [
        (lambda p: FusedAdam(p, 0.5, bias_correction=False), pyzero.FusedZeroAdam, (True, False)),
        (lambda p: FusedAdam(p, lr=0.5, adam_w_mode=False), pyzero.FusedZeroAdam, (False, True)),
        (lambda p: DeepSpeedCPUAdam(p, lr=0.5, adamw_mode=False), pyzero.FusedZeroAdam, (False, True)),
        (lambda p: FusedLion(p, lr=0.5), pyzero.FusedZeroLion, (None, None)),
        (lambda p: DeepSpeedCPULion(p, lr=0.5), pyzero.FusedZeroLion, (None, None)),
        (lambda p: FusedLamb(p, lr=0.5), pyzero.ZeroLamb, (None, True)),
        (lambda p: torch.optim.AdamW(p, lr=0.5), pyzero.FusedZeroAdam, (True, True)),
    ],
)
@pytest.mark.parametrize("is_called", [False, True])
def test_optimizers_of_scripts(make, kind, options, is_called):
    """The optimizer is built before, or by a function that is passed in."""
    model = Net()
    given = make if is_called else make(model.parameters())
    config = {"train_batch_size": 1, "bf16": {"enabled": True}, "gradient_clipping": 2.0}
    _, optimizer, _, _ = pyzero.initialize(model=model, optimizer=given, config=config)
    group = optimizer.param_groups[0]
    assert type(optimizer) is kind
    assert (group.get("decoupled_weight_decay"), group.get("bias_correction")) == options
    assert group["lr"] == 0.5 and group["params"] == [model.weight]


def test_group_dicts_stay_the_callers():
    """As in accelerate: the optimizer is built from another's groups, and the schedule drives the first one."""
    model = Net()
    first = torch.optim.AdamW([{"params": [model.weight]}], lr=0.5, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(first, lambda step: step / 4)  # 0 at first
    held = first.param_groups[0]
    given = DeepSpeedCPUAdam(first.param_groups, lr=0.5)
    engine, optimizer, *_ = pyzero.initialize(model=model, optimizer=given, config={"train_batch_size": 1})
    assert optimizer.param_groups[0] is held and optimizer.param_groups[0]["lr"] == 0.0
    for lr in (0.125, 0.25):
        engine.backward(engine(ones()).sum())
        engine.step()
        schedule.step()
        assert engine.get_lr() == [lr]
    before = model.weight.detach().clone()
    engine.backward(engine(ones()).sum())
    engine.step()
    torch.testing.assert_close(before - model.weight.detach(), torch.full((4,), 0.25))


def test_an_optimizer_says_overflow_and_cur_scale():
    engine = start(fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    optimizer = engine.optimizer
    assert (optimizer.overflow, optimizer.cur_scale) == (False, 256.0)
    for value, overflow, scale in ((float("inf"), True, 128.0), (1.0, False, 128.0)):
        engine.backward(engine(ones(value)).float().sum())
        engine.step()
        assert (optimizer.overflow, optimizer.cur_scale) == (overflow, scale)


@pytest.mark.parametrize(
    ("section", "scale", "dynamic"),
    [({"fp16": {"enabled": True, "initial_scale_power": 8}}, 256.0, True),
     ({"fp16": {"enabled": True, "loss_scale": 64}}, 64.0, False),
     ({"bf16": {"enabled": True}}, 1.0, False)],
)  # fmt: skip
def test_an_optimizer_says_what_scales_the_loss(section, scale, dynamic):
    engine = start(**section)
    optimizer, scaler = engine.optimizer, engine.optimizer.loss_scaler
    assert optimizer.dynamic_loss_scale is scaler.dynamic is dynamic
    assert optimizer.cur_scale == optimizer.loss_scale == scaler.cur_scale == scaler.loss_scale == scale
    for held, name in ((optimizer, "cur_scale"), (optimizer, "loss_scale"), (scaler, "cur_scale")):
        with pytest.raises(AttributeError, match="got 4096.0.*initial_scale_power.*loss_scale="):
            setattr(held, name, 4096.0)
    assert optimizer.loss_scale == scale
    del engine, optimizer
    with pytest.raises(ReferenceError, match="keep the engine"):
        scaler.cur_scale  # noqa: B018


def test_an_optimizer_says_its_norm_and_its_rate():
    engine = start(bf16={"enabled": True}, gradient_clipping=0.5)
    optimizer = engine.optimizer
    assert optimizer._global_grad_norm == 0.0 and optimizer.get_lr() == 0.25
    engine.backward(engine(ones()).float().sum())
    engine.step()
    assert float(optimizer._global_grad_norm) == engine.get_global_grad_norm() > 0.5
    optimizer.param_groups[0]["lr"] = 0.125
    assert optimizer.get_lr() == 0.125


@pytest.mark.parametrize(("section", "norm"), [({"gradient_clipping": 0.5}, 0.5), ({"gradient_clipping": 0.0}, 0.0)])
def test_an_optimizer_says_what_it_clips_to(section, norm):
    optimizer = start(**section).optimizer
    assert optimizer.clip_grad == norm
    with pytest.raises(AttributeError, match=r"got 2.0 set.*gradient_clipping.*clip_grad_norm_\(max_norm\)"):
        optimizer.clip_grad = 2.0
    assert optimizer.clip_grad == norm


@pytest.mark.parametrize("given", [True, False])
def test_the_optimizer_in_the_optimizer(given):
    model = Net()
    engine, optimizer, _, _ = pyzero.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5) if given else None,
        config={"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}},
    )
    inner = optimizer.optimizer
    assert inner is engine.basic_optimizer and isinstance(inner, torch.optim.Optimizer)
    assert inner.param_groups is optimizer.param_groups and inner.state is optimizer.state
    assert not hasattr(inner, "optimizer")  # `while hasattr(optimizer, "optimizer")` ends
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.5**step)
    calls = []
    inner.register_step_post_hook(lambda *args: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rate in (0.5, 0.25):
            before = model.weight.detach().clone()
            engine.backward(engine(ones()).sum())
            engine.step()
            torch.testing.assert_close(before - model.weight.detach(), torch.full((4,), rate))
            schedule.step()
    assert len(calls) == 2 and inner.state_dict()["param_groups"][0]["lr"] == 0.125
    inner.load_state_dict(optimizer.state_dict())
    inner.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 2
    model.weight.grad = torch.ones(4)
    inner.zero_grad()
    assert model.weight.grad is None
    with pytest.raises(RuntimeError, match=r"got step\(\) of the optimizer inside; call engine.step"):
        inner.step()


def test_an_engine_and_its_optimizer_end_with_their_last_name():
    def ends() -> list[bool]:
        engine = start(fp16={"enabled": True})
        engine.backward(engine(ones()).float().sum())
        engine.step()
        held = [weakref.ref(engine), weakref.ref(engine.optimizer)]
        del engine
        return [ref() is None for ref in held]

    gc.disable()
    try:
        ends()  # the first one may be held by caches
        assert ends() == [True, True]
    finally:
        gc.enable()


class Mpu:
    """Megatron's, where layers are whole."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def get_data_parallel_group(self) -> Any:
        return self.group

    def get_model_parallel_group(self) -> Any:
        return None


def made_from(group: Any, trains: bool) -> None:
    model, mpu = Net(), Mpu(group)
    optimizer = torch.optim.Adam(model.parameters()) if trains else None
    make = (lambda o: torch.optim.lr_scheduler.ConstantLR(o)) if trains else None
    engine, *_ = pyzero.initialize(
        model=model, optimizer=optimizer, lr_scheduler=make, mpu=mpu, config={"train_batch_size": 2}
    )
    assert engine.client_optimizer is optimizer and engine.client_lr_scheduler is make and engine.mpu is mpu
    assert engine.data_parallel_group is engine.get_data_parallel_group() is group
    assert (engine.basic_optimizer is None) is not trains


@pytest.mark.parametrize("trains", [True, False])
def test_an_engine_keeps_what_it_was_made_from(ranks, trains):
    ranks.run(2, made_from, trains)
    assert start().mpu is None and start().data_parallel_group is None


@pytest.mark.parametrize(
    ("zero", "of_optimizer", "of_params"),
    [({}, None, None),
     ({"offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}, "none", "none"),
     ({"offload_optimizer": {"device": "cpu"}}, "cpu", None),
     ({"offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}}, "nvme", None),
     ({"offload_param": {"device": "cpu"}}, None, "cpu"),
     ({"cpu_offload": True, "cpu_offload_params": True}, "cpu", "cpu"),
     ({"cpu_offload_param": True}, None, "cpu")],
)  # fmt: skip
def test_an_engine_says_what_is_offloaded(zero, of_optimizer, of_params):
    engine = start(zero_optimization={"stage": 2, **zero})
    found = engine.zero_offload_optimizer(), engine.zero_offload_param()
    assert [None if section is None else section.device for section in found] == [of_optimizer, of_params]
    assert engine.zero_use_cpu_optimizer() is (of_optimizer in ("cpu", "nvme"))
    assert engine.zero_cpu_offload() is (of_optimizer == "cpu")


def test_gradients_are_always_averaged():
    engine = start()
    assert engine.enable_backward_allreduce is True
    engine.enable_backward_allreduce = True
    with pytest.raises(NotImplementedError, match="got enable_backward_allreduce=False.*reduce_grads=False"):
        engine.enable_backward_allreduce = False
    assert engine.enable_backward_allreduce is True


def test_a_function_gets_the_parameters_that_are_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": list(model[0].parameters()), "lr": 1.0}]
    _, optimizer, _, _ = pyzero.initialize(
        model=model,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.5),
        model_parameters=groups,
        config={"train_batch_size": 1},
    )
    assert [group["lr"] for group in optimizer.param_groups] == [1.0]


def test_a_recipe_takes_no_steps():
    with pytest.raises(RuntimeError, match="FusedAdam to be passed to initialize"):
        FusedAdam([nn.Parameter(torch.ones(1))]).step()


@pytest.mark.parametrize("optimizer", [None, lambda p: torch.optim.Adam(p)])
def test_parameters_of_another_model_are_refused(optimizer):
    with pytest.raises(ValueError, match="expected parameters of the model, got 1 of others among 1"):
        pyzero.initialize(
            model=Net(),
            model_parameters=Net().parameters(),
            optimizer=optimizer,
            config={"train_batch_size": 1, "optimizer": ADAM},
        )


def test_an_optimizer_of_no_kind_is_refused():
    with pytest.raises(TypeError, match="or a function that makes one of parameters, got int"):
        pyzero.initialize(model=Net(), optimizer=3, config={"train_batch_size": 1})


def test_a_schedule_that_is_no_torch_one():
    class Schedule:
        def __init__(self) -> None:
            self.optimizer, self.calls = None, []

        def step(self, increment: int = 1) -> None:
            self.calls.append(increment)

    given = Schedule()
    engine, optimizer, _, schedule = pyzero.initialize(
        model=Net(), lr_scheduler=given, config={"train_batch_size": 1, "optimizer": ADAM}
    )
    engine.backward(engine(ones()).sum())
    engine.step(lr_kwargs={"increment": 5})
    assert schedule is given and given.optimizer is optimizer and given.calls == [5]


def test_a_plateau_needs_what_it_watches():
    engine, _, _, schedule = pyzero.initialize(
        model=(net := Net()),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
        config={"train_batch_size": 1, "optimizer": ADAM},
    )
    engine.backward(engine(ones()).sum())
    before = [param.clone() for param in net.parameters()]
    with pytest.raises(TypeError, match=r'call engine.step\(lr_kwargs=\{"metrics": value\}\)'):
        engine.step()
    assert engine.global_steps == 0 and all(map(torch.equal, before, net.parameters()))
    engine.step(lr_kwargs={"metrics": 3.0})
    assert engine.global_steps == 1 and schedule.best == 3.0


def test_a_plateau_of_a_pipeline_says_what_to_do():
    net = PipelineModule([nn.Linear(4, 4)], num_stages=1, loss_fn=nn.MSELoss())
    engine, *_ = pyzero.initialize(
        model=net,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
        training_data=[(torch.ones(4), torch.zeros(4))] * 4,
        config={"train_batch_size": 1, "optimizer": ADAM},
    )
    before = [param.clone() for param in net.parameters()]
    with pytest.raises(TypeError, match=r"ReduceLROnPlateau watches.*train_batch\(\).*leave it out of initialize"):
        engine.train_batch()
    assert engine.global_steps == engine.micro_steps == 0 and all(map(torch.equal, before, net.parameters()))
    assert all(param.grad is None for param in net.parameters())


def test_the_engine_counts_its_samples_per_second():
    engine, *_ = pyzero.initialize(
        model=Net(), config={"train_batch_size": 4, "gradient_accumulation_steps": 2, "optimizer": ADAM}
    )
    for _ in range(6):
        engine.backward(engine(ones()).sum())
        engine.step()
    timer = engine.tput_timer
    assert (timer.micro_step_count, timer.global_step_count, timer.epoch_count) == (6, 3, 0)
    assert timer.avg_samples_per_sec() == 4 / timer.total_elapsed_time
    timer.update_epoch_count()
    assert (timer.micro_step_count, timer.epoch_count) == (0, 1)


def test_the_last_batch_is_dropped_where_the_config_says_so():
    data = torch.utils.data.TensorDataset(torch.arange(10.0).view(10, 1))
    for drops, sizes in ((False, [4, 4, 2]), (True, [4, 4])):
        config = {"train_batch_size": 4, "optimizer": ADAM, "dataloader_drop_last": drops}
        engine, _, loader, _ = pyzero.initialize(model=Net(), training_data=data, config=config)
        assert [len(batch) for (batch,) in loader] == sizes and engine.training_dataloader is loader


def test_states_stay_where_they_are(monkeypatch):
    engine = start()
    monkeypatch.setattr(engine, "device", torch.device("cpu"))
    engine.offload_states(include=None, device="cpu", pin_memory=True, non_blocking=False)
    engine.reload_states(non_blocking=True)
    monkeypatch.setattr(engine, "device", torch.device("cuda", 0))
    with pytest.raises(NotImplementedError, match=r"offload_states\(\) on cuda:0.*offload_optimizer.device to cpu"):
        engine.offload_states()
    monkeypatch.setattr(launcher, "device", lambda: torch.device("cuda", 0))
    with pytest.raises(NotImplementedError, match=r"offload_states\(\) on cuda:0.*and leave the call out"):
        engine.optimizer.offload_states(include=[OffloadStateTypeEnum.optim_states])
    monkeypatch.setattr(launcher, "device", lambda: torch.device("cpu"))
    engine.optimizer.offload_states(include=[], device=OffloadDeviceEnum.cpu, pin_memory=True, non_blocking=False)
    engine.optimizer.reload_states(non_blocking=True)


def test_the_config_object_has_the_present_batch_sizes():
    engine = start(gradient_accumulation_steps=2, gradient_clipping=0.5)
    assert engine._config.train_micro_batch_size_per_gpu == 1 and engine._config.gradient_clipping == 0.5
    engine.set_train_batch_size(6)
    assert engine._config.gradient_accumulation_steps == 6 and engine._config.train_batch_size == 6


def test_next_of_a_loader():
    model, data = Net(), [torch.full((4,), float(index)) for index in range(3)]
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": ADAM}
    loader = pyzero.initialize(model=model, training_data=data, config=config)[2]
    for _ in range(2):
        assert [len(next(loader)), len(next(loader))] == [2, 1]
        with pytest.raises(StopIteration):
            next(loader)
    next(loader)
    assert len(list(loader)) == 2 and len(next(loader)) == 2  # from the beginning


def load_module(group: Any, stage: int) -> None:
    engine = start(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)), zero_optimization={"stage": stage}, **BF16)
    state = {name: torch.full(value.shape, 0.5) for name, value in engine.module.state_dict().items()}
    with torch.no_grad():
        engine(ones().bfloat16())
        engine.module(ones().bfloat16())  # leaves weights whole in stage 3
    engine.load_module_state_dict({"module": state}, fetch_z3_params=True)
    assert all(torch.equal(value, state[name]) for name, value in engine.get_fp32_state_dict().items())
    with pytest.raises(RuntimeError, match="Missing"):
        engine.load_module_state_dict({"module": {"0.bias": torch.zeros(3)}})
    engine.load_module_state_dict({"module": {"0.bias": torch.zeros(3)}}, strict=False)
    assert not engine.get_fp32_state_dict()["0.bias"].any() and engine.get_fp32_state_dict()["1.bias"].item() == 0.5
    with pytest.raises(RuntimeError, match="size mismatch"):
        engine.load_module_state_dict({"module": {"0.bias": torch.zeros(4)}}, strict=False)


def test_a_function_loads_the_weights_of_an_engine_without_an_optimizer():
    engine = pyzero.initialize(model=nn.Linear(4, 3), config={"train_batch_size": 1})[0]
    assert engine.optimizer is None
    engine.load_module_state_dict({"module": {"b": torch.full((3,), 0.5)}}, custom_load_fn=copy_bias)
    assert (engine.module.bias == 0.5).all()


def copy_bias(src: dict[str, Tensor], dst: nn.Linear) -> None:
    with torch.no_grad():
        dst.bias.copy_(src["b"])


BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize("stage", [1, 3])
def test_a_modules_state_dict_is_loaded(ranks, stage):
    ranks.run(4, load_module, stage)
