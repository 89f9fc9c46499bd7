"""What scripts were observed to do under DeepSpeed 0.19, but not here. Each works here now."""

import base64
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyzero
from pyzero import deepspeed
from pyzero.deepspeed import utils

CONFIG = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "Adam", "params": {"lr": 0.01}}}
BF16 = {**CONFIG, "bf16": {"enabled": True}}


class Rotary(nn.Module):
    """A layer after rotary frequencies. Rounding these would move an angle at position 1000 by radians."""

    def __init__(self, casts: bool = True) -> None:
        super().__init__()
        self.casts = casts
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("frequencies", 1.0 / torch.arange(1.0, 5.0) ** 0.7)
        self.register_buffer("phases", torch.polar(torch.ones(2), torch.arange(2.0)))

    def forward(self, inputs: Tensor) -> Tensor:
        turned = inputs * torch.cos(1000 * self.frequencies)
        return self.norm(self.layer(turned.to(inputs.dtype) if self.casts else turned))


def dtypes_of_buffers(group: Any, stage: int, data_types: dict[str, str], path: str) -> dict[str, torch.dtype]:
    model = Rotary()
    exact = model.frequencies.clone()
    engine, *_ = pyzero.initialize(
        model=model, config={**BF16, "zero_optimization": {"stage": stage}, "data_types": data_types}
    )
    engine.backward(engine(torch.randn(2, 4)).float().sum())
    engine.step()
    assert torch.equal(model.frequencies.float(), exact.to(model.frequencies.dtype).float())
    engine.save_16bit_model(path)
    if engine.rank == 0:
        saved = torch.load(f"{path}/pytorch_model.bin")
        assert saved["layer.weight"].dtype == torch.bfloat16
        assert all(saved[name].dtype == buffer.dtype for name, buffer in model.named_buffers())
    return {name: buffer.dtype for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_buffers_stay_in_fp32_beside_16_bit_weights(ranks, tmp_path, stage, dtype):
    data_types = {} if dtype is None else {"buffer_dtype": dtype}
    size = 4 if stage == 3 else 1
    run = ranks.run(size, dtypes_of_buffers, stage, data_types, str(tmp_path)) if size > 1 else None
    found = run[0] if run else dtypes_of_buffers(None, stage, data_types, str(tmp_path))
    assert found == {
        "frequencies": torch.float32 if dtype is None else torch.bfloat16,
        "phases": torch.complex64,
        "norm.running_mean": torch.bfloat16,  # torch requires the dtype of BatchNorm's weights
        "norm.running_var": torch.bfloat16,
        "norm.num_batches_tracked": torch.int64,
    }


def test_a_buffer_that_widens_activations_is_an_error_with_the_remedy():
    engine, *_ = pyzero.initialize(model=Rotary(casts=False), config=BF16)
    with pytest.raises(RuntimeError, match="buffers as frequencies stay .* set data_types.buffer_dtype"):
        engine(torch.ones(2, 4))
    narrow = {**BF16, "data_types": {"buffer_dtype": "bf16", "keep_in_fp32_modules": "auto"}}
    engine, *_ = pyzero.initialize(model=Rotary(casts=False), config=narrow)
    assert engine(torch.ones(2, 4)).dtype == torch.bfloat16


class Megatron:
    """A schedule that counts samples."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def step(self, increment: int) -> None:
        self.seen.append(increment)


def start(**options: Any) -> Any:
    config = {**CONFIG, **options.pop("config", {})}
    return pyzero.initialize(model=nn.Linear(4, 3), config=config, **options)


def take_step(engine: Any, **options: Any) -> None:
    engine.backward(engine(torch.ones(2, 4)).sum())
    engine.step(**options)


def test_a_schedule_that_counts_samples():
    engine, _, _, schedule = start(lr_scheduler=Megatron(), config={"gradient_accumulation_steps": 2})
    for _ in range(2):
        take_step(engine)
    for _ in range(2):
        take_step(engine, lr_kwargs={"increment": 3})
    assert schedule.seen == [4, 3]


def test_loaders_of_the_engine():
    numbers = list(range(7))
    engine, _, loader, _ = start(training_data=numbers, collate_fn=sorted, config={"dataloader_drop_last": True})
    loader.data_sampler.set_epoch(1)
    first = list(loader)
    loader.data_sampler.set_epoch(2)
    assert len(first) == 3 and first != list(loader) and engine.training_dataloader is loader
    assert list(engine.deepspeed_io(numbers, batch_size=3, route="eval")) == [[0, 1, 2], [3, 4, 5]]
    assert list(engine.deepspeed_io(numbers, data_sampler=[5, 4], collate_fn=tuple)) == [(5, 4)]


def test_a_dropped_batch_is_counted_as_deepspeed_counts_it(monkeypatch):
    engine = start(config={"dataloader_drop_last": True})[0]
    engine.dp_world_size = 2  # 4 samples a rank, of which one is another rank's too
    assert len(engine.deepspeed_io(range(7), batch_size=4)) == 1


def test_a_config_in_base64():
    text = base64.urlsafe_b64encode(json.dumps(CONFIG).encode()).decode()
    engine, *_ = pyzero.initialize(model=nn.Linear(4, 3), config=text)
    assert engine.train_batch_size() == 2
    with pytest.raises(ValueError, match="which is no file"):
        pyzero.initialize(model=nn.Linear(4, 3), config="a" * 3000)


def test_the_engines_config_is_read_as_a_dict():
    config = start()[0].config
    assert "optimizer" in config and "scheduler" not in config and config["optimizer"]["params"]["lr"] == 0.01
    assert config.get("gradient_accumulation_steps", 1) == 1 and config.get("train_micro_batch_size_per_gpu", 1) == 2
    with pytest.raises(KeyError, match="scheduler"):
        config["scheduler"]


def test_readouts_of_the_config():
    engine = start(config={"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}})[0]
    assert engine.optimizer_params() == {"lr": 0.01} and engine.scheduler_params() == {"warmup_num_steps": 3}
    assert not engine.zero_optimization_partition_gradients() and not engine.zero_optimization_partition_weights()
    assert engine.loss_scale() == 0.0
    config = deepspeed.DeepSpeedConfig({**CONFIG, "zero_optimization": {"stage": 2}, "wall_clock_breakdown": True})
    assert config.zero_config.stage == 2 and config.wall_clock_breakdown is True
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        config.nothing  # noqa: B018


def test_a_save_into_no_folder_is_refused():
    with pytest.raises(ValueError, match="expected a folder to save into, got ''"):
        start()[0].save_checkpoint("")


def test_names_of_the_accelerator():
    mine = deepspeed.get_accelerator()
    assert 0 < mine.available_memory() <= mine.total_memory()
    assert mine.is_synchronized_device() != torch.cuda.is_available()
    mine.set_rng_state(mine.get_rng_state())
    mine.range_push("a range"), mine.range_pop()
    with mine.stream(mine.current_stream()):
        assert isinstance(mine.initial_seed(), int)


def safe_after_evaluation(group: Any) -> list[bool]:
    """A forward without a backward leaves the root's weights whole. A script that walks parameters finds those."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(*(nn.Linear(3, 3) for _ in range(2))))
    engine, *_ = pyzero.initialize(model=model, config={**CONFIG, "zero_optimization": {"stage": 3}})
    found = []
    for value in (2.0, 3.0):
        with torch.no_grad():
            engine(torch.ones(2, 4))
        for param in model.parameters():
            utils.safe_set_full_fp32_param(param, torch.full(tuple(param.shape), value))
            found.append(utils.safe_get_full_fp32_param(param).unique().tolist() == [value])
        with torch.no_grad():
            found.append(bool((engine(torch.zeros(2, 4))[:, 0] == value * (1 + 3 * value * (1 + 3 * value))).all()))
    return found


def test_whole_masters_after_an_evaluation(ranks):
    assert all(map(all, ranks.run(4, safe_after_evaluation)))


def losses_of_lengths(group: Any, num_stages: int) -> list[float]:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)]
    model = deepspeed.PipelineModule(layers, num_stages=num_stages, loss_fn=nn.functional.mse_loss)
    engine, *_ = pyzero.initialize(model=model, config={**CONFIG, "gradient_accumulation_steps": 2})
    losses = []
    for length in (3, 5, 2):
        pair = torch.linspace(-1, 1, 2 * length * 4).reshape(2, length, 4), torch.ones(2, length, 4)
        losses += [float(engine.train_batch(iter([pair] * 2))), float(engine.eval_batch(iter([pair] * 2)))]
        engine.reset_activation_shape()
    return losses


def test_a_pipeline_takes_other_lengths_after_a_reset(ranks):
    split, whole = (ranks.run(4, losses_of_lengths, num_stages) for num_stages in (2, 1))
    torch.testing.assert_close(torch.tensor(split), torch.tensor(whole))


class Times(nn.Module):
    """Records the dtype of its second input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.dtype = torch.float64

    def forward(self, inputs: Tensor, times: Tensor) -> Tensor:
        self.dtype = times.dtype
        return self.layer(inputs)


@pytest.mark.parametrize(
    ("auto_cast", "dtype"), [(None, torch.bfloat16), (True, torch.bfloat16), (False, torch.float32)]
)
def test_auto_cast_says_whether_inputs_are_rounded(caplog, auto_cast, dtype):
    section = {"enabled": True} if auto_cast is None else {"enabled": True, "auto_cast": auto_cast}
    engine, *_ = pyzero.initialize(model=Times(), config={**CONFIG, "bf16": section})
    for _ in range(2):
        engine(torch.ones(2, 4, dtype=torch.bfloat16), torch.full((2,), 999.0))
    assert engine.module.dtype == dtype
    assert caplog.text.count("inputs in torch.float32 are cast to torch.bfloat16") == (auto_cast is None)
