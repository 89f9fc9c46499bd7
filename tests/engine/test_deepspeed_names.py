"""The module-level names of DeepSpeed's scripts, and `import deepspeed` by compat.install()."""

import argparse
import logging
import platform
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyzero.deepspeed as deepspeed
from pyzero.deepspeed import comm, estimates, timers, utils, zero
from pyzero.deepspeed.config.scheduler_section import SchedulerParams

ADAM = {"type": "Adam", "params": {"lr": 0.25, "betas": [0.5, 0.5]}}


def test_every_name_is_there():
    for name in deepspeed.__all__:
        assert getattr(deepspeed, name) is not None
    assert callable(deepspeed.initialize) and deepspeed.ops.adam.FusedAdam and deepspeed.zero.Init
    with pytest.raises(AttributeError, match="'moe'; docs/deepspeed.md"):
        deepspeed.moe  # noqa: B018


def test_arguments():
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    older = {"deepscale": False, "deepscale_config": None}
    assert vars(parser.parse_args([])) == {"deepspeed": False, "deepspeed_config": None, **older}
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json"])
    assert (args.deepspeed, args.deepspeed_config) == (True, "ds.json")


def test_arguments_of_schedules():
    args = deepspeed.add_tuning_arguments(argparse.ArgumentParser()).parse_args(["--warmup_num_steps", "7"])
    assert (args.lr_schedule, args.warmup_num_steps, args.warmup_type) == (None, 7, "log")
    of_configs = set(SchedulerParams.model_fields) - vars(args).keys()
    assert of_configs == {"total_num_steps", "warmup_min_ratio", "cos_min_ratio", "last_batch_iteration"}


@pytest.mark.parametrize("name", ["deepspeed_config", "deepscale_config"])
def test_a_config_among_the_arguments(name):
    args = argparse.Namespace(**{"deepspeed_config": None, name: {"train_batch_size": 8, "optimizer": ADAM}})
    engine, optimizer, _, _ = deepspeed.initialize(args=args, model=nn.Linear(1, 1))
    assert engine.train_batch_size() == 8 and optimizer.param_groups[0]["lr"] == 0.25
    with pytest.raises(ValueError, match="expected a config, got none; .* the script with --deepspeed_config FILE"):
        deepspeed.initialize(args=argparse.Namespace(deepspeed_config=None), model=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="got config= and args.deepspeed_config=.*pass config= alone"):
        deepspeed.initialize(args=args, model=nn.Linear(1, 1), config={"train_batch_size": 8})


@pytest.mark.parametrize(
    ("mine", "least", "most", "wanted"),
    [("2.13.0+cpu", 2.2, None, True), ("2.2.1", 2.13, None, False), ("2.9.0", None, 2.10, False),
     ("2.1.0a0", 2.1, 2.1, True)],
)  # fmt: skip
def test_versions_of_torch(monkeypatch, mine, least, most, wanted):
    monkeypatch.setattr(torch, "__version__", mine)
    assert utils.required_torch_version(least, most) is wanted


def test_timers(caplog, monkeypatch):
    now = iter([0.0, 0.5, 2.0, 2.25])
    monkeypatch.setattr(timers.time, "perf_counter", lambda: next(now))
    clock = timers.SynchronizedWallClockTimer()
    for _ in range(2):
        clock("forward").start()
        clock("forward").stop()
    with caplog.at_level(logging.INFO, logger="pyzero"):
        clock.log(["forward", "backward"], normalizer=2.0)
    assert caplog.messages == ["time (ms) | forward: 375.00"] and clock("forward").elapsed() == 0.0
    with pytest.raises(RuntimeError, match=r"got stop\(\) of one that is stopped; call start"):
        clock("forward").stop()
    clock("backward").started = True
    with pytest.raises(RuntimeError, match=r"got start\(\) of one that runs; call stop"):
        clock("backward").start()


