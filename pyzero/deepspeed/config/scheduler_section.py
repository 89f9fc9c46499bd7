"""The section `scheduler` of DeepSpeed's config: its schedules and their parameters."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, SerializeAsAny, ValidationInfo, field_validator, model_validator
from torch.optim import Optimizer, lr_scheduler

from pyzero.deepspeed.config.keys import Auto, Count, Done, Flag, NotNegative, OpenSection, Section, Size
from pyzero.deepspeed.schedules import SCHEDULES

Numbers = NotNegative | list[NotNegative]  # one for all groups, or one per group

_WARMUP = Done("of WarmupLR, WarmupDecayLR and WarmupCosineLR")
_LINEAR = Done("of WarmupLR and WarmupDecayLR")
_COSINE = Done("of WarmupCosineLR")
_RANGE = Done("of LRRangeTest")
_CYCLE = Done("of OneCycle")
_NEED_OBJECTS = ("LRScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler")  # need objects


class SchedulerParams(Section):
    """Parameters of all schedules. None and "auto" select the schedule's default, which is DeepSpeed's."""

    warmup_min_lr: Annotated[Numbers | Auto | None, _LINEAR] = None
    warmup_max_lr: Annotated[Numbers | Auto | None, Done('of the same; "auto" and null: the optimizer\'s')] = "auto"
    warmup_num_steps: Annotated[Count | Auto | None, _WARMUP] = None
    warmup_type: Annotated[Literal["log", "linear"] | Auto | None, _WARMUP] = None
    total_num_steps: Annotated[Count | Auto | None, Done("of WarmupDecayLR and WarmupCosineLR, which need it")] = None
    warmup_min_ratio: Annotated[NotNegative | None, _COSINE] = None
    cos_min_ratio: Annotated[NotNegative | None, _COSINE] = None
    lr_range_test_min_lr: Annotated[Numbers | None, _RANGE] = None
    lr_range_test_step_size: Annotated[Count | None, _RANGE] = None
    lr_range_test_step_rate: Annotated[NotNegative | None, _RANGE] = None
    lr_range_test_staircase: Annotated[Flag | None, _RANGE] = None
    cycle_min_lr: Annotated[Numbers | None, _CYCLE] = None
    cycle_max_lr: Annotated[Numbers | None, _CYCLE] = None
    decay_lr_rate: Annotated[NotNegative | None, _CYCLE] = None
    cycle_first_step_size: Annotated[Count | None, _CYCLE] = None
    cycle_second_step_size: Annotated[Size | None, _CYCLE] = None
    cycle_first_stair_count: Annotated[Size | None, _CYCLE] = None
    cycle_second_stair_count: Annotated[Size | None, _CYCLE] = None
    decay_step_size: Annotated[Size | None, _CYCLE] = None
    cycle_momentum: Annotated[Flag | None, _CYCLE] = None
    cycle_min_mom: Annotated[Numbers | None, _CYCLE] = None
    cycle_max_mom: Annotated[Numbers | None, _CYCLE] = None
    decay_mom_rate: Annotated[NotNegative | None, _CYCLE] = None
    last_batch_iteration: Annotated[
        int | None, Done("where to go on, from the step() after the first optimizer step; -1 is the start")
    ] = None


class TorchParams(SchedulerParams):
    """Parameters of one of torch's schedules, which are passed on unchanged."""

    model_config = ConfigDict(extra="allow")


def _torch_schedule(name: str) -> Any:
    """Return a class of torch.optim.lr_scheduler that JSON can describe; None if there is none of this name."""
    found = None if name in _NEED_OBJECTS else getattr(lr_scheduler, name, None)
    return found if isinstance(found, type) and issubclass(found, lr_scheduler.LRScheduler) else None


class SchedulerSection(OpenSection):
    """`scheduler`."""

    type: Annotated[str, Done(f"{', '.join(SCHEDULES)}, or a class of torch.optim.lr_scheduler, with its arguments")]
    params: SerializeAsAny[SchedulerParams] = Field(default=SchedulerParams())

    @field_validator("type", mode="after")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in SCHEDULES and _torch_schedule(value) is None:
            raise ValueError(
                f"wanted one of {', '.join(SCHEDULES)}, or of torch.optim.lr_scheduler one that takes numbers alone; "
                f"choose one, or pass lr_scheduler= to initialize()"
            )
        return value

    @field_validator("params", mode="before")
    @classmethod
    def _of_torch(cls, value: Any, info: ValidationInfo) -> Any:
        is_torchs = isinstance(value, dict) and _torch_schedule(info.data.get("type", "")) is not None
        return TorchParams(**value) if is_torchs else value

    def make(self, optimizer: Optimizer) -> Any:
        """Return the schedule.

        Raises:
            ValueError: total_num_steps is "auto", which only a Trainer knows.
        """
        return self._class()(optimizer, **self.arguments())

    def _class(self) -> Any:
        return SCHEDULES.get(self.type) or _torch_schedule(self.type)

    @model_validator(mode="after")
    def _params_fit(self) -> SchedulerSection:
        known = inspect.signature(self._class()).parameters
        strangers = sorted(self.params.model_fields_set - known.keys())
        if strangers:
            own = ", ".join(name for name in known if name != "optimizer")
            raise ValueError(f"{self.type} has no params {', '.join(strangers)}; it has {own}")
        missing = [
            name
            for name, parameter in known.items()
            if parameter.default is inspect.Parameter.empty
            and name != "optimizer"
            and getattr(self.params, name, None) is None
        ]
        if missing:
            raise ValueError(f"{self.type} wants params.{' and params.'.join(missing)}; set them")
        return self

    def arguments(self) -> dict[str, Any]:
        """Return the schedule's arguments.

        Raises:
            ValueError: total_num_steps is "auto", which only a Trainer knows.
        """
        if self.params.total_num_steps == "auto":
            raise ValueError(
                'scheduler.params.total_num_steps is "auto", which transformers\' Trainer fills in; set it to the '
                "number of optimizer steps"
            )
        given = {name: getattr(self.params, name) for name in self.params.model_fields_set}
        chosen = {name: value for name, value in given.items() if value not in (None, "auto")}
        if given.get("warmup_max_lr") in ("auto", None) and "warmup_max_lr" in given:
            chosen["warmup_max_lr"] = None
        return chosen
