"""The engine's checkpoints: training continues as if it had not stopped.

On other numbers of ranks, all that was saved is there.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import pyzero
from pyzero.__main__ import main
from pyzero.checkpoint import files
from pyzero.deepspeed import comm
from pyzero.deepspeed.schedules import WarmupLR
from pyzero.deepspeed.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

SCHEDULER = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}}
SECTIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale_window": 2}},
}


def start(stage: int, dtype: str, seed: int = 0, trains_first: bool = True) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 70), nn.ReLU(), nn.BatchNorm1d(70), nn.Linear(70, 3))
    model[0].weight.requires_grad_(trains_first)
    config = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 8 // comm.get_world_size(),
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02}},
        "scheduler": SCHEDULER,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 128},
        **SECTIONS[dtype],
    }
    return pyzero.initialize(model=model, config=config)[0]


def train(engine: Any, steps: range) -> None:
    """Train with the same gradients on any number of ranks: each rank gets all rows, and batch norm is in eval mode."""
    engine.eval()
    for step in steps:
        for micro in range(2):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + micro))
            engine.backward(engine(x).float().square().mean())
            engine.step()


def values(engine: Any) -> list[Tensor]:
    params = list(engine.module.parameters())
    masters = [engine.optimizer.full_master(param) for param in params]
    moments = [engine.optimizer.full_state(param)["exp_avg"] for param in params]
    return [*masters, *moments, *[param.detach().clone().float() for param in params]]


def status(engine: Any) -> tuple[Any, ...]:
    counters = (engine.global_steps, engine.global_samples, engine.micro_steps, engine.lr_scheduler.last_epoch)
    return (*counters, engine.cur_scale, *engine.get_lr())


def save(group: Any, path: str, stage: int, dtype: str) -> list[Any]:
    """Return values and status at the save, and the same two steps later."""
    engine = start(stage, dtype)
    train(engine, range(3))
    assert engine.save_checkpoint(path, client_state={"epoch": 3, "rank": comm.get_rank()})
    at_save = [values(engine), status(engine)]
    train(engine, range(3, 5))
    return [*at_save, values(engine), status(engine)]


def resume(group: Any, path: str, stage: int, dtype: str) -> tuple[list[Any], Any, Any]:
    """Return values and status at the load, and the same two steps later; and what the load returned."""
    engine = start(stage, dtype, seed=1)
    folder, client_state = engine.load_checkpoint(path)
    at_load = [values(engine), status(engine)]
    train(engine, range(3, 5))
    return [*at_load, values(engine), status(engine)], folder, client_state


@pytest.mark.parametrize("dtype", SECTIONS)
@pytest.mark.parametrize(("sizes", "stages"), [((1, 1), (2, 2)), ((4, 4), (2, 2)), ((4, 1), (1, 2)), ((1, 4), (2, 1))])
def test_it_goes_on_bit_for_bit(ranks, tmp_path, sizes, stages, dtype):
    """On other numbers of ranks the loaded values are equal bit for bit, but later sums round differently."""

    def run(size: int, fn: Any, stage: int) -> list[Any]:
        arguments = (str(tmp_path), stage, dtype)
        return ranks.run(size, fn, *arguments) if size > 1 else [fn(None, *arguments)]

    wanted = run(sizes[0], save, stages[0])[0]
    for rank, (found, folder, client_state) in enumerate(run(sizes[1], resume, stages[1])):
        assert Path(folder) == tmp_path / "global_step3"
        assert client_state == {"epoch": 3, "rank": rank if sizes[0] == sizes[1] else 0}
        assert found[1] == wanted[1] and found[1][0] == 3 and found[3] == wanted[3]
        assert all(torch.equal(a, b) for a, b in zip(found[0], wanted[0], strict=True))
        if sizes[0] == sizes[1]:
            assert all(torch.equal(a, b) for a, b in zip(found[2], wanted[2], strict=True))


def test_another_number_of_accumulation_steps(tmp_path):
    """The first step after the load takes all of its micro-batches."""
    engine = start(2, "bf16")
    train(engine, range(3))
    engine.save_checkpoint(tmp_path)
    other = start(2, "bf16", seed=1)
    other.set_train_batch_size(32)
    other.load_checkpoint(tmp_path)
    assert [train(other, range(1)) or other.global_steps for _ in range(4)] == [3, 4, 4, 5]


def buffers_of_ranks(group: Any, path: str, stage: int) -> list[list[float]]:
    """Save buffers that differ on each rank, as BatchNorm's do in training, and load them."""
    engine = start(stage, "fp32")
    norm = engine.module[2]
    for buffer in norm.buffers():
        buffer.fill_(comm.get_rank())
    engine.save_checkpoint(path)
    engine.load_checkpoint(path)
    return [buffer.unique().tolist() for buffer in norm.buffers()]