def test_a_timer_of_samples(monkeypatch):
    now = iter([0.0, 1.0, 10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr(timers.time, "perf_counter", lambda: next(now))
    config, lines = argparse.Namespace(enabled=True, synchronized=True), []
    timer = timers.ThroughputTimer(config, 6, start_step=1, steps_per_output=2, logging_fn=lines.append)
    for is_last in (False, True, False, True, True):  # the first global step is not counted
        timer.start()
        timer.stop(global_step=is_last)
    assert lines == ["epoch=0, micro_step=4, global_step=2, samples/s: 2.000 on average, 2.000 now"]
    assert timer.avg_samples_per_sec() == 3.0 and timer.global_step_count == 3
    disabled = timers.ThroughputTimer(argparse.Namespace(enabled=False, synchronized=True), 6)
    disabled.start()
    disabled.stop(global_step=True)
    assert disabled.avg_samples_per_sec() == float("-inf")
    with pytest.raises(ValueError, match="monitor_memory=True.*psutil"):
        timers.ThroughputTimer(config, 6, monitor_memory=True)


def store_on_nodes(group: Any, num_hosts: int) -> str:
    real, platform.node = platform.node, lambda: f"host{comm.get_rank() % num_hosts}"
    config = {"train_batch_size": 8, "optimizer": ADAM, "checkpoint": {"use_node_local_storage": True}}
    try:
        deepspeed.initialize(model=nn.Linear(1, 1), config=config)
    except ValueError as error:
        return str(error)
    finally:
        platform.node = real
    return ""


@pytest.mark.parametrize(("num_hosts", "words"), [(1, ""), (2, "one folder that all ranks see.*ranks on 2 hosts")])
def test_storage_of_a_node(ranks, num_hosts, words):
    for told in ranks.run(4, store_on_nodes, num_hosts):
        assert re.search(words, told) and bool(told) is (num_hosts > 1)


def test_the_config_before_anything_is_built(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 8, "gradient_accumulation_steps": 2, "bf16": {"enabled": true}}')
    config = deepspeed.DeepSpeedConfig(str(path))
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (8, 4)
    assert (config.bfloat16_enabled, config.fp16_enabled, config.zero_enabled, config.optimizer_name) == (
        True, False, False, None,
    )  # fmt: skip
    other = deepspeed.DeepSpeedConfig({"train_batch_size": 8, "optimizer": ADAM, "zero_optimization": {"stage": 2}})
    assert (other.optimizer_name, other.optimizer_params["lr"], other.zero_optimization_stage) == ("adam", 0.25, 2)


def test_no_inference():
    with pytest.raises(NotImplementedError, match="pyzero trains"):
        deepspeed.init_inference(nn.Linear(1, 1))


# ---- comm -----------------------------------------------------------------------------------------------------------


def test_comm_alone():
    deepspeed.init_distributed()
    assert not comm.is_initialized()
    assert (comm.get_rank(), comm.get_world_size(), comm.get_local_rank(), comm.get_world_group()) == (0, 1, 0, None)
    value = torch.ones(2)
    comm.barrier(), comm.all_reduce(value), comm.broadcast(value, 0), comm.log_summary()
    assert value.tolist() == [1.0, 1.0]


def talk(group: Any) -> tuple[int, int, list[float], list[float]]:
    deepspeed.init_distributed(dist_backend="gloo")  # there is a process group already
    total, first = torch.ones(2) * comm.get_rank(), torch.ones(2) * comm.get_rank()
    comm.all_reduce(total)
    comm.broadcast(first, src=1)
    comm.barrier()
    gathered = torch.zeros(8)
    comm.all_gather_into_tensor(gathered, first)
    assert gathered.tolist() == [1.0] * 8 and comm.get_global_rank(group, 2) == 2
    return comm.get_rank(), comm.get_world_size(), total.tolist(), first.tolist()


def test_comm_on_four_ranks(ranks):
    assert ranks.run(4, talk) == [(rank, 4, [6.0, 6.0], [1.0, 1.0]) for rank in range(4)]


def test_init_distributed_by_a_method(tmp_path):
    code = f"""
        import pyzero.deepspeed as deepspeed
        deepspeed.init_distributed("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
        assert deepspeed.comm.get_world_size() == 1 and deepspeed.comm.is_initialized()
        deepspeed.comm.destroy_process_group()
    """
    run(code)


# ---- whole tensors --------------------------------------------------------------------------------------------------


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, factor: float) -> Tensor:
        return (self.weight * factor).sum()


def whole_tensors(group: Any, stage: int) -> None:
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": ADAM, "zero_optimization": {"stage": stage}}
    engine, _, _, _ = deepspeed.initialize(model=Weight(), config={**config, "bf16": {"enabled": True}})
    weight = engine.module.weight
    assert utils.safe_get_full_grad(weight) is None
    engine.backward(engine(4.0))
    assert utils.safe_get_full_grad(weight).tolist() == [4.0] * 5
    utils.safe_set_full_grad(weight, torch.full((5,), 2.0))
    engine.step()
    assert utils.safe_get_full_optimizer_state(weight, "exp_avg").tolist() == [1.0] * 5
    assert utils.safe_get_full_optimizer_state(weight, "no_such_state") is None
    assert utils.safe_get_full_fp32_param(weight).dtype == torch.float32
    with pytest.raises(ValueError, match="expected a parameter of stage 3 .* safe_get_full or safe_set_full"):
        utils.safe_get_local_fp32_param(weight)
    utils.safe_set_full_optimizer_state(weight, torch.full((5,), 3.0), "exp_avg_sq")
    utils.safe_set_full_optimizer_state(weight, torch.full((5,), 1.25), "fp32_param")
    assert utils.safe_get_full_optimizer_state(weight, "exp_avg_sq").tolist() == [3.0] * 5
    assert utils.safe_get_full_optimizer_state(weight, "fp32_param").tolist() == weight.tolist() == [1.25] * 5


@pytest.mark.parametrize("stage", [1, 2])
def test_whole_tensors_of_a_parameter(ranks, stage):
    whole_tensors(None, stage)
    ranks.run(4, whole_tensors, stage)


def test_a_parameter_of_no_engine():
    with pytest.raises(ValueError, match=r"shape \(3,\).*engine.module.parameters"):
        utils.safe_get_full_fp32_param(nn.Parameter(torch.ones(3)))


# ---- zero -----------------------------------------------------------------------------------------------------------


def test_a_model_built_in_init_is_whole(caplog):
    with caplog.at_level(logging.INFO, logger="pyzero"), zero.Init(config_dict_or_path={}, dtype=torch.float16):
        model = nn.Linear(2, 2)
    assert model.weight.shape == (2, 2) and "the model is built whole" in caplog.text
    caplog.clear()
    zero.Init(enabled=False)
    zero.register_external_parameter(model, model.weight)
    assert not caplog.text


def edit_on_one_rank(group: Any, modifier_rank: int | None, enabled: bool, dtype: str) -> list[float]:
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": ADAM, dtype: {"enabled": True}}
    engine, _, _, _ = deepspeed.initialize(model=Weight(), config=config)
    weight = engine.module.weight
    with zero.GatheredParameters(weight, modifier_rank=modifier_rank, enabled=enabled):
        if comm.get_rank() == 2:
            weight.data.fill_(7.0)
    if modifier_rank is not None and enabled:
        assert engine.optimizer.full_master(weight).tolist() == [7.0] * 5
    return weight.tolist()


@pytest.mark.parametrize("dtype", ["bf16", "torch_autocast"])
def test_edits_in_gathered_parameters_reach_all_ranks(ranks, dtype):
    assert ranks.run(4, edit_on_one_rank, 2, True, dtype) == [[7.0] * 5] * 4
    for modifier_rank, enabled in ((None, True), (2, False)):
        found = ranks.run(4, edit_on_one_rank, modifier_rank, enabled, dtype)
        assert [weight[0] for weight in found] == [1.0, 1.0, 7.0, 1.0]


# ---- helpers --------------------------------------------------------------------------------------------------------


def test_logs_of_ranks(caplog):
    with caplog.at_level(logging.INFO, logger="pyzero"):
        utils.log_dist("to all"), utils.log_dist("to the first", ranks=[0]), utils.log_dist("to another", ranks=[1])
        utils.see_memory_usage("quiet"), utils.see_memory_usage("loud", force=True)
    assert [record.getMessage() for record in caplog.records] == [
        "[rank 0] to all",
        "[rank 0] to the first",
        "[rank 0] loud: 0.0 MiB allocated",
    ]


def test_a_loader_without_end():
    loader = utils.RepeatingLoader([1, 2])
    assert [next(loader) for _ in range(5)] == [1, 2, 1, 2, 1]
    assert iter(loader) is loader


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says of a CPU")
def test_the_accelerator_of_a_cpu():
    mine = deepspeed.get_accelerator()
    assert mine is deepspeed.accelerator.get_accelerator()
    assert (mine.device_name(), mine.device_name(1), mine.current_device_name(), mine.device_count()) == (
        "cpu", "cpu", "cpu", 1,
    )  # fmt: skip
    assert (mine.communication_backend_name(), mine.memory_allocated(), mine.max_memory_allocated(0)) == ("gloo", 0, 0)
    mine.empty_cache(), mine.synchronize(), mine.reset_peak_memory_stats(), mine.manual_seed_all(1), mine.manual_seed(1)
    assert mine.is_available() and mine.is_bf16_supported() and mine.is_fp16_supported()
    assert mine.on_accelerator(torch.ones(1)) and torch.bfloat16 in mine.supported_dtypes()
    with mine.device(0):
        assert mine.pin_memory(torch.ones(1)).tolist() == [1.0]
    mine.reset_max_memory_allocated(), mine.reset_max_memory_cached()
    assert (mine.memory_cached(), mine.max_memory_cached(), mine.memory_stats()) == (0, 0, {})
    assert mine.LongTensor([1]).dtype is torch.int64 and mine.FloatTensor(size=(2, 3)).shape == (2, 3)
    assert mine.lazy_call(lambda: 3) == 3 and mine.default_generator(0).get_state().equal(torch.get_rng_state())
    with pytest.raises(AttributeError, match="'Graph'"):
        mine.Graph  # noqa: B018


def test_activation_checkpoints_are_torchs():
    deepspeed.checkpointing.configure(None, deepspeed_config={})
    calls = []

    def square(x: Tensor) -> Tensor:
        calls.append(1)
        return x * x

    x = torch.full((2,), 3.0, requires_grad=True)
    deepspeed.checkpointing.checkpoint(square, x).sum().backward()
    assert x.grad.tolist() == [6.0, 6.0] and len(calls) == 2 and deepspeed.checkpointing.is_configured()


def test_streams_of_random_numbers():
    tracker, checkpointing = deepspeed.checkpointing.get_cuda_rng_tracker(), deepspeed.checkpointing
    checkpointing.model_parallel_cuda_manual_seed(7)
    with tracker.fork():
        inside = torch.rand(3)
    outside = torch.rand(3)
    checkpointing.model_parallel_cuda_manual_seed(7)
    assert torch.equal(torch.rand(3), outside) and not torch.equal(inside, outside)
    before = tracker.get_states()
    x = torch.ones(64, requires_grad=True)

    def drop(x: Tensor) -> Tensor:
        with tracker.fork():
            return nn.functional.dropout(x, 0.5) * x

    y = checkpointing.checkpoint(drop, x)
    after = tracker.get_states()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * y) and 0 < (y == 0).sum() < 64  # the recomputed forward dropped the same elements
    assert torch.equal(after["model-parallel-rng"], tracker.get_states()["model-parallel-rng"])
    tracker.set_states(before)
    with tracker.fork():
        assert torch.equal(torch.rand(3), inside)
    with pytest.raises(ValueError, match="a second time"):
        tracker.add("model-parallel-rng", 1)
    tracker.reset()
    with pytest.raises(ValueError, match="expected a stream that was added"), tracker.fork():
        pass


