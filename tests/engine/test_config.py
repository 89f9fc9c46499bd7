"""The DeepSpeed config: batch sizes, refusals and their messages, and the arguments that pyzero gets."""

import json
import sys
from pathlib import Path

import ds_configs
import pytest
import torch

from pyzero.deepspeed.config import keys
from pyzero.deepspeed.config.reader import load
from pyzero.deepspeed.config.schema import Batches, Config
from pyzero.deepspeed.log import remark_on
from pyzero.loss_scale.scaler import LossScale

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
        (
            {"optimizer": {"type": "Adam", "params": {"learning_rate": 1e-3, "wd": 0.1, "beta1": 0.9}}},
            [
                "optimizer.params.learning_rate: unknown key; did you mean 'lr'?",
                "optimizer.params.wd: unknown key; did you mean 'weight_decay'?",
                "optimizer.params.beta1: unknown key; did you mean 'betas'?",
            ],
        ),
        ({"zero_optimization": {"stages": 2}}, ["zero_optimization.stages", "did you mean 'stage'?"]),
        ({"train_batch_size": "8"}, ["train_batch_size: got '8'", "remove the quotes"]),
        ({"train_batch_size": 0}, ["train_batch_size: got 0"]),
        ({"train_batch_size": True}, ["train_batch_size: got True"]),
        ({"fp16": {"enabled": "yes"}}, ["fp16.enabled: got 'yes'"]),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ["wanted one of them"]),
        ({"optimizer": {"type": "Adagrad"}}, ["optimizer.type: got 'Adagrad'", "wanted Adam, AdamW, Lion, Lamb"]),
        ({"optimizer": {"type": "Lion", "params": {"bias_correction": False}}}, ["Lion has no params.bias_correction"]),
        ({"optimizer": {"type": "SGD", "params": {"betas": [0.9, 0.99]}}}, ["SGD has no params.betas"]),
        (
            {"gradient_clipping": 2.0, "optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}},
            ["max_grad_norm is 1.0", "gradient_clipping is 2.0", "remove max_grad_norm"],
        ),
        ({"zero_optimization": 2}, ["zero_optimization: got 2; wanted a section of keys"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage: got 4", "0, 1, 2 or 3"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
            ["zero_optimization.offload_optimizer.device"],
        ),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1]}}}, ["optimizer.params.betas: got 1; input"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op: got 'sum'", "multiply the loss"]),
        ({"tensor_parallel": {"autotp_size": 4, "tp": {"tp_size": 2}}}, ["tensor_parallel: got", "wanted one"]),
        (
            {"tensor_parallel": {"partition_config": {"layer_specs": [{"patterns": ["a"], "shape": [2, -1]}]}}},
            ["partition_config.layer_specs", "a fused weight is not split"],
        ),
        ({"elasticity": {"enabled": True, "micro_batch_sizes": [2]}}, ["elasticity: got", "set the batch sizes"]),
        ({"gradient_cliping": 1.0}, ["gradient_cliping: unknown key; did you mean 'gradient_clipping'?"]),
        ({"lr_scheduler": {}}, ["lr_scheduler: unknown key; did you mean 'scheduler'?"]),
        ({"FP16": {"enabled": True}}, ["FP16: unknown key; did you mean 'fp16'?"]),
        ({"optimizer": {"type": "Adam", "param": {"lr": 1}}}, ["optimizer.param: unknown key; did you mean 'params'?"]),
        ({"optimizer": {"param": {}}, "fp16": {"enable": True}}, ["optimizer.param: unknown key", "fp16.enable"]),
        ({"torch_autocast": {"enable": True}}, ["torch_autocast.enable: unknown key; did you mean 'enabled'?"]),
        ({"fp16": {"fp16": True}}, ["fp16.fp16: unknown key; known here: enabled, auto_cast"]),
        ({"fp16": {"stage": 2}}, ["fp16.stage: unknown key; did you mean 'zero_optimization.stage'?"]),
        ({"bf16": {"offload_optimizer": {}}}, ["unknown key; did you mean 'zero_optimization.offload_optimizer'?"]),
        ({"zero_optimization": {"max_grad_norm": 1}}, ["max_grad_norm: unknown key; did you mean 'gradient_clipping'"]),
        (
            {"zero_optimization": {"launcher": 1, "sequence_parallel_size": 2}},
            [
                "zero_optimization.launcher: unknown key, nor one of DeepSpeed's; remove it, or begin it with _",
                "zero_optimization.sequence_parallel_size: unknown key, nor one of DeepSpeed's; remove it",
            ],
        ),
        ({"tensor_parallel": {"enabled": True}}, ["tensor_parallel.enabled: unknown key, nor one of DeepSpeed's"]),
        ({"optimizer": {"type": "Adam", "params": {"use_triton": True}}}, ["optimizer.params.use_triton: unknown key"]),
        *(
            ({"data_efficiency": {"enabled": True, **part}}, ["data_efficiency: got", "in the training loop"])
            for part in (
                {"data_sampling": {"enabled": True, "num_workers": 2}},
                {"data_sampling": {"curriculum_learning": {"enabled": True}}},
                {"data_sampling": {"enabled": False}, "data_routing": {"enabled": True}},
            )
        ),
        ({"fp16": {"enabled": True, "hysteresis": 0}}, ["wanted a hysteresis from 1", "never lowers at 0; set 1"]),
        ({"gradient_accumulation_steps": [1, 2]}, ["gradient_accumulation_steps: got [1, 2]", "autotuning to choose"]),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}, ["betas: got [0.9]; Field required"]),
        ({"optimizer": {"type": "Adam", "params": {"amsgrad": True}}}, ["optimizer.params.amsgrad: got True"]),
        ({"scheduler": {"type": "LambdaLR"}}, ["scheduler.type: got 'LambdaLR'", "WarmupLR", "lr_scheduler="]),
        ({"scheduler": {"type": "StepLR"}}, ["StepLR wants params.step_size; set them"]),
        (
            {"scheduler": {"type": "StepLR", "params": {"step_size": 2, "gama": 1}}},
            ["StepLR has no params gama; it has step_size, gamma, last_epoch"],
        ),
        ({"scheduler": {"type": "OneCycle"}}, ["OneCycle wants params.cycle_min_lr and params.cycle_max_lr"]),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"cycle_min_lr": 1}}},
            ["WarmupLR has no params cycle_min_lr; it has warmup_min_lr"],
        ),
        ({"scheduler": {"type": "WarmupDecayLR"}}, ["total_num_steps"]),
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
        ("{'a': ", "J[Ss][Oo][Nn]"),
        ('{"fp16": {}, "fp16": {}}', "twice"),
        ("no_such_file.json", "no file"),
    ],
)
def test_unreadable(text, words):
    with pytest.raises(ValueError, match=words):
        load(text)