@pytest.mark.parametrize("stage", [2, 3])
def test_buffers_are_those_of_rank_0(ranks, tmp_path, stage):
    assert ranks.run(4, buffers_of_ranks, str(tmp_path), stage) == [[[0.0], [0.0], [0]]] * 4


def test_tags(tmp_path):
    engine = start(2, "bf16")
    train(engine, range(1))
    engine.save_checkpoint(tmp_path, tag="best")
    best = values(engine)
    train(engine, range(1, 3))
    engine.save_checkpoint(tmp_path, tag=7)
    engine.save_checkpoint(tmp_path, tag="aside", save_latest=False)
    assert (tmp_path / "latest").read_text() == "7"
    folder, client_state = engine.load_checkpoint(tmp_path, tag="best")
    assert (folder, client_state, engine.global_steps) == (str(tmp_path / "best"), {}, 1)
    assert all(torch.equal(a, b) for a, b in zip(values(engine), best, strict=True))
    engine.load_checkpoint(tmp_path)
    assert engine.global_steps == 3
    engine.save_checkpoint(tmp_path, tag="best")  # in place of the other
    engine.load_checkpoint(tmp_path, tag="best")
    assert engine.global_steps == 3 and len(list((tmp_path / "best").glob("step_*"))) == 1


def test_tags_in_folders(tmp_path):
    """As with DeepSpeed, a tag may be the name of a run and of a checkpoint in it."""
    engine = start(2, "bf16")
    for step in range(2):
        train(engine, range(step, step + 1))
        engine.save_checkpoint(tmp_path, tag=f"run/epoch{step}")
    found = values(engine)
    assert (tmp_path / "latest").read_text() == "run/epoch1"
    assert engine.load_checkpoint(tmp_path, tag="run/epoch0")[0] == str(tmp_path / "run" / "epoch0")
    assert engine.global_steps == 1
    engine.load_checkpoint(tmp_path)
    assert engine.global_steps == 2 and all(torch.equal(a, b) for a, b in zip(values(engine), found, strict=True))
    weights = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert weights.keys() == engine.module.state_dict().keys()


def loads_of(group: Any, path: str, texts: list[bytes]) -> list[str]:
    """Return load_checkpoint's error for each content of `latest`. A failed load changes nothing."""
    engine = start(2, "bf16")
    train(engine, range(1))
    engine.save_checkpoint(path, tag="best")
    train(engine, range(1, 2))
    before, said = values(engine), []
    for text in texts:
        if comm.get_rank() == 0:
            (Path(path) / "latest").write_bytes(text)
        comm.barrier()
        with pytest.raises(pyzero.CheckpointError) as caught:
            engine.load_checkpoint(path)
        said.append(str(caught.value))
        assert all(torch.equal(a, b) for a, b in zip(values(engine), before, strict=True))
    tag = "../b" if comm.get_rank() == comm.get_world_size() - 1 else "best"
    with pytest.raises((ValueError, pyzero.CheckpointError), match="expected a tag that can name a folder"):
        engine.save_checkpoint(path, tag=tag)
    with pytest.raises((ValueError, pyzero.CheckpointError), match="expected a tag that can name a folder"):
        engine.load_checkpoint(path, tag=tag)
    assert engine.load_checkpoint(path, tag="best")[1] == {} and engine.global_steps == 1
    return said


@pytest.mark.parametrize("size", [1, 4])
def test_a_damaged_latest_is_an_error_on_all_ranks(ranks, tmp_path, size):
    arguments = (str(tmp_path), [b"", b"\xff\xfe\0", b"../best", b"best\nother"])
    for said in ranks.run(size, loads_of, *arguments) if size > 1 else [loads_of(None, *arguments)]:
        assert all("latest to hold the tag of a checkpoint, got " in text and "pass tag=" in text for text in said)


