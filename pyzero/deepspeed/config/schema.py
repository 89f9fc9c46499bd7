"""DeepSpeed's JSON config as typed classes. Each key has its state. Unknown keys are ignored where DeepSpeed does."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import BaseModel, field_validator, model_validator

from pyzero.deepspeed.config.dtype_sections import (
    DTYPES,
    AutocastSection,
    Bf16Section,
    DataTypesSection,
    DType,
    Fp16Section,
)
from pyzero.deepspeed.config.keys import Auto, Count, Done, Flag, Ignored, NotNegative, OpenSection, Refused, Size
from pyzero.deepspeed.config.optimizer_section import OptimizerSection
from pyzero.deepspeed.config.scheduler_section import SchedulerSection
from pyzero.deepspeed.config.sections import (
    ActivationCheckpointingSection,
    CheckpointSection,
    CsvSection,
    FlopsProfilerSection,
    TensorBoardSection,
    WandbSection,
)
from pyzero.deepspeed.config.tensor_parallel_section import TensorParallelSection
from pyzero.deepspeed.config.zero_section import ZeroSection

_ACCELERATE = Ignored("a key of accelerate's own file, and none of DeepSpeed's")
_AVERAGE = Ignored("gradients are summed in fp32 and then divided, which cannot overflow")


class Config(OpenSection):
    """A DeepSpeed config. `pyzero.deepspeed.config.reader.load` makes one from a dict, a path or JSON text."""

    train_batch_size: Annotated[
        Count | Auto | None,
        Done("samples per step, over all ranks; of tensor_parallel.autotp_size see docs/parallel.md"),
    ] = None
    train_micro_batch_size_per_gpu: Annotated[Count | Auto | None, Done("samples per backward on a rank")] = None
    gradient_accumulation_steps: Annotated[Count | Auto | None, Done("backwards per step")] = None
    managed_gradient_accumulation: Annotated[Flag, Done("false: every engine.step() is an optimizer step")] = True
    optimizer: OptimizerSection | None = None
    scheduler: SchedulerSection | None = None
    fp16: Fp16Section = Fp16Section()
    bf16: Bf16Section = Bf16Section()
    bfloat16: Annotated[Bf16Section | None, Done("the older name of bf16")] = None
    torch_autocast: AutocastSection = AutocastSection()
    amp: Annotated[Any, Refused("apex amp is not supported; enable bf16, fp16 or torch_autocast")] = None
    gradient_clipping: Annotated[
        NotNegative | Auto,
        Done("the largest global norm; 0, the default here: no clipping. The default of DeepSpeed 0.19 is 1"),
    ] = 0.0
    zero_optimization: ZeroSection = ZeroSection()
    zero_allow_untested_optimizer: Annotated[Flag, Ignored("there are only tested ones", quiet=True)] = False
    zero_force_ds_cpu_optimizer: Annotated[Flag, Ignored("the optimizer runs where the weights are", quiet=True)] = True
    communication_data_type: Annotated[
        DType | Auto | None, Done("the dtype in which gradients are sent; default: the weights'")
    ] = None
    fp32_allreduce: Annotated[Flag, Done("the older communication_data_type: fp32")] = False
    seq_parallel_communication_data_type: Annotated[Any, Ignored("there is no sequence parallelism", quiet=True)] = None
    prescale_gradients: Annotated[Flag, _AVERAGE] = False
    gradient_predivide_factor: Annotated[NotNegative, _AVERAGE] = 1.0
    gradient_allreduce_op: Annotated[
        str, Refused("gradients are averaged; multiply the loss by the number of ranks for a sum")
    ] = "mean"
    sparse_gradients: Annotated[
        Flag, Ignored("use nn.Embedding(sparse=False); a sparse gradient is an error that names its parameter")
    ] = False
    disable_allgather: Annotated[Flag, Ignored("weights are always all-gathered")] = False
    data_types: DataTypesSection = DataTypesSection()
    steps_per_print: Annotated[Size | None, Done("one log line every so many steps; null or 0: none")] = None
    wall_clock_breakdown: Annotated[Flag, Done("a log line of the phases every steps_per_print (or 10) steps")] = False
    memory_breakdown: Annotated[Flag, Ignored("see torch.cuda.memory_summary()")] = False
    dump_state: Annotated[Flag, Ignored("see engine.config")] = False
    log_level: Annotated[Any, Ignored('set logging.getLogger("pyzero")')] = None
    tensorboard: TensorBoardSection = TensorBoardSection()
    csv_monitor: CsvSection = CsvSection()
    wandb: WandbSection = WandbSection()
    comet: Annotated[Any, Refused("enable tensorboard, csv_monitor or wandb")] = None
    monitor_config: Annotated[Any, Ignored("set tensorboard, csv_monitor and wandb at the top level")] = None
    activation_checkpointing: ActivationCheckpointingSection = ActivationCheckpointingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    load_universal_checkpoint: Annotated[Flag, Ignored("every checkpoint loads on any number of ranks")] = False
    nebula: Annotated[Any, Ignored("checkpoints go to their folder")] = None
    datastates_ckpt: Annotated[Any, Ignored("checkpoints go to their folder")] = None
    veloc_config: Annotated[Any, Ignored("checkpoints go to their folder")] = None
    dataloader_drop_last: Annotated[Flag, Done("of the data loader that initialize() returns")] = False
    flops_profiler: FlopsProfilerSection = FlopsProfilerSection()
    comms_logger: Annotated[Any, Ignored("use torch.profiler, which shows each collective")] = None
    comms_config: Annotated[Any, Ignored("see comms_logger", quiet=True)] = None
    timers: Annotated[Any, Ignored("see wall_clock_breakdown", quiet=True)] = None
    autotuning: Annotated[Any, Ignored("nothing is tuned; the config is taken as it is")] = None
    hybrid_engine: Annotated[Any, Ignored("generate() is the module's own")] = None
    compile: Annotated[Any, Ignored("call torch.compile on the model")] = None
    aio: Annotated[Any, Ignored("nothing lies on NVMe", quiet=True)] = None
    disable_python_gc: Annotated[Flag, Ignored("call gc.disable()")] = False
    use_data_before_expert_parallelism: Annotated[Flag, Ignored("there are no experts", quiet=True)] = False
    vocabulary_size: Annotated[Any, Ignored("DeepSpeed only logs a remark on its alignment", quiet=True)] = None
    cuda_visible_devices: Annotated[Any, Ignored("set the environment variable CUDA_VISIBLE_DEVICES")] = None
    sparse_attention: Annotated[Any, Ignored("the model reads it by itself")] = None
    pipeline: Annotated[Any, Ignored("pass it to PipelineModule")] = None
    tensor_parallel: TensorParallelSection = TensorParallelSection()
    sequence_parallel_size: Annotated[int, Refused("remove it; the ranks are all data-parallel")] = 1
    expert_parallel: Annotated[Any, Refused("remove it; the ranks are all data-parallel")] = None
    elasticity: Annotated[Any, Refused("set the batch sizes; torchrun restarts with another number of ranks")] = None
    curriculum_learning: Annotated[Any, Refused("cut the batches in the training loop")] = None
    data_efficiency: Annotated[
        Any, Refused("sample and cut the batches in the training loop", parts=("data_sampling", "data_routing"))
    ] = None
    progressive_layer_drop: Annotated[Any, Refused("drop layers in the model's forward")] = None
    compression_training: Annotated[Any, Refused("quantise or prune the model with torch.ao or torchao")] = None
    quantize_training: Annotated[Any, Refused("quantise the model with torch.ao or torchao")] = None
    weight_quantization: Annotated[Any, Refused("quantise the model with torch.ao or torchao")] = None
    zero3_init_flag: Annotated[Any, _ACCELERATE] = False
    zero3_save_16bit_model: Annotated[Any, _ACCELERATE] = False
    num_processes: Annotated[Any, _ACCELERATE] = None
    gradient_checkpointing: Annotated[
        Any, Ignored("not a key of DeepSpeed's; call the model's gradient_checkpointing_enable()", warns=True)
    ] = False
    dtype: Annotated[Any, Ignored("not a key of DeepSpeed's training; set fp16 or bf16", warns=True)] = None
    logging: Annotated[Any, Ignored('not a key of DeepSpeed\'s; set logging.getLogger("pyzero")')] = None
    eigenvalue: Annotated[Any, Refused("it steers quantize_training, which is not supported; remove it")] = None

    @field_validator("steps_per_print", mode="before")
    @classmethod
    def _never(cls, value: Any) -> Any:
        """Convert Infinity, which transformers writes, to None."""
        return None if value == math.inf else value

    @field_validator("zero_optimization", mode="before")
    @classmethod
    def _once_a_flag(cls, value: Any) -> Any:
        return {"stage": 1 if value else 0} if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_dtype(self) -> Config:
        enabled = [name for name in ("fp16", "bf16", "torch_autocast") if getattr(self, name).enabled is True]
        if self.bfloat16 is not None and self.bfloat16.enabled is True:
            enabled.append("bfloat16")
        if len(enabled) > 1 and enabled != ["bf16", "bfloat16"]:
            raise ValueError(f"{' and '.join(enabled)} are both enabled, wanted one of them; disable the other")
        return self

    @model_validator(mode="after")
    def _one_norm(self) -> Config:
        inner = None if self.optimizer is None else self.optimizer.params.max_grad_norm
        outer = self.gradient_clipping
        if inner and outer not in ("auto", 0.0, inner):
            raise ValueError(
                f"optimizer.params.max_grad_norm is {inner} and gradient_clipping is {outer}, wanted one of them; "
                f"remove max_grad_norm"
            )
        return self

    def get(self, name: str, default: Any = None) -> Any:
        """Return a top-level key as plain data: the value in the config, otherwise pyzero's default.

        DeepSpeed's engine.config is a dict.
        """
        if name in self:
            return self[name]
        value = self.model_dump().get(name)
        return default if value is None else value

    def __getitem__(self, name: str) -> Any:
        """Return a top-level key of the config as plain data, without defaults."""
        return self._given()[name]

    def keys(self) -> Iterable[str]:
        """Return the top-level keys that the config sets."""
        return self._given().keys()

    def items(self) -> Iterable[tuple[str, Any]]:
        """Return the top-level keys that the config sets, and their values as plain data."""
        return self._given().items()

    def _given(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)

    def __contains__(self, name: object) -> bool:
        """Return whether the config sets this top-level key."""
        return name in self.model_fields_set

    @property
    def is_fp16(self) -> bool:
        """Whether the model is converted to fp16."""
        return self.fp16.enabled is True

    @property
    def is_bf16(self) -> bool:
        """Whether the model is converted to bf16."""
        return self.bf16.enabled is True or (self.bfloat16 is not None and self.bfloat16.enabled is True)

    def weights_dtype(self) -> torch.dtype | None:
        """Return the dtype to which the model is converted; None: it stays as it is."""
        if self.is_fp16:
            return torch.float16
        return torch.bfloat16 if self.is_bf16 else None

    def auto_cast(self) -> bool | None:
        """Return whether inputs are cast to the weights' dtype; None if the config does not say."""
        if self.is_fp16:
            return self.fp16.auto_cast
        bf16 = self.bf16 if self.bf16.enabled is True else self.bfloat16
        return None if bf16 is None else bf16.auto_cast

    def max_grad_norm(self) -> float | None:
        """Return the norm to clip to; None without clipping."""
        if self.gradient_clipping != "auto" and self.gradient_clipping > 0:
            return self.gradient_clipping
        return None if self.optimizer is None else self.optimizer.params.max_grad_norm or None

    def grad_reduce_dtype(self) -> torch.dtype | None:
        """Return the dtype in which gradients are sent; None: the weights' dtype."""
        if self.communication_data_type not in (None, "auto"):
            return DTYPES[self.communication_data_type]
        return torch.float32 if self.fp32_allreduce else None

    def optimizer_name(self) -> str | None:
        """Return the optimizer's type in lower case; None without the section."""
        return None if self.optimizer is None else self.optimizer.type.lower()

    def optimizer_params(self) -> dict[str, Any] | None:
        """Return the optimizer's parameters that the config sets; None without the section."""
        return None if self.optimizer is None else self.optimizer.params.model_dump(exclude_unset=True)

    def scheduler_name(self) -> str | None:
        """Return the scheduler's type; None without the section."""
        return None if self.scheduler is None else self.scheduler.type

    def scheduler_params(self) -> dict[str, Any] | None:
        """Return the scheduler's parameters that the config sets; None without the section."""
        return None if self.scheduler is None else self.scheduler.params.model_dump(exclude_unset=True)

    def batches(self, num_ranks: int) -> Batches:
        """Return the three batch sizes for this number of ranks."""
        return Batches.solve(
            _number(self.train_batch_size),
            _number(self.train_micro_batch_size_per_gpu),
            _number(self.gradient_accumulation_steps),
            num_ranks,
        )


