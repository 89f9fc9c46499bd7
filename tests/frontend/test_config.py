"""The DeepSpeed config: arithmetic of batch sizes, what is refused and with which words, what it means in our terms."""

import json

import pytest

from pyzero.config import Batches
from pyzero.config_reader import load
from pyzero.scaler import LossScale

ISSUE = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
    "fp16": {"enabled": True},
    "zero_optimization": {"stage": 2},
}


@pytest.mark.parametrize(
    ("train", "micro", "accumulation", "num_ranks", "wanted"),
    [
        (16, 4, None, 1, (16, 4, 4)),
        (16, 4, None, 2, (16, 4, 2)),
        (16, 4, None, 4, (16, 4, 1)),
        (16, None, 2, 2, (16, 4, 2)),
        (None, 4, 2, 2, (16, 4, 2)),
        (None, 4, None, 3, (12, 4, 1)),
        (16, None, None, 4, (16, 4, 1)),
        (16, 4, 2, 2, (16, 4, 2)),
    ],
)
def test_batches(train, micro, accumulation, num_ranks, wanted):
    batches = Batches.solve(train, micro, accumulation, num_ranks)
    assert (batches.train, batches.micro, batches.accumulation) == wanted


@pytest.mark.parametrize(
    ("train", "micro", "accumulation", "num_ranks"),
    [(16, 4, None, 3), (16, 4, 4, 2), (4, None, None, 8), (16, 32, None, 1), (None, None, 4, 1)],
)
def test_batches_that_do_not_agree(train, micro, accumulation, num_ranks):
    with pytest.raises(ValueError, match=rf"train_batch_size={train}.*{num_ranks} rank.*wanted train_batch_size"):
        Batches.solve(train, micro, accumulation, num_ranks)


def test_auto_is_worked_out():
    config = load({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": "auto"})
    assert config.batches(2).accumulation == 2


@pytest.mark.parametrize("form", ["dict", "text", "path", "Path"])
def test_forms(form, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ISSUE))
    given = {"dict": ISSUE, "text": json.dumps(ISSUE), "path": str(path), "Path": path}[form]
    config = load(given)
    assert (config.train_batch_size, config.fp16.enabled, config.zero_optimization.stage) == (16, True, 2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train_batchsize": 8}, ["train_batchsize: unknown key", "did you mean 'train_batch_size'?"]),
        ({"fp16": {"enable": True}}, ["fp16.enable: unknown key", "did you mean 'enabled'?"]),
        ({"optimizer": {"type": "Adam", "params": {"learning_rate": 1}}}, ["optimizer.params.learning_rate", "known"]),
        ({"zero_optimization": {"stages": 2}}, ["zero_optimization.stages", "did you mean 'stage'?"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage: got 3", "not there yet"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer: offload is not there"]),
        ({"train_batch_size": "8"}, ["train_batch_size: got '8'", "remove the quotes"]),
        ({"train_batch_size": 0}, ["train_batch_size: got 0"]),
        ({"train_batch_size": True}, ["train_batch_size: got True"]),
        ({"fp16": {"enabled": "yes"}}, ["fp16.enabled: got 'yes'"]),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ["wanted one of them"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type: got 'Lamb'"]),
        ({"optimizer": {"type": "Adam", "params": {"amsgrad": True}}}, ["optimizer.params.amsgrad: got True"]),
        ({"scheduler": {"type": "OneCycle"}}, ["scheduler.type: got 'OneCycle'", "WarmupLR"]),
        ({"scheduler": {"type": "WarmupDecayLR"}}, ["total_num_steps"]),
        ({"wall_clock_breakdown": True}, ["wall_clock_breakdown: got True"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:40],
)
def test_refusals(values, words):
    with pytest.raises(ValueError) as error:
        load({"train_batch_size": 8, **values})
    for word in words:
        assert word in str(error.value)


def test_every_error_is_told_at_once():
    with pytest.raises(ValueError) as error:
        load({"train_batchsize": 8, "fp16": {"enable": True}})
    assert "train_batch_size" in str(error.value) and "fp16.enable" in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{'a': 1}", "not JSON"),
        ('{"fp16": {}, "fp16": {}}', "twice"),
        ("no_such_file.json", "no file"),
    ],
)
def test_unreadable(text, words):
    with pytest.raises(ValueError, match=words):
        load(text)


def test_of_no_known_kind():
    with pytest.raises(TypeError, match="got int"):
        load(8)


def test_counts_in_scientific_notation():
    zero = load('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 2e6}}').zero_optimization
    assert zero.arguments(element_size=2) == {"stage": 2, "overlap": True, "bucket_cap_mb": 4e6 / 2**20}


def test_defaults_are_ours():
    config = load({})
    assert config.gradient_clipping == 0
    assert config.zero_optimization.arguments(4) == {"stage": 1, "overlap": True}


def test_loss_scale():
    assert load({"fp16": {"enabled": True}}).fp16.policy() == LossScale(
        init_scale=65536.0, growth_interval=1000, min_scale=1.0, hysteresis=2, growth_delay=1
    )
    fixed = load({"fp16": {"enabled": True, "loss_scale": 128}}).fp16.policy()
    assert (fixed.init_scale, fixed.growth_factor, fixed.backoff_factor) == (128.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("section", "decoupled"),
    [
        ({"type": "Adam"}, True),
        ({"type": "adam", "params": {"adam_w_mode": False}}, False),
        ({"type": "AdamW", "params": {"lr": "auto"}}, True),
    ],
)
def test_which_adam(section, decoupled):
    optimizer = load({"optimizer": section}).optimizer
    assert optimizer.decoupled() is decoupled
    assert optimizer.arguments() == {}
