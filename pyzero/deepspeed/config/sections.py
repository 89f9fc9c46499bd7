"""Sections of DeepSpeed's config other than the optimizer and the schedule: their keys, and what they mean here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from pyzero.deepspeed.config.keys import Auto, Count, Done, Flag, Ignored, Positive, Refused, Section, Size
from pyzero.loss_scale.scaler import LossScale, static

_DEFAULT_BUCKET = 500_000_000

_LAYOUT = Ignored("the optimizer lays out its buckets by itself; the numbers stay")
_QUIET_LAYOUT = Ignored(_LAYOUT.text, quiet=True)
_STAGE_3 = Ignored("fully_shard gathers block by block, the next one ahead: see stage", quiet=True)
_OFFLOAD = Ignored("see device", quiet=True)
_MASTERS = "masters and moments are fp32 all the same: more exact, and 12 bytes per parameter over all ranks"

DTYPES = {
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "bfp16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
}
DType = Literal["fp16", "float16", "half", "bf16", "bfloat16", "bfp16", "fp32", "float32", "float"]


class Fp16Section(Section):
    """`fp16`: DeepSpeed's names and defaults; `policy` says in ours what they mean."""

    enabled: Annotated[Flag | Auto, Done("weights and inputs are converted to fp16, over fp32 masters")] = False
    auto_cast: Annotated[Flag, Done("inputs are cast to the weights' dtype either way")] = False
    loss_scale: Annotated[Size | float, Field(ge=0), Done("0: dynamic; otherwise the fixed scale")] = 0.0
    initial_scale_power: Annotated[Size, Field(le=126), Done("the first scale is 2 to this power")] = 16
    loss_scale_window: Annotated[Count, Done("clean steps until the scale doubles, one more at first")] = 1000
    hysteresis: Annotated[Size, Done("overflows until the scale is halved; 0 is refused: it never would be")] = 2
    consecutive_hysteresis: Annotated[Flag, Done("a clean step gives the hysteresis back")] = False
    min_loss_scale: Annotated[
        Positive, Done("the scale never falls below it; an overflow there skips the step and does not end the run")
    ] = 1.0
    fp16_master_weights_and_grads: Annotated[Flag, Ignored(_MASTERS, warns=True)] = False

    @field_validator("min_loss_scale", mode="before")
    @classmethod
    def _no_floor(cls, value: Any) -> Any:
        return 2.0**-24 if value == 0 else value

    @model_validator(mode="after")
    def _can_fall(self) -> Fp16Section:
        if self.enabled is True and self.loss_scale == 0 and self.hysteresis == 0:
            raise ValueError(
                "wanted a hysteresis from 1 with a dynamic loss scale, which DeepSpeed never lowers at 0; set 1 to "
                "halve it at every overflow"
            )
        return self

    def policy(self) -> LossScale:
        """DeepSpeed's rule as a LossScale.

        One thing differs. DeepSpeed ends the run at an overflow at `min_loss_scale`; here that step is skipped like any
        other, and the optimizer's `max_consecutive_skips` ends the run.
        """
        if self.loss_scale > 0:
            return static(self.loss_scale)
        return LossScale(
            init_scale=max(2.0**self.initial_scale_power, self.min_loss_scale),
            growth_interval=self.loss_scale_window,
            min_scale=self.min_loss_scale,
            hysteresis=self.hysteresis,
            consecutive_hysteresis=self.consecutive_hysteresis,
            growth_delay=1,
        )


_NO_SCALE = Ignored("bf16 needs no loss scale, and has none", quiet=True)


class Bf16Section(Section):
    """`bf16`, or `bfloat16`."""

    enabled: Annotated[Flag | Auto, Done("weights and inputs are converted to bf16, over fp32 masters")] = False
    immediate_grad_update: Annotated[Flag, Ignored("gradients are summed in fp32 as they come")] = False
    check_grad_overflow: Annotated[
        Flag | None, Ignored("inf and NaN skip the step in every dtype; max_consecutive_skips ends the run")
    ] = True
    bf16_master_weights_and_grads: Annotated[Flag, Ignored(_MASTERS, warns=True)] = False
    bf16_optimizer_states: Annotated[Flag, Ignored(_MASTERS, warns=True)] = False
    auto_cast: Annotated[Flag, Done("as fp16.auto_cast")] = False
    loss_scale: Annotated[Any, _NO_SCALE] = 0
    initial_scale_power: Annotated[Any, _NO_SCALE] = None
    loss_scale_window: Annotated[Any, _NO_SCALE] = None
    hysteresis: Annotated[Any, _NO_SCALE] = None
    min_loss_scale: Annotated[Any, _NO_SCALE] = None