class Batches(BaseModel):
    """The three batch sizes, of which train = micro * accumulation * ranks."""

    train: int
    micro: int
    accumulation: int

    @classmethod
    def solve(cls, train: int | None, micro: int | None, accumulation: int | None, num_ranks: int) -> Batches:
        """Compute the missing sizes, as DeepSpeed does. A lone train batch is one micro-batch per rank.

        Raises:
            ValueError: There is neither train nor micro, or the three do not agree.
        """
        given = (
            f"train_batch_size={train}, train_micro_batch_size_per_gpu={micro}, "
            f"gradient_accumulation_steps={accumulation} and {num_ranks} rank(s)"
        )
        if train is None and micro is None:
            raise ValueError(
                f"got {given}, wanted train_batch_size or train_micro_batch_size_per_gpu; set one, best two"
            )
        if train is None:
            accumulation = accumulation or 1
            train = micro * accumulation * num_ranks  # type: ignore[operator]
        elif micro is None:
            accumulation = accumulation or 1
            micro = train // (accumulation * num_ranks)
        elif accumulation is None:
            accumulation = train // (micro * num_ranks)
        assert micro is not None and accumulation is not None
        if micro * accumulation * num_ranks != train or micro < 1:
            raise ValueError(
                f"got {given}, wanted train_batch_size = train_micro_batch_size_per_gpu * "
                f"gradient_accumulation_steps * ranks; change one of them or the number of ranks"
            )
        return cls(train=train, micro=micro, accumulation=accumulation)


def _number(value: int | str | None) -> int | None:
    return value if isinstance(value, int) else None