def test_an_export_of_the_engines_folder_names_the_checkpoint_to_pass(tmp_path, capsys):
    start(2, "bf16").save_checkpoint(tmp_path, tag="best/1")
    arguments = ["export", str(tmp_path), str(tmp_path / "model.safetensors")]
    assert main(arguments) == 1
    assert f"a folder of checkpoints, as an engine saves them; pass {tmp_path}/best/1\n" in capsys.readouterr().err
    assert main([arguments[0], f"{tmp_path}/best/1", arguments[2]]) == 0


def test_a_load_breaks_an_accumulation_off(tmp_path):
    """The next step consists only of its own micro-batches."""
    engine = start(2, "fp32")
    train(engine, range(2))
    engine.save_checkpoint(tmp_path)
    train(engine, range(2, 3))
    wanted = values(engine)
    engine.backward(engine(torch.ones(8, 6)).sum() * 100)
    engine.step()
    engine.load_checkpoint(tmp_path)
    train(engine, range(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(values(engine), wanted, strict=True))


def nothing_there(group: Any, path: str) -> tuple[Any, Any]:
    engine = start(2, "fp32")
    return engine.load_checkpoint(path)


def test_where_there_is_none(ranks, tmp_path):
    assert nothing_there(None, tmp_path) == (None, None)
    assert ranks.run(4, nothing_there, str(tmp_path)) == [(None, None)] * 4
    with pytest.raises(pyzero.CheckpointError, match="got none"):
        start(2, "fp32").load_checkpoint(tmp_path, tag="other")


@pytest.mark.parametrize(
    "tag",
    [
        *("../up", "a/../b", "/a", "a/", "a//b", "a/.b", "a/latest", "a/step_3", ".hidden", "", "a\nb", "latest"),
        *("a ", " a", "a/b\t", "a\rb", "a\u2028", "\udc80"),  # as read from `latest`, they would be others
    ],
)
def test_tags_that_name_no_folder(tmp_path, tag):
    engine = start(2, "fp32")
    with pytest.raises(ValueError, match="expected a tag that can name a folder"):
        engine.save_checkpoint(tmp_path, tag=tag)
    with pytest.raises(ValueError, match="expected a tag that can name a folder"):
        engine.load_checkpoint(tmp_path, tag=tag)


def warm_start(group: Any, path: str, dtype: str, options: dict[str, bool]) -> None:
    engine = start(2, dtype)
    train(engine, range(3))
    engine.save_checkpoint(path)
    saved = [param.detach().clone() for param in engine.module.parameters()]

    other = start(1, dtype, seed=1)
    train(other, range(2))
    before = [other.optimizer.full_state(param) for param in other.module.parameters()]
    scale, counters = other.cur_scale, (other.global_steps, other.lr_scheduler.last_epoch)
    other.load_checkpoint(path, **options)
    for param, weight, state in zip(other.module.parameters(), saved, before, strict=True):
        found = other.optimizer.full_state(param)
        assert torch.equal(param, weight) and torch.equal(found["master"], weight.float())
        assert all(torch.equal(found[name], state[name]) for name in ("exp_avg", "exp_avg_sq", "step"))
    assert other.cur_scale == scale
    is_module = options.get("load_module_only", False)
    assert (other.global_steps, other.lr_scheduler.last_epoch) == (counters if is_module else (3, 3))
    train(other, range(2, 3))


@pytest.mark.parametrize("options", [{"load_module_only": True}, {"load_optimizer_states": False}], ids=str)
@pytest.mark.parametrize("dtype", SECTIONS)
@pytest.mark.parametrize("size", [1, 4])
def test_the_weights_alone(ranks, tmp_path, size, dtype, options):
    if size > 1:
        ranks.run(size, warm_start, str(tmp_path), dtype, options)
    else:
        warm_start(None, tmp_path, dtype, options)


def test_the_schedule_may_stay(tmp_path):
    engine = start(2, "fp32")
    train(engine, range(3))
    engine.save_checkpoint(tmp_path)
    other = start(2, "fp32")
    other.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert (other.global_steps, other.lr_scheduler.last_epoch) == (3, 0)


RATES = {
    "config": lambda optimizer: WarmupLR(optimizer, 0.0, 0.02, 8, "linear"),
    "torch": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),  # goes on from the last rate
}