class AutocastSection(Section):
    """`torch_autocast`."""

    enabled: Annotated[Flag | Auto, Done("the module runs in torch.autocast; the weights stay as they are")] = False
    dtype: Annotated[DType | Auto, Done("of the autocast; float16 gets a dynamic loss scale")] = "bfloat16"
    lower_precision_safe_modules: Annotated[
        list[str] | None, Ignored("which ops run in 16 bits is torch's choice", warns=True)
    ] = None

    def chosen(self) -> torch.dtype | None:
        """The dtype; None where it is not enabled."""
        if self.enabled is not True:
            return None
        return torch.bfloat16 if self.dtype == "auto" else DTYPES[self.dtype]


class OffloadOptimizerSection(Section):
    """`zero_optimization.offload_optimizer`."""

    device: Annotated[
        Literal["none", "cpu", "nvme"],
        Done("masters and moments lie in pinned memory of the host; nvme as cpu, nothing to do for weights on a CPU"),
    ] = "none"
    nvme_path: Annotated[Any, Ignored("masters and moments lie in memory, not on a disk", warns=True)] = None
    buffer_count: Annotated[Any, _OFFLOAD] = 4
    buffer_size: Annotated[Any, _OFFLOAD] = None
    pin_memory: Annotated[Flag | None, _OFFLOAD] = True
    pipeline: Annotated[Any, _OFFLOAD] = None
    pipeline_read: Annotated[Flag, _OFFLOAD] = False
    pipeline_write: Annotated[Flag, _OFFLOAD] = False
    fast_init: Annotated[Flag, _OFFLOAD] = False
    ratio: Annotated[float, _OFFLOAD] = 1.0
    super_offload: Annotated[Flag, _OFFLOAD] = False
    cpuadam_cores_perc: Annotated[float, _OFFLOAD] = 0.8


class OffloadParamSection(Section):
    """`zero_optimization.offload_param`."""

    device: Annotated[
        Literal["none", "cpu", "nvme"],
        Done("in stage 3 shards of weights lie in memory of the host; nvme as cpu; nothing to do on a CPU"),
    ] = "none"
    nvme_path: Annotated[Any, _OFFLOAD] = None
    buffer_count: Annotated[Any, _OFFLOAD] = 5
    buffer_size: Annotated[Any, _OFFLOAD] = 100_000_000
    max_in_cpu: Annotated[Any, _OFFLOAD] = 1_000_000_000
    pin_memory: Annotated[Flag | None, _OFFLOAD] = True