@pytest.mark.parametrize(
    ("params", "decay"),
    [({}, None), ({"torch_adam": True}, 0.01), ({"torch_adam": True, "weight_decay": 0.5}, 0.5)]
    + [({"torch_adam": True, "adam_w_mode": False}, None)],
)
def test_torch_adam_has_the_decay_of_torchs_adamw(params, decay):
    config = load({"train_batch_size": 8, "optimizer": {"type": "Adam", "params": params}})
    assert config.optimizer is not None and config.optimizer.arguments().get("weight_decay") == decay


def test_torch_adam_beside_the_params():
    """DeepSpeed's own tests set it outside params, where DeepSpeed ignores it."""
    config = load({"train_batch_size": 8, "optimizer": {"type": "AdamW", "torch_adam": True}})
    assert config.optimizer is not None and config.optimizer.torch_adam is True


@pytest.mark.parametrize(
    "text",
    [
        '{"train_batch_size": 8, // samples\n "fp16": {"enabled": true,},}',
        '{"train_batch_size": 8, /* {"fp16":\n 1 */ "fp16": {"enabled": true}}  # weights',
        '{"_comment": "of // # /* \\", } */", "train_batch_size": 8, "fp16": {"//": 1, "enabled": true, "comment": 2}}',
        '// ours\n# ours\n/* ours */ {"train_batch_size": 8, "fp16": {"enabled": true}}',
    ],
    ids=("lines", "block", "keys", "first"),
)
def test_comments(text):
    config = load(text)
    assert (config.train_batch_size, config.fp16.enabled) == (8, True) and list(keys.remarks(config)) == []
    with pytest.raises(ValueError, match="twice"):
        load('{"train_batch_size": 8, // one\n "train_batch_size": 8}')


