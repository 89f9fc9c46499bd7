"""The sections `fp16`, `bf16`, `torch_autocast` and `data_types` of DeepSpeed's config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from pyzero.deepspeed.config.keys import Auto, Count, Done, Flag, Ignored, OpenSection, Positive, Refused, Section, Size
from pyzero.loss_scale.scaler import LossScale, static

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
    """`fp16`, with DeepSpeed's names and defaults. `policy` converts it to pyzero's LossScale."""

    enabled: Annotated[Flag | Auto, Done("weights and inputs are converted to fp16, over fp32 masters")] = False
    auto_cast: Annotated[
        Flag | None,
        Done("false leaves inputs alone; without it they are cast to the weights' dtype, with a warning that says so"),
    ] = None
    loss_scale: Annotated[Size | float, Field(ge=0), Done("0: dynamic; else the fixed scale, after a load too")] = 0.0
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
        """Return DeepSpeed's loss scale rule as a LossScale.

        One thing differs. At an overflow at `min_loss_scale`, DeepSpeed ends the run. pyzero skips that step like any
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
    """`bf16`, also named `bfloat16`."""

    enabled: Annotated[Flag | Auto, Done("weights and inputs are converted to bf16, over fp32 masters")] = False
    immediate_grad_update: Annotated[Flag, Ignored("gradients are summed in fp32 as they come")] = False
    check_grad_overflow: Annotated[
        Flag | None, Ignored("inf and NaN skip the step in every dtype; max_consecutive_skips ends the run")
    ] = True
    bf16_master_weights_and_grads: Annotated[Flag, Ignored(_MASTERS, warns=True)] = False
    bf16_optimizer_states: Annotated[Flag, Ignored(_MASTERS, warns=True)] = False
    auto_cast: Annotated[Flag | None, Done("as fp16.auto_cast")] = None
    loss_scale: Annotated[Any, _NO_SCALE] = 0
    initial_scale_power: Annotated[Any, _NO_SCALE] = None
    loss_scale_window: Annotated[Any, _NO_SCALE] = None
    hysteresis: Annotated[Any, _NO_SCALE] = None
    min_loss_scale: Annotated[Any, _NO_SCALE] = None


class AutocastSection(OpenSection):
    """`torch_autocast`."""

    enabled: Annotated[Flag | Auto, Done("the module runs in torch.autocast; the weights stay as they are")] = False
    dtype: Annotated[DType | Auto, Done("of the autocast; float16 gets a dynamic loss scale")] = "bfloat16"
    lower_precision_safe_modules: Annotated[
        list[str] | None, Ignored("which ops run in 16 bits is torch's choice", warns=True)
    ] = None

    def enabled_dtype(self) -> torch.dtype | None:
        """Return the autocast dtype; None if autocast is not enabled."""
        if self.enabled is not True:
            return None
        return torch.bfloat16 if self.dtype == "auto" else DTYPES[self.dtype]


class DataTypesSection(OpenSection):
    """`data_types`."""

    grad_accum_dtype: Annotated[
        DType | Auto | None,
        Done("several ranks sum in fp32 whatever it says; refused where one rank accumulates in 16 bits against it"),
    ] = None
    param_dtype: Annotated[DType | Auto | None, Ignored("fp16 and bf16 set the dtype of the weights")] = None
    buffer_dtype: Annotated[
        DType | Auto | None,
        Done("to which fp16 and bf16 convert buffers; default: they stay as they are, but for BatchNorm's"),
    ] = None
    keep_in_fp32_modules: Annotated[
        Any,
        Refused("buffers stay as they are where buffer_dtype is not set; remove the key, and convert others yourself"),
    ] = "auto"

    def buffers_dtype(self) -> torch.dtype | None:
        """Return the dtype to which buffers are converted; None: they stay as they are."""
        return None if self.buffer_dtype in (None, "auto") else DTYPES[self.buffer_dtype]