@pytest.mark.parametrize("options", [{"load_lr_scheduler_states": False}, {"load_optimizer_states": False}], ids=str)
@pytest.mark.parametrize("kind", RATES)
def test_rates_are_the_schedules_where_one_alone_is_loaded(tmp_path, kind, options):
    def build(scheduler: Any) -> Any:
        config = {"train_micro_batch_size_per_gpu": 8, "optimizer": {"type": "AdamW", "params": {"lr": 0.02}}}
        return pyzero.initialize(model=nn.Linear(6, 3), config=config, lr_scheduler=scheduler)[0]

    def go(engine: Any) -> list[list[float]]:
        rates = []
        for _ in range(3):
            rates.append(engine.get_lr())
            engine.backward(engine(torch.ones(8, 6)).sum())
            engine.step()
        return rates

    saved, fresh, other = (build(RATES[kind]) for _ in range(3))
    from_start = go(saved)
    saved.save_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path, **options)
    assert other.get_lr() == other.lr_scheduler.get_last_lr()
    assert go(other) == (go(saved) if "load_optimizer_states" in options else from_start == go(fresh) and from_start)


def test_a_schedule_of_the_config_goes_on_at_the_configs_rates(tmp_path):
    engines = []
    for rate in (0.02, 0.01):
        params = {"cycle_min_lr": 0, "cycle_max_lr": rate, "cycle_max_mom": 50 * rate, "cycle_first_step_size": 8}
        config = {
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": {"type": "AdamW", "params": {"lr": 1.0}},
            "scheduler": {"type": "OneCycle", "params": params},
        }
        engines.append(pyzero.initialize(model=nn.Linear(6, 3), config=config)[0])
    saved, other = engines
    for _ in range(4):
        saved.backward(saved(torch.ones(8, 6)).sum())
        saved.step()
    saved.save_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path)
    assert (saved.get_lr(), other.get_lr(), other.lr_scheduler.get_last_lr()) == ([0.01], [0.005], [0.005])
    assert [engine.get_mom()[0][0] for engine in engines] == pytest.approx([0.9, 0.65])


def test_parameters_that_nobody_trains_do_not_keep_from_a_save(tmp_path):
    """They have gradients too, which no step clears."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    config = {"train_micro_batch_size_per_gpu": 8, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    engine = pyzero.initialize(model=model, model_parameters=model[1].parameters(), config=config)[0]
    train(engine, range(1))
    assert model[0].weight.grad is not None
    engine.save_checkpoint(tmp_path)
    engine.backward(engine(torch.ones(8, 6)).sum())
    with pytest.raises(pyzero.CheckpointError, match="got one in the middle of an accumulation"):
        engine.save_checkpoint(tmp_path)


def save_on_a_half(group: Any, path: str) -> list[int]:
    """Save with an engine over ranks 0 and 1, while the other ranks do nothing."""
    meshes = [DeviceMesh("cpu", ranks, mesh_dim_names=("dp",)) for ranks in ([0, 1], [2, 3])]
    if comm.get_rank() > 1:
        return []
    torch.manual_seed(0)
    config = {"train_micro_batch_size_per_gpu": 8, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    engine = pyzero.initialize(model=nn.Linear(6, 3), config=config, mesh=meshes[0])[0]
    train(engine, range(2))
    engine.save_checkpoint(path)
    train(engine, range(1))
    engine.load_checkpoint(path)
    return [engine.global_steps]


def test_an_engine_of_some_ranks_waits_for_no_others(ranks, tmp_path):
    assert ranks.run(4, save_on_a_half, str(tmp_path)) == [[4], [4], [], []]


def train_of_a_kind(kind: str, path: Path) -> Any:
    """Return an engine with another optimizer, groups or trained parameters than `start`'s, and save a checkpoint."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 70), nn.ReLU(), nn.BatchNorm1d(70), nn.Linear(70, 3))
    params: Any = list(model.parameters())
    if kind == "groups":
        params = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.5}]
    elif kind == "trained":
        model[0].requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "Lion" if kind == "rule" else "AdamW", "params": {"lr": 0.5}},
        "bf16": {"enabled": True},
    }
    engine = pyzero.initialize(model=model, model_parameters=params, config=config)[0]
    train(engine, range(2))
    if kind == "ours":
        pyzero.save_checkpoint(path / "tag", model=model, optimizer=engine.optimizer, step=2, note="none of an engine")
    else:
        engine.save_checkpoint(path, tag="tag", client_state={"seen": 1})
    return engine