class ZeroSection(Section):
    """`zero_optimization`.

    Stage 0 (DeepSpeed's default, nothing sharded) runs as stage 1: same numbers, less memory. Stage 3 is torch's
    fully_shard, on the repeated blocks of the model and on the rest.
    """

    stage: Annotated[
        Literal[0, 1, 2, 3],
        Done(
            "0 runs as 1, with the same numbers; 3 is torch's fully_shard, on the modules that the model's largest "
            "lists repeat and on the rest; with fp16 and bf16 its shards are fp32, and gathered in 16 bits"
        ),
    ] = 0
    reduce_bucket_size: Annotated[
        Size | Auto, Done("elements of a bucket, where fewer than the default; else as bucket_cap_mb's default")
    ] = _DEFAULT_BUCKET
    overlap_comm: Annotated[Flag | Auto | None, Done("false: nothing is sent while backward runs")] = None
    contiguous_gradients: Annotated[Flag | Auto, _LAYOUT] = True
    reduce_scatter: Annotated[Flag | Auto, Ignored("gradients are always reduce-scattered")] = True
    allgather_partitions: Annotated[Flag | Auto, Ignored("weights are always all-gathered")] = True
    allgather_bucket_size: Annotated[Size | Auto, _QUIET_LAYOUT] = _DEFAULT_BUCKET
    use_multi_rank_bucket_allreduce: Annotated[Flag, _LAYOUT] = True
    compute_grad_norm: Annotated[Flag, Ignored("the norm costs nothing: it travels in the step's one message")] = True
    round_robin_gradients: Annotated[Flag, _LAYOUT] = False
    parameter_alignment: Annotated[Flag, Ignored("parameters are always aligned")] = False
    grad_hooks: Annotated[Flag, _LAYOUT] = True
    legacy_stage1: Annotated[Flag, _LAYOUT] = False
    ignore_unused_parameters: Annotated[
        Flag, Ignored("an unused parameter is left alone, as torch does; nothing ends the run")
    ] = True
    load_from_fp32_weights: Annotated[Flag, Ignored("fp32 masters are always loaded from the checkpoint")] = True
    elastic_checkpoint: Annotated[Flag, Ignored("checkpoints load on any number of ranks")] = False
    offload_optimizer: OffloadOptimizerSection | None = None
    offload_param: OffloadParamSection | None = None
    cpu_offload: Annotated[Flag | None, Done("as offload_optimizer.device: cpu")] = False
    cpu_offload_params: Annotated[Flag | None, Done("as offload_param.device: cpu")] = False
    cpu_offload_param: Annotated[Flag | None, Done("as offload_param.device: cpu")] = False
    cpu_offload_use_pin_memory: Annotated[Flag | None, _OFFLOAD] = False
    sub_group_size: Annotated[Size | Auto, _STAGE_3] = 1_000_000_000
    stage3_prefetch_bucket_size: Annotated[Size | Auto, _STAGE_3] = 50_000_000
    stage3_param_persistence_threshold: Annotated[Size | Auto, _STAGE_3] = 100_000
    stage3_model_persistence_threshold: Annotated[Size | Auto | None, _STAGE_3] = None
    stage3_max_live_parameters: Annotated[Size | Auto, _STAGE_3] = 1_000_000_000
    stage3_max_reuse_distance: Annotated[Size | Auto, _STAGE_3] = 1_000_000_000
    stage3_gather_16bit_weights_on_model_save: Annotated[Flag | Auto, Done("save_16bit_model always gathers")] = False
    stage3_gather_fp16_weights_on_model_save: Annotated[Flag | Auto, Done("the older name")] = False
    gather_16bit_weights_on_model_save: Annotated[Flag | Auto, Done("the newer name")] = False
    stage3_module_granularity_threshold: Annotated[Size | Auto, _STAGE_3] = 0
    stage3_use_all_reduce_for_fetch_params: Annotated[Flag, _STAGE_3] = False
    stage3_allgather_sequential: Annotated[Flag, _STAGE_3] = False
    prefetch_bucket_size: Annotated[Size | Auto, _STAGE_3] = 50_000_000
    param_persistence_threshold: Annotated[Size | Auto, _STAGE_3] = 100_000
    model_persistence_threshold: Annotated[Size | Auto | None, _STAGE_3] = None
    max_live_parameters: Annotated[Size | Auto, _STAGE_3] = 1_000_000_000
    max_reuse_distance: Annotated[Size | Auto, _STAGE_3] = 1_000_000_000
    module_granularity_threshold: Annotated[Size | Auto, _STAGE_3] = 0
    use_all_reduce_for_fetch_params: Annotated[Flag, _STAGE_3] = False
    allgather_sequential: Annotated[Flag, _STAGE_3] = False
    memory_efficient_linear: Annotated[Flag, _STAGE_3] = True
    override_module_apply: Annotated[Flag, _STAGE_3] = True
    pipeline_loading_checkpoint: Annotated[Flag, _STAGE_3] = False
    log_trace_cache_warnings: Annotated[Flag, _STAGE_3] = False
    enable_sanity_checks: Annotated[Flag, _STAGE_3] = False
    leaf_module: Annotated[Any, _STAGE_3] = None
    sdma_allgather: Annotated[Flag, _STAGE_3] = False
    sdma_allgather_max_numel: Annotated[Size | Auto | None, _STAGE_3] = None
    zero_hpz_partition_size: Annotated[Size, _STAGE_3] = 1
    zero_quantized_weights: Annotated[Flag, Ignored("weights travel as they are: more exact")] = False
    zero_quantized_nontrainable_weights: Annotated[Flag, Ignored("weights travel as they are: more exact")] = False
    zero_quantized_gradients: Annotated[Flag, Ignored("gradients travel in the weights' dtype: more exact")] = False
    mics_shard_size: Annotated[int, Ignored("state is sharded over all ranks")] = -1
    mics_hierarchical_params_gather: Annotated[Flag, Ignored("state is sharded over all ranks")] = False
    save_muon_momentum_buffer_in_memory: Annotated[Flag, Ignored("Muon's momentum lies in memory", quiet=True)] = False
    zenflow: Annotated[Any, Refused("it leaves out updates, which changes the result; remove it")] = None

    def offloads_params(self) -> bool:
        """Whether weights are to lie on the host."""
        section = self.offload_param is not None and self.offload_param.device != "none"
        return bool(section or self.cpu_offload_params or self.cpu_offload_param)

    def arguments(self, element_size: int) -> dict[str, Any]:
        """For FusedZeroAdam. Its own bucket size unless the config asks for a smaller one."""
        stage = min(max(self.stage, 1), 2)  # shards of stage 3 are one rank's own: the optimizer sends nothing
        chosen: dict[str, Any] = {"stage": stage, "overlap": self.overlap_comm is not False}
        if self.reduce_bucket_size != "auto" and 0 < self.reduce_bucket_size < _DEFAULT_BUCKET:
            chosen["bucket_cap_mb"] = self.reduce_bucket_size * element_size / 2**20
        offloads = self.offload_optimizer is not None and self.offload_optimizer.device != "none"
        if offloads or self.cpu_offload:
            chosen["cpu_offload"] = True
        return chosen


