"""The small sections of DeepSpeed's config: checkpoints, monitors and the flops profiler."""

from __future__ import annotations

from typing import Annotated, Any

from pyzero.deepspeed.config.keys import Done, Flag, Ignored, OpenSection, Section, Size


class CheckpointSection(OpenSection):
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


class ActivationCheckpointingSection(OpenSection):
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


class FlopsProfilerSection(OpenSection):
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