@pytest.mark.parametrize("options", [{"load_module_only": True}, {"load_optimizer_states": False}], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["rule", "groups", "trained", "ours"])
def test_the_weights_alone_of_another_optimizer(tmp_path, kind, dtype, options):
    saved = train_of_a_kind(kind, tmp_path)
    other = start(2, dtype, seed=1)
    train(other, range(1))
    groups = [{key: value for key, value in group.items() if key != "params"} for group in other.optimizer.param_groups]
    moments = [other.optimizer.full_state(param)["exp_avg"] for param in other.module.parameters()]
    _, client_state = other.load_checkpoint(tmp_path, tag="tag", **options)
    assert client_state == ({} if kind == "ours" else {"seen": 1})
    for name, param in other.module.named_parameters():
        theirs = saved.module.get_parameter(name)
        wanted = saved.optimizer.full_master(theirs) if theirs.requires_grad else theirs.float()
        assert torch.equal(param, wanted.to(param.dtype))
        assert torch.equal(other.optimizer.full_master(param), param.float())
    assert torch.equal(other.module[2].running_var.float(), saved.module[2].running_var.float())
    assert groups == [{k: v for k, v in group.items() if k != "params"} for group in other.optimizer.param_groups]
    for param, moment in zip(other.module.parameters(), moments, strict=True):
        assert torch.equal(other.optimizer.full_state(param)["exp_avg"], moment)
    if kind == "rule":
        with pytest.raises(pyzero.CheckpointError, match=r"of the update rule lion.*load_module_strict=False"):
            other.load_checkpoint(tmp_path, tag="tag")
    train(other, range(1, 2))


def test_the_weights_alone_of_a_tied_matrix_are_its_masters(tmp_path):
    """Under the matrix's second name, the checkpoint has only 16-bit weights."""
    engines = []
    for dtype in ("bf16", "fp32"):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
        model[1].weight = model[0].weight
        config = {
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "bf16": {"enabled": dtype == "bf16"},
        }
        engines.append(pyzero.initialize(model=model, model_parameters=model.parameters(), config=config)[0])
    saved, other = engines
    train(saved, range(2))
    saved.save_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path, load_module_only=True)
    assert torch.equal(other.module[0].weight, saved.optimizer.full_master(saved.module[0].weight))


def test_of_pyzeros_own_save(tmp_path):
    saved = train_of_a_kind("ours", tmp_path)
    other = start(2, "bf16", seed=1)
    assert other.load_checkpoint(tmp_path, tag="tag") == (str(tmp_path / "tag"), {})
    assert (other.global_steps, other.lr_scheduler.last_epoch) == (2, 0)
    assert torch.equal(other.module[3].weight, saved.module[3].weight)


def test_pyzeros_own_load_says_where_the_engines_checkpoint_is(tmp_path):
    engine = start(2, "bf16")
    engine.save_checkpoint(tmp_path, tag="run/best")
    with pytest.raises(
        pyzero.CheckpointError, match=r"got 'run/best', which .* as an engine saves them; pass .*/run/best$"
    ):
        pyzero.load_checkpoint(tmp_path, model=engine.module, optimizer=engine.optimizer)
    assert pyzero.load_checkpoint(tmp_path / "run/best", model=engine.module, optimizer=engine.optimizer)["step"] == 0
    (tmp_path / "latest").write_text("../" + tmp_path.name + "/run/best")
    with pytest.raises(pyzero.CheckpointError, match="by its path: there is none$"):
        pyzero.load_checkpoint(tmp_path, model=engine.module, optimizer=engine.optimizer)


def test_frozen_parameters_may_be_left_out(tmp_path):
    engine = start(2, "bf16", trains_first=False)
    train(engine, range(3))
    engine.save_checkpoint(tmp_path / "without", exclude_frozen_parameters=True)
    engine.save_checkpoint(tmp_path / "with")
    folders = (pyzero.latest_checkpoint(tmp_path / name / "global_step3") for name in ("with", "without"))
    whole, part = (files.read_index(folder)["tensors"] for folder in folders)
    assert whole.keys() - part.keys() == {"model.0.weight"}
    other = start(2, "bf16", seed=1, trains_first=False)
    before = other.module[0].weight.detach().clone()
    other.load_checkpoint(tmp_path / "without")
    assert torch.equal(other.module[0].weight, before) and torch.equal(other.module[0].bias, engine.module[0].bias)
    assert torch.equal(other.module[3].weight, engine.module[3].weight)