class DataTypesSection(Section):
    """`data_types`."""

    grad_accum_dtype: Annotated[
        DType | Auto | None,
        Done("several ranks sum in fp32 whatever it says; refused where one rank accumulates in 16 bits against it"),
    ] = None
    param_dtype: Annotated[DType | Auto | None, Ignored("fp16 and bf16 set the dtype of the weights")] = None
    buffer_dtype: Annotated[DType | Auto | None, Ignored("buffers are converted with the weights")] = None
    keep_in_fp32_modules: Annotated[
        Any, Refused("the whole model is converted; convert it yourself, and leave fp16 and bf16 disabled")
    ] = None


class CheckpointSection(Section):
    """`checkpoint`."""

    tag_validation: Annotated[Any, Ignored("save_checkpoint writes rank 0's tag")] = "Warn"
    load_universal: Annotated[Flag, Ignored("every checkpoint loads on any number of ranks")] = False
    use_node_local_storage: Annotated[
        Flag,
        Done("nothing on one host; refused on several, for a checkpoint is one folder that all ranks see"),
    ] = False
    parallel_write: Annotated[Any, Ignored("every rank writes its own part")] = None
    writer: Annotated[Any, Ignored("torch.distributed.checkpoint writes")] = None
    type: Annotated[Any, Ignored("torch.distributed.checkpoint writes")] = None


_CHECKPOINTS = Ignored("the model calls torch.utils.checkpoint, or pyzero.deepspeed.checkpointing.checkpoint")
_QUIET_CHECKPOINTS = Ignored(_CHECKPOINTS.text, quiet=True)


class ActivationCheckpointingSection(Section):
    """`activation_checkpointing`."""

    partition_activations: Annotated[Flag, _CHECKPOINTS] = False
    cpu_checkpointing: Annotated[Flag, _CHECKPOINTS] = False
    contiguous_memory_optimization: Annotated[Flag, _CHECKPOINTS] = False
    number_checkpoints: Annotated[Size | None, _QUIET_CHECKPOINTS] = None
    synchronize_checkpoint_boundary: Annotated[Flag, _QUIET_CHECKPOINTS] = False
    profile: Annotated[Flag, _QUIET_CHECKPOINTS] = False
    use_reentrant: Annotated[Flag, _QUIET_CHECKPOINTS] = True


_MONITOR = "the learning rate, the loss and the loss scale of each step, and write_events of engine.monitor"


class TensorBoardSection(Section):
    """`tensorboard`."""

    enabled: Annotated[Flag, Done(f"{_MONITOR}; needs the package tensorboard")] = False
    output_path: Annotated[str | None, Done("where to write; default: runs")] = ""
    job_name: Annotated[str, Done("the folder in it")] = "DeepSpeedJobName"


class CsvSection(Section):
    """`csv_monitor`."""

    enabled: Annotated[Flag, Done(f"{_MONITOR}; a file for each")] = False
    output_path: Annotated[str | None, Done("where to write; default: csv_monitor")] = ""
    job_name: Annotated[str, Done("the folder in it")] = "DeepSpeedJobName"


class WandbSection(Section):
    """`wandb`."""

    enabled: Annotated[Flag, Done(f"{_MONITOR}; needs the package wandb")] = False
    group: Annotated[str | None, Done("wandb's")] = None
    team: Annotated[str | None, Done("wandb's entity")] = None
    project: Annotated[str | None, Done("wandb's")] = "deepspeed"


class FlopsProfilerSection(Section):
    """`flops_profiler`."""

    enabled: Annotated[Flag, Done("one forward is counted, by torch's FlopCounterMode, and rank 0 logs the table")] = (
        False
    )
    profile_step: Annotated[int, Done("the first forward after so many steps; -1: none")] = 1
    start_profile_step: Annotated[Any, Ignored("an older key of DeepSpeed's; see profile_step", quiet=True)] = None
    end_profile_step: Annotated[Any, Ignored("an older key of DeepSpeed's; see profile_step", quiet=True)] = None
    module_depth: Annotated[int, Done("of modules in the table; -1: all")] = -1
    top_modules: Annotated[Size, Ignored("all modules of a depth are shown", quiet=True)] = 1
    detailed: Annotated[Flag, Done("false: totals alone")] = True
    output_file: Annotated[str | None, Done("where the table goes; default: the log")] = None
    recompute_fwd_factor: Annotated[float, Ignored("the forward alone is counted", quiet=True)] = 0.0


