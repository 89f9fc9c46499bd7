"""DeepSpeed's JSON config, the keys of a first version: typed, closed, and clear about what it cannot do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pyzero.scaler import LossScale, static

Auto = Literal["auto"]
Count = Annotated[int, Field(strict=True, ge=1)]
Flag = Annotated[bool, Field(strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# DeepSpeed's users write 5e8 for a count.
Size = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_quoted_numbers(cls, value: Any) -> Any:
        """A quoted "8" is not 8; pydantic would turn one into the other."""
        if isinstance(value, str) and value not in ("auto", ""):
            try:
                number = float(value)
            except ValueError:
                return value
            raise ValueError(f"wanted the number {number:g}; remove the quotes")
        return value


class OptimizerParams(_Section):
    """Parameters of Adam and AdamW, in torch's names; "auto" is torch's default."""

    lr: Annotated[float, Field(ge=0)] | Auto = "auto"
    betas: tuple[float, float] | Auto = "auto"
    eps: Annotated[float, Field(ge=0)] | Auto = "auto"
    weight_decay: Annotated[float, Field(ge=0)] | Auto = "auto"
    torch_adam: Flag | None = None  # says which implementation; ours is taken
    adam_w_mode: Flag | None = None  # AdamW's decay. DeepSpeed's default for "Adam" is True
    bias_correction: Literal[True] = True
    amsgrad: Literal[False] = False
    fused: Flag | None = None  # always


class OptimizerSection(_Section):
    """`optimizer`. As in DeepSpeed, type Adam decays as AdamW does unless params.adam_w_mode is false."""

    type: Literal["Adam", "AdamW"]
    params: OptimizerParams = OptimizerParams()

    @field_validator("type", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return {"adam": "Adam", "adamw": "AdamW"}.get(value.lower(), value) if isinstance(value, str) else value

    def decoupled(self) -> bool:
        """AdamW's rule or Adam's."""
        return self.type == "AdamW" or self.params.adam_w_mode is not False

    def arguments(self) -> dict[str, Any]:
        """For FusedZeroAdam."""
        values = {name: getattr(self.params, name) for name in ("lr", "betas", "eps", "weight_decay")}
        return {name: value for name, value in values.items() if value != "auto"}


class SchedulerParams(_Section):
    """Parameters of WarmupLR and WarmupDecayLR. "auto" is the optimizer's rate, 0, and 1000 steps."""

    warmup_min_lr: Annotated[float, Field(ge=0)] | Auto = 0.0
    warmup_max_lr: Annotated[float, Field(ge=0)] | Auto | None = None
    warmup_num_steps: Count | Auto = "auto"
    warmup_type: Literal["log", "linear"] = "log"
    total_num_steps: Count | None = None


class SchedulerSection(_Section):
    """`scheduler`."""

    type: Literal["WarmupLR", "WarmupDecayLR"]
    params: SchedulerParams = SchedulerParams()

    @model_validator(mode="after")
    def _decay_has_an_end(self) -> SchedulerSection:
        if self.type == "WarmupDecayLR" and self.params.total_num_steps is None:
            raise ValueError("WarmupDecayLR wants params.total_num_steps; set it to the number of optimizer steps")
        return self


class Fp16Section(_Section):
    """`fp16`: DeepSpeed's names and defaults; `policy` says in ours what they mean."""

    enabled: Flag | Auto = False
    auto_cast: Flag = False  # inputs are cast to the model's dtype either way, as DeepSpeed's users expect
    loss_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    initial_scale_power: Annotated[int, Field(ge=0, le=126)] = 16
    loss_scale_window: Count = 1000
    hysteresis: Count = 2
    consecutive_hysteresis: Flag = False
    min_loss_scale: Positive = 1.0

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


class Bf16Section(_Section):
    """`bf16`."""

    enabled: Flag | Auto = False


class ZeroSection(_Section):
    """`zero_optimization`.

    Stage 0 (DeepSpeed's default, nothing sharded) runs as stage 1: same numbers, less memory. Keys that only tell
    DeepSpeed how to lay out its buffers (contiguous_gradients, reduce_scatter, allgather_*, ...) are accepted and
    change nothing.
    """

    stage: Literal[0, 1, 2] = 0
    reduce_bucket_size: Size | Auto = 500_000_000  # elements
    overlap_comm: Flag | None = None
    allgather_bucket_size: Size | Auto | None = None
    allgather_partitions: Flag | None = None
    contiguous_gradients: Flag | None = None
    reduce_scatter: Flag | None = None
    round_robin_gradients: Flag | None = None
    ignore_unused_parameters: Literal[True] = True

    @field_validator("stage", mode="before")
    @classmethod
    def _not_three(cls, value: Any) -> Any:
        if value == 3:
            raise ValueError("stage 3 is not there yet; use 2, or torch's fully_shard with FusedZeroAdam")
        return value

    def arguments(self, element_size: int) -> dict[str, Any]:
        """For FusedZeroAdam. Its own bucket size unless the config asks for a smaller one."""
        chosen: dict[str, Any] = {"stage": max(self.stage, 1), "overlap": self.overlap_comm is not False}
        if self.reduce_bucket_size != "auto" and self.reduce_bucket_size < 500_000_000:
            chosen["bucket_cap_mb"] = self.reduce_bucket_size * element_size / 2**20
        return chosen


class Config(_Section):
    """A DeepSpeed config. `pyzero.config_reader.load` makes one of a dict, a path or JSON text."""

    train_batch_size: Count | Auto | None = None
    train_micro_batch_size_per_gpu: Count | Auto | None = None
    gradient_accumulation_steps: Count | Auto | None = None
    optimizer: OptimizerSection | None = None
    scheduler: SchedulerSection | None = None
    fp16: Fp16Section = Fp16Section()
    bf16: Bf16Section = Bf16Section()
    zero_optimization: ZeroSection = ZeroSection()
    gradient_clipping: Annotated[float, Field(ge=0)] | Auto = 0.0  # 0: none, and none is the default
    steps_per_print: Count | None = None
    wall_clock_breakdown: Literal[False] = False
    zero_allow_untested_optimizer: Flag = False  # Adam and AdamW are what there is
    zero_force_ds_cpu_optimizer: Flag = False

    @model_validator(mode="after")
    def _one_dtype(self) -> Config:
        if self.fp16.enabled is True and self.bf16.enabled is True:
            raise ValueError("fp16 and bf16 are both enabled, wanted one of them; disable the other")
        return self

    def batches(self, num_ranks: int) -> Batches:
        """The three batch sizes for that many ranks."""
        return Batches.solve(
            _number(self.train_batch_size),
            _number(self.train_micro_batch_size_per_gpu),
            _number(self.gradient_accumulation_steps),
            num_ranks,
        )


class Batches(BaseModel):
    """train_batch_size = micro * accumulation * ranks."""

    train: int
    micro: int
    accumulation: int

    @classmethod
    def solve(cls, train: int | None, micro: int | None, accumulation: int | None, num_ranks: int) -> Batches:
        """What is missing from what is given, as DeepSpeed does it: a lone train batch is one micro-batch per rank.

        Raises:
            ValueError: Nothing to go by, or the three do not agree.
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