def test_a_save_in_the_middle_of_an_accumulation_is_refused(tmp_path):
    engine = start(2, "fp32")
    engine.backward(engine(torch.ones(8, 6)).sum())
    engine.step()
    with pytest.raises(pyzero.CheckpointError, match="got one in the middle of an accumulation"):
        engine.save_checkpoint(tmp_path)
    engine.backward(engine(torch.ones(8, 6)).sum())
    engine.step()
    engine.save_checkpoint(tmp_path)


def test_what_is_not_supported_says_so(tmp_path):
    engine = start(2, "fp32")
    with pytest.raises(ValueError, match="custom_load_fn"):
        engine.load_checkpoint(tmp_path, custom_load_fn=print)


def load_by_hand(group: Any, path: str, dtype: str, options: dict[str, bool]) -> list[bool]:
    """Load into a module whose last layer has other names."""
    saved = start(2, dtype)
    train(saved, range(2))
    saved.save_checkpoint(path, client_state={"seen": 1})

    def load(src: dict[str, Tensor], dst: nn.Module) -> None:
        found.update(src)
        with torch.no_grad():
            dst[3][0].weight.copy_(src["3.weight"])
            dst[2].running_mean.copy_(src["2.running_mean"] + 1.0)

    found: dict[str, Tensor] = {}
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 70), nn.ReLU(), nn.BatchNorm1d(70), nn.Sequential(nn.Linear(70, 3)))
    config = {"train_batch_size": 8, "optimizer": {"type": "AdamW"}, **SECTIONS[dtype]}
    engine = pyzero.initialize(model=model, config=config)[0]
    before = engine.module[0].weight.detach().clone()
    _, client_state = engine.load_checkpoint(path, custom_load_fn=load, **options)
    weight = engine.module[3][0].weight
    return [
        found.keys() == saved.module.state_dict().keys(),
        torch.equal(weight, saved.module[3].weight),
        torch.equal(engine.optimizer.full_master(weight), weight.float()),
        torch.equal(engine.module[0].weight, before),
        torch.equal(engine.module[2].running_mean, saved.module[2].running_mean + 1.0),
        client_state == {"seen": 1},
        engine.global_steps == (0 if options.get("load_module_only") else 2),
    ]


@pytest.mark.parametrize("options", [{"load_module_only": True}, {"load_optimizer_states": False}], ids=str)
@pytest.mark.parametrize("dtype", SECTIONS)
def test_a_function_of_the_callers_loads_the_weights(ranks, tmp_path, dtype, options):
    for held in ranks.run(4, load_by_hand, str(tmp_path), dtype, options):
        assert held == [True] * 7


def fails_on_one(group: Any, path: str) -> str:
    engine = start(2, "fp32")
    engine.save_checkpoint(path)

    def load(src: Any, dst: Any) -> None:
        if comm.get_rank():
            raise KeyError("as planned")

    with pytest.raises(pyzero.CheckpointError) as raised:
        engine.load_checkpoint(path, load_module_only=True, custom_load_fn=load)
    return str(raised.value)


def test_where_it_fails_on_one_rank_all_are_told(ranks, tmp_path):
    for said in ranks.run(4, fails_on_one, str(tmp_path)):
        assert "failed on rank 1 of 4: KeyError: 'as planned'" in said


def assigns(group: Any, path: str) -> str:
    engine = start(2, "fp32")
    engine.save_checkpoint(path)

    def load(src: Any, dst: Any) -> None:
        dst.load_state_dict(src, assign=comm.get_rank() == 1)

    with pytest.raises((ValueError, pyzero.CheckpointError)) as raised:
        engine.load_checkpoint(path, load_module_only=True, custom_load_fn=load)
    return str(raised.value)


def test_one_that_replaces_parameters_is_refused(ranks, tmp_path):
    """No step would update the new parameters."""
    for said in ranks.run(4, assigns, str(tmp_path)):
        assert "got 6 of 6 replaced by others, 0.bias first; build the engine anew, and copy into them" in said