_SEE_SIZE = Ignored("see autotp_size", quiet=True)


class LayerSpecSection(Section):
    """`tensor_parallel.partition_config.layer_specs[]`."""

    patterns: Annotated[list[str], Done("regular expressions of parameters' names, matched from their beginning")]
    partition_type: Annotated[
        Literal["row", "column", "skip"], Done("which dimension of the weight is split, as Megatron calls it")
    ] = "column"
    gather_output: Annotated[Flag, Done("a column-split layer's output is whole on every rank")] = False
    model_types: Annotated[list[str] | None, Done("of model.config.model_type; null: all")] = None
    grad_allreduce: Annotated[Flag, Refused("use initialize(tp_plan=), style replicated_with_grad_allreduce")] = False
    shape: Annotated[Any, Refused("a fused weight is not split; split its layer in several, or skip it")] = None
    partition_dim: Annotated[Any, Ignored("see partition_type", quiet=True)] = None


class PartitionSection(Section):
    """`tensor_parallel.partition_config`."""

    layer_specs: Annotated[list[LayerSpecSection], Done("which layers are split; the first that matches counts")] = []
    use_default_specs: Annotated[
        Flag, Done("true, and preset_model set: the model's own plan, for layers that no spec matches")
    ] = True
    strict_mode: Annotated[Flag, Ignored("a plan without any layer of the model is an error", quiet=True)] = False
    tp_size: Annotated[Any, _SEE_SIZE] = None
    embedding_partition_dim: Annotated[Any, Ignored("embeddings are split where a spec or the plan says so")] = None
    lm_head_patterns: Annotated[Any, Ignored("see layer_specs", quiet=True)] = None


class TpSection(Section):
    """`tensor_parallel.tp`."""

    tp_size: Annotated[Count, Done("as autotp_size")] = 1
    tp_grain_size: Annotated[Any, _SEE_SIZE] = 1
    mpu: Annotated[Any, Refused("pass it as initialize(mpu=)")] = None
    tp_group: Annotated[Any, Refused("pass initialize(mpu=) or a DeviceMesh as initialize(mesh=)")] = None


class TensorParallelSection(Section):
    """`tensor_parallel`."""

    autotp_size: Annotated[
        Size,
        Done(
            "ranks that share each layer, side by side; 0: none. torch's parallelize_module splits the model, by the "
            "plan that transformers has of it, partition_config or initialize(tp_plan=); ZeRO over the others"
        ),
    ] = 0
    tp: TpSection = TpSection()
    tp_size: Annotated[Size, Done("as autotp_size")] = 1
    tp_grain_size: Annotated[Any, _SEE_SIZE] = 1
    tp_overlap_comm: Annotated[Flag, Ignored("torch decides what overlaps", quiet=True)] = False
    preset_model: Annotated[Any, Ignored("the model's own plan is used", quiet=True)] = None
    partition_config: PartitionSection | None = None
    injection_policy_tuple: Annotated[Any, Refused("set partition_config, or pass initialize(tp_plan=)")] = None
    vocab_parallel_lm_head: Annotated[
        Flag | None, Ignored("logits are gathered, and the loss is taken of whole ones", warns=True)
    ] = None
    vocab_parallel_ce_backend: Annotated[Any, Ignored("see vocab_parallel_lm_head", quiet=True)] = "torch"
    dtype: Annotated[Any, Ignored("fp16 and bf16 set the dtype of the weights", quiet=True)] = None
    keep_module_on_host: Annotated[Flag, Ignored("the model is split where it is, layer by layer", quiet=True)] = False
    replace_with_kernel_inject: Annotated[Flag, Ignored("the model's own layers run", quiet=True)] = False

    def size(self) -> int:
        """Ranks that share a layer."""
        return max(self.autotp_size, self.tp.tp_size, self.tp_size, 1)

    @model_validator(mode="after")
    def _one_size(self) -> TensorParallelSection:
        sizes = {self.autotp_size, self.tp.tp_size, self.tp_size} - {0, 1}
        if len(sizes) > 1:
            raise ValueError("got several sizes, wanted one; remove tp.tp_size and tp_size")
        return self
