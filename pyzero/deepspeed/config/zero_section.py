"""`zero_optimization` of DeepSpeed's config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pyzero.deepspeed.config.keys import Auto, Done, Flag, Ignored, Refused, Section, Size

_DEFAULT_BUCKET = 500_000_000

_LAYOUT = Ignored("the optimizer lays out its buckets by itself; the numbers stay")
_QUIET_LAYOUT = Ignored(_LAYOUT.text, quiet=True)
_STAGE_3 = Ignored("fully_shard gathers block by block, the next one ahead: see stage", quiet=True)
_OFFLOAD = Ignored("see device", quiet=True)


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

    Stage 0 (DeepSpeed's default: nothing sharded) runs as stage 1, with the same numbers and less memory. Stage 3 is
    torch's fully_shard, applied to the repeated blocks of the model and to the rest.
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

    def optimizer_offload(self) -> OffloadOptimizerSection | None:
        """Return `offload_optimizer`, or what the older key says."""
        return OffloadOptimizerSection(device="cpu") if self.cpu_offload else self.offload_optimizer

    def param_offload(self) -> OffloadParamSection | None:
        """Return `offload_param`, or what the older keys say."""
        older = self.cpu_offload_params or self.cpu_offload_param
        return OffloadParamSection(device="cpu") if older else self.offload_param

    def offloads_optimizer(self) -> bool:
        """Return whether masters and moments should be kept in host memory."""
        section = self.optimizer_offload()
        return section is not None and section.device != "none"

    def offloads_params(self) -> bool:
        """Return whether weights should be kept in host memory."""
        section = self.param_offload()
        return section is not None and section.device != "none"

    def arguments(self, element_size: int) -> dict[str, Any]:
        """Return the optimizer's arguments.

        The optimizer's own bucket size holds unless the config sets a smaller one than DeepSpeed's default.
        """
        stage = min(max(self.stage, 1), 2)  # in stage 3 each shard is its rank's alone, so the optimizer sends nothing
        chosen: dict[str, Any] = {"stage": stage, "overlap": self.overlap_comm is not False}
        if self.reduce_bucket_size != "auto" and 0 < self.reduce_bucket_size < _DEFAULT_BUCKET:
            chosen["bucket_cap_mb"] = self.reduce_bucket_size * element_size / 2**20
        if self.offloads_optimizer():
            chosen["cpu_offload"] = True
        return chosen