def test_a_file_of_an_editor_on_windows(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes('\ufeff{"train_batch_size": 8, // é\r\n}'.encode())
    assert load(path).train_batch_size == 8


def test_keys_without_quotes_where_hjson_is_installed():
    pytest.importorskip("hjson", reason="hjson is not installed")
    assert load("{train_batch_size: 8\n fp16: {enabled: true}}").train_batch_size == 8
    with pytest.raises(ValueError, match="neither JSON nor Hjson"):
        load('{"fp16": ')


def test_no_json_without_hjson(monkeypatch):
    monkeypatch.setitem(sys.modules, "hjson", None)
    with pytest.raises(ValueError, match="not JSON.*install hjson, as DeepSpeed does"):
        load("{train_batch_size: 8}")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing_enable"),
        ({"num_processes": 7}, "accelerate's own file"),
        ({"zero3_init_flag": True}, "accelerate's own file"),
        ({"logging": {"level": "info"}}, "logging.getLogger"),
        ({"dtype": "float16"}, "set fp16 or bf16"),
        ({"zero_optimization": {"stage": 3, "sdma_allgather": True}}, None),
        ({"fp16": {"enabled": True, "hysteresis": 0, "loss_scale": 1024}}, None),
        ({"fp16": {"enabled": False, "hysteresis": 0}}, None),
        ({"checkpoint": {"use_node_local_storage": True}}, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_public_configs_have_besides(values, words):
    lines = [line for line, _ in keys.remarks(load({"train_batch_size": 8, **values}))]
    assert len(lines) == (words is not None) and all(words in line for line in lines)


@pytest.mark.parametrize(
    ("values", "listed"),
    [
        ({"launcher": "x"}, "launcher"),
        ({"disable_fused_adam": True, "fp8": {"enabled": True}}, "disable_fused_adam, fp8"),
        (
            {"offload_optimizer": {"device": "cpu"}},
            "offload_optimizer (its place: zero_optimization.offload_optimizer)",
        ),
        ({"stage": 2}, "stage (its place: zero_optimization.stage)"),
        ({"loss_scale": 0}, "loss_scale (its place: fp16.loss_scale)"),
        ({"learning_rate": 1}, "learning_rate (its place: optimizer.params.lr)"),
        ({"max_grad_norm": 1.0}, "max_grad_norm (its place: gradient_clipping)"),
        ({"memory_optimization": {}}, "memory_optimization"),
        ({"sequence_parallel": {"enabled": True, "size": 4}}, "sequence_parallel"),
        ({"expert_parallel_size": 2, "model_parallel_size": 2}, "expert_parallel_size, model_parallel_size"),
        (
            {"optimizer": {"type": "Adam", "eps": 1e-6, "device": "cpu"}},
            "optimizer.eps (its place: optimizer.params.eps), optimizer.device",
        ),
        ({"scheduler": {"type": "WarmupLR", "by": "step"}}, "scheduler.by"),
        ({"scheduler": {"type": "StepLR", "params": {"step_size": 2}}}, None),
        ({"torch_autocast": {"level": 1}, "data_types": {"a": 1}}, "torch_autocast.level, data_types.a"),
        ({"activation_checkpointing": {"profiles": 1}, "fp8": 1}, "fp8, activation_checkpointing.profiles"),
        ({"checkpoint": {"every": 2}, "flops_profiler": {"ranks": 2}}, "checkpoint.every, flops_profiler.ranks"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unknown_keys_that_deepspeed_ignores(values, listed, caplog):
    """They stay readable, as in DeepSpeed, and one warning lists them."""
    config = load({"train_batch_size": 8, **values})
    assert config["train_batch_size"] == 8 and all(name in config for name in values)
    remark_on(config, trains=False)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines == ([f"config: unknown keys are ignored, as in DeepSpeed: {listed}"] if listed else [])


@pytest.mark.parametrize(
    "techniques",
    [{}, {"dataset_type": "blendable"}]
    + [{"data_sampling": {"enabled": False, "num_workers": 2}, "data_routing": {"random_ltd": {"enabled": False}}}],
)
def test_data_efficiency_without_a_technique(techniques):
    assert lines_of({"data_efficiency": {"enabled": True, "seed": 1234, **techniques}}) == []


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
    assert optimizer.arguments() == {"decoupled_weight_decay": decoupled}


@pytest.mark.parametrize("name", ds_configs.ACCEPTED)
def test_configs_that_people_have_are_accepted(name):
    """A dict and its JSON give the same config."""
    config = ds_configs.ACCEPTED[name]
    assert load(config) == load(json.dumps(config))


@pytest.mark.parametrize("name", ds_configs.REFUSED)
def test_configs_that_would_mean_something_else_are_refused(name):
    with pytest.raises(ValueError, match="the config has errors"):
        load(ds_configs.REFUSED[name])


def test_the_number_of_configs():
    assert (len(ds_configs.ACCEPTED), len(ds_configs.REFUSED)) == (88, 17)


def test_a_file_that_is_no_config():
    """DeepSpeed's own example of Bing's BERT has another file for the rest."""
    config = load({"name": "bing_bert", "data": {"flags": {}}, "training": {"num_epochs": 150}})
    with pytest.raises(ValueError, match="wanted train_batch_size or train_micro_batch_size_per_gpu"):
        config.batches(num_ranks=1)


def test_the_docs_have_every_key():
    """docs/deepspeed.md contains the table that `python -m pyzero config-keys` prints."""
    assert keys.table(Config) in (Path(__file__).parents[2] / "docs" / "deepspeed.md").read_text()


def every_section(section=Config):
    yield section
    for field in section.model_fields.values():
        if (below := keys.section_of(field.annotation)) is not None:
            yield from every_section(below)


def test_every_key_has_a_state():
    for section in every_section():
        for name, field in section.model_fields.items():
            has_state = keys.state_of(section, name) is not None
            assert has_state or keys.section_of(field.annotation), f"{section.__name__}.{name}"


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (True, True),
        (False, False),
        (None, False),
        ("none", False),
        (1, False),
        (4, True),
        ({"enabled": False, "inner": {"enabled": True}}, False),
        ({"one": {"enabled": False}, "two": {"enabled": True}}, True),
        ({"one": {"shared": {"enabled": False}, "groups": {"a": {"bits": 8}}}}, False),
        ({"autotp_size": 1}, False),
        ({}, False),
    ],
)
def test_what_asks_for_something(value, wanted):
    assert keys.is_asked_for(value) is wanted


def lines_of(config):
    return [line for line, _ in keys.remarks(load(config))]


def test_a_key_without_effect_is_told_once():
    lines = lines_of({"prescale_gradients": True, "aio": {"queue_depth": 8}, "hybrid_engine": {"enabled": True}})
    assert len(lines) == 2
    assert lines[0].startswith("prescale_gradients=true: gradients are summed in fp32")
    assert lines[1].startswith("hybrid_engine=...: generate() is the module's own")


def test_keys_of_a_section_that_are_told_the_same_are_told_in_one_line():
    keys_set = {"partition_activations": True, "cpu_checkpointing": True, "contiguous_memory_optimization": True}
    lines = lines_of({"activation_checkpointing": keys_set, "checkpoint": {"parallel_write": {"pipeline_stage": True}}})
    assert len(lines) == 2
    (line,) = (line for line in lines if line.startswith("activation_checkpointing"))
    named, _, text = line.partition(": ")
    assert named == ", ".join(f"activation_checkpointing.{key}=true" for key in keys_set)
    assert text.startswith("the model calls torch.utils.checkpoint")


def test_defaults_and_disabled_sections_are_told_nothing_of():
    zero = {"stage": 2, "cpu_offload": False, "offload_param": {"device": "none"}, "contiguous_gradients": True}
    config = {"prescale_gradients": False, "hybrid_engine": {"enabled": False}, "zero_optimization": zero}
    assert lines_of({**config, "tensorboard": {"enabled": False}}) == []


def test_offload_is_of_masters_and_state():
    for zero in (
        {"offload_optimizer": {"device": "cpu", "pin_memory": True, "fast_init": True}},
        {"cpu_offload": True},
    ):
        config = load({"zero_optimization": {"stage": 2, **zero}})
        assert list(keys.remarks(config)) == []
        assert config.zero_optimization.arguments(2)["cpu_offload"]
    for zero in ({}, {"offload_optimizer": {"device": "none"}}, {"cpu_offload": False}):
        assert "cpu_offload" not in load({"zero_optimization": {"stage": 2, **zero}}).zero_optimization.arguments(2)
    nvme = {"offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}}
    ((line, warns),) = keys.remarks(load({"zero_optimization": nvme}))
    assert warns and line.endswith("masters and moments lie in memory, not on a disk")


def test_auto_is_told_in_one_line():
    (line,) = lines_of({"train_batch_size": "auto", "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}})
    assert line.endswith(": train_batch_size, optimizer.params.lr")


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({}, {"lr": 1e-3, "betas": (0.9, 0.999)}),
        (
            {"lr": 1e-4, "betas": [0.95, 0.98], "weight_decay": 0.1},
            {"lr": 1e-4, "betas": (0.95, 0.98), "weight_decay": 0.1},
        ),
    ],
)
def test_lion_has_the_defaults_of_deepspeed(params, wanted):
    assert load({"optimizer": {"type": "Lion", "params": params}}).optimizer.arguments() == wanted


def test_an_older_place_of_the_clip():
    assert load({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 0.5}}}).max_grad_norm() == 0.5
    assert load({"gradient_clipping": 2.0}).max_grad_norm() == 2.0
    assert load({"gradient_clipping": "auto"}).max_grad_norm() is None


@pytest.mark.parametrize("key", ["bf16", "bfloat16"])
def test_both_names_of_bf16(key):
    assert load({key: {"enabled": True}}).weights_dtype() == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, None),
        ({"communication_data_type": "auto"}, None),
        ({"communication_data_type": "fp16"}, torch.float16),
        ({"fp32_allreduce": True}, torch.float32),
    ],
)
def test_the_dtype_of_communication(config, dtype):
    assert load(config).grad_reduce_dtype() is dtype