# ---- profiles and estimates -----------------------------------------------------------------------------------------


class Two(nn.Module):
    """On 3 rows, the layers take 2 * 3 * 4 * 5 and 2 * 3 * 5 * 1 operations."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def test_operations_are_counted(capsys, tmp_path, caplog):
    flops_profiler = deepspeed.profiling.flops_profiler
    model = Two()
    found = flops_profiler.get_model_profile(model, input_shape=(3, 4), as_string=False, detailed=True)
    assert found == (150, 75, 31)
    table = capsys.readouterr().out
    assert re.search(r"up +120.00 FLOPS\n.*down +30.00 FLOPS", table) and "multiply-adds" in table
    told = flops_profiler.get_model_profile(model, args=[torch.ones(3000, 4)], print_profile=False)
    assert told == ("150.00 KFLOPS", "75.00 KMACs", "31.00") and not capsys.readouterr().out
    profiler = flops_profiler.FlopsProfiler(model)
    profiler.start_profile()
    model(torch.ones(3, 4)).sum().backward()
    profiler.stop_profile()
    profiler.print_model_profile(output_file=str(tmp_path / "table"), detailed=False)
    assert "up" not in (tmp_path / "table").read_text()
    assert profiler.get_total_flops() == 150 + 120 + 30 + 30  # gradients of both weights, and of the last layer's input
    assert profiler.get_total_duration() > 0 and profiler.get_total_params() == 31
    profiler.end_profile()
    assert profiler.get_total_flops() == 0
    assert flops_profiler.duration_to_string(0.0125) == "12.50 ms"
    with pytest.raises(ValueError, match="expected input_shape, args or kwargs"):
        flops_profiler.get_model_profile(model)
    with pytest.raises(ValueError, match="got modules to ignore"):
        profiler.start_profile([nn.Linear])


@pytest.mark.parametrize("at", [2, -1])
def test_a_step_of_the_engine_is_profiled(caplog, at):
    config = {"train_batch_size": 3, "optimizer": ADAM, "flops_profiler": {"enabled": True, "profile_step": at}}
    engine, *_ = deepspeed.initialize(model=Two(), config=config)
    for step in range(4):
        with caplog.at_level(logging.INFO, logger="pyzero"):
            caplog.clear()
            engine.backward(engine(torch.ones(3, 4)).sum())
            engine.step()
        assert ("flops profile of Two at step 2" in caplog.text) is (step == at)
        assert (re.search(r"up +120.00 FLOPS", caplog.text) is not None) is (step == at)


def test_names_of_a_pipeline():
    module = deepspeed.PipelineModule([nn.Linear(1, 1)], num_stages=1, loss_fn=nn.functional.mse_loss)
    engine, *_ = deepspeed.initialize(model=module, config={"train_batch_size": 2, "optimizer": ADAM})
    assert (module.num_pipeline_stages(), module.topology().get_axis_names()) == (1, ["pipe", "data"])
    assert (module.mpu().get_stage_id(), module.mpu().get_data_parallel_id()) == (0, 0)
    assert engine.get_pipeline_parallel_rank() == 0 and engine.zero_gather_16bit_weights_on_model_save()
    engine.set_has_attention_mask(True)
    module.set_checkpoint_interval(3)
    assert module.activation_checkpoint_interval == 3


def test_small_names_of_scripts(capsys):
    clock = timers.SynchronizedWallClockTimer()
    assert not clock.has_timer("forward")
    forward = clock("forward")
    assert clock.has_timer("forward") and clock.get_timers() == {"forward": forward}
    timer = timers.ThroughputTimer(argparse.Namespace(enabled=True, synchronized=False), 6)
    timer.start(), timer.stop(), timer.update_epoch_count()
    assert (timer.epoch_count, timer.micro_step_count) == (1, 0)
    model = nn.Linear(4, 5)
    zero.register_external_parameter(model, model.weight)
    zero.unregister_external_parameter(model, model.weight)
    assert not model.weight.is_external
    assert zero.zero_wrapper_for_fp_tensor_constructor(torch.arange, torch.float16) is torch.arange
    assert utils.set_z3_leaf_modules(model, [nn.Linear]) == []
    estimates.estimate_zero2_model_states_mem_needs_all_live(model, num_gpus_per_node=2)
    assert "1 node(s), 2 GPU(s) per node" in capsys.readouterr().out
    profiler = deepspeed.profiling.flops_profiler.FlopsProfiler(model)
    profiler.print_model_aggregated_profile()
    assert "flops profile of Linear at step 1" in capsys.readouterr().out


def test_builders_of_ops_answer_for_ours():
    op_builder = deepspeed.ops.op_builder
    assert op_builder.CPUAdamBuilder().is_compatible() and op_builder.CPUAdamBuilder().load().adam_
    assert op_builder.FusedAdamBuilder().is_compatible() is torch.cuda.is_available()
    assert op_builder.ALL_OPS["cpu_lion"].is_compatible() and not op_builder.AsyncIOBuilder().is_compatible()
    with pytest.raises(NotImplementedError, match="nothing in the place of DeepSpeed's AsyncIO"):
        op_builder.AsyncIOBuilder().load()


# ---- import deepspeed -----------------------------------------------------------------------------------------------


def run(code: str) -> str:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


INSTALL = """
import pyzero.compat
pyzero.compat.install()
pyzero.compat.install()
import deepspeed, pyzero, torch
"""
SCRIPTS = {
    "imports": """
        import deepspeed.comm as dist
        import deepspeed.runtime.activation_checkpointing.checkpointing as checkpointing
        from deepspeed import get_accelerator
        from deepspeed.accelerator import get_accelerator as again
        from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
        from deepspeed.ops.adam.cpu_adam import DeepSpeedCPUAdam as the_same
        from deepspeed.ops.op_builder import CPUAdamBuilder
        from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
        from deepspeed.profiling.flops_profiler.profiler import FlopsProfiler, get_model_profile
        from deepspeed.runtime.config import DeepSpeedConfig
        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.runtime.lr_schedules import WarmupLR, OneCycle
        from deepspeed.runtime.pipe.module import PipelineModule as the_same_module
        from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, ProcessTopology
        from deepspeed.runtime.utils import see_memory_usage
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, GatheredParameters
        from deepspeed.utils import logger, safe_get_full_fp32_param, RepeatingLoader

        assert deepspeed.initialize is pyzero.initialize and the_same is DeepSpeedCPUAdam
        assert deepspeed.ops.adam.FusedAdam is FusedAdam and get_accelerator is again
        assert DeepSpeedEngine is deepspeed.DeepSpeedEngine
        assert deepspeed.PipelineModule is PipelineModule is the_same_module
        assert deepspeed.zero.GatheredParameters is GatheredParameters and deepspeed.runtime.zero.Init
        assert "WarmupLR" in deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES
        deepspeed.checkpointing.partition_activations_in_checkpoint(True)
    """,
    "versions": """
        import importlib.metadata
        assert tuple(map(int, deepspeed.__version__.split("."))) > (0, 10)
        assert deepspeed.version == deepspeed.__version__
        assert importlib.metadata.version("deepspeed") == deepspeed.__version__  # transformers and accelerate ask
        assert "deepspeed" in importlib.metadata.packages_distributions()["deepspeed"]
        assert importlib.metadata.version("torch").split("+")[0] == torch.__version__.split("+")[0]
    """,
    "estimates": """
        import contextlib, io
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs_all_live as estimate_3
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs_all_cold as estimate_2
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            estimate_3(torch.nn.Linear(1000, 1000), num_gpus_per_node=8, num_nodes=2)
            estimate_2(2_000_000_000, 4, additional_buffer_factor=1.5)
        lines = printed.getvalue().splitlines()
        assert len(lines) == 12 and "2 node(s), 8 GPU(s)" in lines[1] and "2,000M total params" in lines[8]
        host, gpu = (float(part.split("GB")[0]) for part in lines[10].split("|")[:2])
        assert 22.3 < host < 22.6 and 3.7 < gpu < 6  # 12 bytes of each parameter on the host, 2 and buffers on the GPU
    """,
    "helpers": """
        from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
        from deepspeed.module_inject.layers import set_autotp_mode
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils import groups
        from deepspeed.runtime.utils import set_random_seed
        import numpy, random
        drawn = []
        for _ in range(2):
            set_random_seed(7)
            drawn.append((random.random(), numpy.random.rand(), float(torch.rand(()))))
        assert drawn[0] == drawn[1]
        set_autotp_mode(training=True)
        assert groups._get_data_parallel_world_size() == 1 and groups.get_data_parallel_group() is None
        assert deepspeed.utils.groups.get_model_parallel_rank() == groups.get_tensor_model_parallel_src_rank() == 0
        assert deepspeed.tp_model_init(torch.nn.Linear(1, 1), 1, torch.bfloat16).weight.dtype is torch.bfloat16
        assert ZeroStageEnum(3) is ZeroStageEnum.weights and LossScaler(4.0).loss_scale == 4.0
        torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum])
        from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
        from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer, ZeROOptimizer
        from deepspeed.runtime.dataloader import DeepSpeedDataLoader, RepeatingLoader
        from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
        from deepspeed.runtime.zero.partition_parameters import is_zero_param as the_same
        from deepspeed.runtime.zero.utils import is_zero_param
        model = torch.nn.Linear(1, 1)
        engine, optimizer, loader, _ = deepspeed.initialize(model=model, training_data=[torch.ones(1)] * 2, config={
            "train_batch_size": 1, "optimizer": {"type": "Adam"},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
        assert isinstance(optimizer, DeepSpeedOptimizer) and isinstance(optimizer, ZeROOptimizer)
        assert isinstance(loader, DeepSpeedDataLoader) and TORCH_DISTRIBUTED_DEFAULT_PORT == 29500
        assert engine.zero_offload_optimizer().device == OffloadDeviceEnum.cpu == "cpu"
        engine.offload_states(include=[OffloadStateTypeEnum.optim_states], device=OffloadDeviceEnum.cpu)
        assert not is_zero_param(model.weight) and the_same is is_zero_param
        deepspeed.utils.set_z3_leaf_module(model, True)
        view = {"a": [torch.arange(9)[2:4]], "b": 1}
        copied = clone_tensors_for_torch_save(view)
        assert copied["a"][0].tolist() == [2, 3] and copied["b"] == 1
        assert copied["a"][0].untyped_storage().nbytes() == 16
    """,
    "training": """
        import deepspeed.comm as dist
        from deepspeed.ops.adam import FusedAdam
        from deepspeed.runtime.lr_schedules import WarmupLR
        deepspeed.init_distributed()
        model = torch.nn.Linear(4, 4)
        engine, optimizer, _, schedule = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), optimizer=FusedAdam(model.parameters(), lr=0.1),
            lr_scheduler=lambda o: WarmupLR(o, warmup_num_steps=2), config={"train_batch_size": 2},
        )
        for _ in range(3):
            engine.backward(engine(torch.ones(2, 4)).sum())
            engine.step()
        assert isinstance(engine, deepspeed.DeepSpeedEngine) and engine.global_steps == 3 and dist.get_rank() == 0
        assert engine.config.get("zero_optimization")["stage"] == 0 and engine.config.get("nothing", 1) == 1
        engine.module.bias.requires_grad_(False)
        assert list(engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)) == ["weight"]
    """,
    "a pipeline": """
        from deepspeed.pipe import PipelineModule
        from deepspeed.runtime.pipe.engine import PipelineEngine
        net = PipelineModule(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()), num_stages=1,
                             loss_fn=torch.nn.MSELoss())
        engine, *_ = deepspeed.initialize(model=net, training_data=[(torch.ones(4), torch.zeros(4))] * 6, config={
            "train_batch_size": 4, "gradient_accumulation_steps": 2, "optimizer": {"type": "Adam"}})
        losses = [float(engine.train_batch()) for _ in range(4)]
        assert isinstance(engine, PipelineEngine) and losses[3] < losses[0] and engine.micro_steps == 8
        assert engine.tput_timer.global_step_count == 4 and engine.tput_timer.avg_samples_per_sec() > 0
    """,
    "what is absent": """
        for name in ("deepspeed.moe", "deepspeed.moe.layer", "deepspeed.runtime.pipe.schedule"):
            try:
                __import__(name)
            except ModuleNotFoundError as error:
                assert "pyzero stands in for deepspeed" in str(error), error
            else:
                raise AssertionError(name)
    """,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_cannot_be_edited(name):
    assert run(INSTALL + textwrap.dedent(SCRIPTS[name]) + "print('done')\n") == "done\n"


def test_the_real_one_is_not_replaced_under_way():
    code = """
        import sys, types
        sys.modules["deepspeed"] = types.ModuleType("deepspeed")
        import pyzero
        try:
            pyzero.compat.install()
        except RuntimeError as error:
            print(error)
    """
    assert "before the first `import deepspeed`" in run(code)
