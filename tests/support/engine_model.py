"""Programs over an engine, as data, and a model of what the engine owes: the oracle of test_engine_state_machine.py.

The engine's docs say what each op does. Gradients are multiples of 1/4, and a micro-batch's are multiplied by the
numbers of ranks and accumulation steps, so that their mean is exact in every dtype and order of sums. The model takes
over masters and moments after each step, so that all tolerances are those of one step.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from program_rules import GROUPS, Slot, apply, slots_of
from torch import Tensor, nn

from pyzero.deepspeed.schedules import SCHEDULES, Schedule, set_rate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MICRO_BATCH = 2  # samples of a micro-batch on a rank
FIRST_SCALE_POWER, WINDOW = 4, 2
MOST_MICRO_BATCHES = 40  # between two steps: their sum is exact in bf16
LARGEST = 30000.0  # of a scaled sum in fp16
SCHEDULE_PARAMS: dict[str, dict[str, Any]] = {
    "WarmupLR": dict(warmup_min_lr=0.001, warmup_num_steps=3, warmup_type="linear"),
    "WarmupDecayLR": dict(total_num_steps=6, warmup_max_lr=0.02, warmup_num_steps=2),
    "WarmupCosineLR": dict(total_num_steps=6, warmup_num_steps=2),
    "LRRangeTest": dict(lr_range_test_min_lr=0.001, lr_range_test_step_size=2),
    "OneCycle": dict(cycle_min_lr=0.001, cycle_max_lr=0.02, cycle_first_step_size=2, decay_lr_rate=1.0),
    "StepLR": dict(step_size=2, gamma=0.5),
    "CosineAnnealingLR": dict(T_max=4),
}

Op = tuple[Any, ...]
Program = list[Op]


@dataclass(frozen=True)
class Config:
    """Plain data."""

    shapes: tuple[tuple[int, ...], ...]  # of the root's parameter, and of the blocks'
    frozen: int = -1  # a parameter's index
    size: int = 2
    stage: int = 2
    dtype: str = "bf16"
    accumulation: int = 2
    rule: str = "adamw"
    schedule: str | None = None
    clip: float = 0.0
    scale: float = 0.0  # in fp16; 0 is dynamic
    hysteresis: int = 2
    consecutive: bool = False
    managed: bool = True
    passes_optimizer: bool = False  # torch's, instead of the config's
    sends_fp32: bool = False
    bucket: int = 500_000_000
    overlap: bool = True
    seed: int = 0

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are fully_shard's."""
        return self.stage == 3 and self.size > 1

    def options(self, index: int) -> dict[str, Any]:
        """A parameter's initial hyper-parameters: even ones are in the first group."""
        return GROUPS[self.rule][index % 2]

    def as_json(self) -> dict[str, Any]:
        """The engine's config."""
        kinds = {"adam": "Adam", "adamw": "AdamW", "lion": "Lion", "lamb": "Lamb", "sgd": "SGD"}
        params = {"adam_w_mode": False} if self.rule == "adam" else {}
        found: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": self.accumulation,
            "managed_gradient_accumulation": self.managed,
            "gradient_clipping": self.clip,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": self.bucket,
                "overlap_comm": self.overlap,
            },
        }
        if not self.passes_optimizer:
            found["optimizer"] = {"type": kinds[self.rule], "params": params}
        if self.schedule:
            found["scheduler"] = {"type": self.schedule, "params": SCHEDULE_PARAMS[self.schedule]}
        if self.dtype != "fp32":
            found[self.dtype] = {"enabled": True, "auto_cast": True}
        if self.dtype == "fp16":
            found["fp16"] |= {
                "loss_scale": self.scale,
                "initial_scale_power": FIRST_SCALE_POWER,
                "loss_scale_window": WINDOW,
                "hysteresis": self.hysteresis,
                "consecutive_hysteresis": self.consecutive,
            }
        if self.sends_fp32:
            found["communication_data_type"] = "fp32"
        return found


@dataclass
class LossScale:
    """DeepSpeed's rule, in its terms."""

    value: float
    iteration: int = 0
    last_overflow: int = -1
    hysteresis: int = 2
    skipped: int = 0

    def update(self, config: Config, overflow: bool) -> None:
        self.skipped += overflow
        if config.dtype != "fp16" or config.scale:
            return
        if overflow:
            if self.hysteresis == 1:
                self.value = max(self.value / 2, 1.0)
            self.hysteresis = max(self.hysteresis - 1, 1)
            self.last_overflow = self.iteration
        else:
            clean = self.iteration - self.last_overflow - 1
            grows = clean > 0 and clean % WINDOW == 0
            self.hysteresis = config.hysteresis if grows or config.consecutive else self.hysteresis
            self.value *= 2 if grows else 1
        self.iteration += 1


def start(config: Config, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * config.seed + index)
    return torch.randint(-8, 9, config.shapes[index], generator=generator) / 8


def part(config: Config, number: int, index: int, rank: int) -> Tensor:
    """A micro-batch's gradient of a parameter on a rank, over the number of ranks: the mean is the sum of the parts."""
    count = torch.arange(math.prod(config.shapes[index])).reshape(config.shapes[index])
    return ((7 * count + 5 * index + 4 * number + 2 * rank) % 5 - 2).double() / 4


class Model:
    """What the engine owes after each op."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.trained = [index for index in range(len(config.shapes)) if index != config.frozen]
        self.grads: dict[int, Tensor] = {}  # averaged
        self.slots = [self._slot(index) for index in range(len(config.shapes))]
        self.scale = LossScale(self._first_scale(), hysteresis=config.hysteresis)
        self.groups, self.schedule = self._make_schedule()
        self.accumulation = config.accumulation
        self.micro_batch = MICRO_BATCH
        self.micro_steps = self.since_boundary = self.global_steps = self.global_samples = 0
        self.num_backwards = 0  # since the last step
        self.num_summed = 0  # micro-batches in the gradients
        self.boundary: bool | None = None
        self.stepped = self.applied = False
        self.norm: float | None = None
        self.is_clipped = False  # by torch, since the last step
        self.is_unsent = False  # the last backward was in no_sync()
        self.is_vague = False  # gradients may or may not count as those of an accumulation
        self.saved: dict[str, dict[str, Any]] = {}
        self.latest: str | None = None

    def _slot(self, index: int) -> Slot:
        names = slots_of(self.config.rule, self.config.options(index))
        value = start(self.config, index)
        return Slot(value, {name: torch.zeros_like(value) for name in names})

    def _first_scale(self) -> float:
        if self.config.dtype != "fp16":
            return 1.0
        return self.config.scale or 2.0**FIRST_SCALE_POWER

    def _make_schedule(self) -> tuple[list[dict[str, Any]], Any]:
        """Groups of a stand-in optimizer, whose rates and betas a schedule drives."""
        used = sorted({index % 2 for index in self.trained})
        options = [{"params": [nn.Parameter(torch.zeros(1))], **self.config.options(number)} for number in used]
        self.group_of = {index: used.index(index % 2) for index in self.trained}
        known = ("params", "lr", "betas", "momentum")
        groups = [{key: value for key, value in group.items() if key in known} for group in options]
        make = torch.optim.SGD if self.config.rule == "sgd" else torch.optim.AdamW
        optimizer = make(groups)
        name = self.config.schedule
        cls = None if name is None else SCHEDULES.get(name) or getattr(torch.optim.lr_scheduler, name)
        schedule = None if cls is None else cls(optimizer, **SCHEDULE_PARAMS[str(name)])
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return optimizer.param_groups, schedule

    # ---- what can be asked

    @property
    def is_torchs(self) -> bool:
        """Whether `.grad` has torch's own gradients: on one rank, and in stage 3."""
        return self.config.size == 1 or self.config.is_sharded

    @property
    def is_scaled(self) -> bool:
        return self.config.dtype == "fp16"

    def weight(self, index: int) -> Tensor:
        """The weight that forward uses."""
        return self.slots[index].master.to(DTYPES[self.config.dtype])

    def used(self, mask: int) -> list[int]:
        """The trained parameters in a mask; all of them for one without any."""
        return [index for index in self.trained if mask >> index & 1] or self.trained

    def fits(self, num_micro: int = 1) -> bool:
        """Whether so many more micro-batches can be summed exactly."""
        count = self.num_summed + num_micro
        largest = count * self.accumulation * self.config.size / 2 * self.scale.value
        return (
            not self.is_clipped
            and count * self.accumulation <= MOST_MICRO_BATCHES
            and (not self.is_scaled or largest <= LARGEST)
        )

    def is_boundary(self, in_step: bool = False) -> bool:
        if self.boundary is not None:
            return self.boundary
        return self.since_boundary + 1 >= self.accumulation if self.config.managed else in_step

    def is_finite(self) -> bool:
        return all(bool(grad.isfinite().all()) for grad in self.grads.values())

    def global_norm(self) -> float:
        return math.sqrt(sum(float(grad.square().sum()) for grad in self.grads.values()))

    def options(self, index: int) -> dict[str, Any]:
        own = {key: value for key, value in self.groups[self.group_of[index]].items() if key in ("lr", "betas")}
        return {**self.config.options(index), **own}

    # ---- what the ops do

    def add(self, index: int, grad: Tensor) -> None:
        self.grads[index] = self.grads[index] + grad if index in self.grads else grad

    def write(self, index: int, value: Tensor, has_masters: bool | None = None) -> None:
        """Write a weight. An element of a 16-bit one that stays the same keeps its master."""
        slot, dtype = self.slots[index], DTYPES[self.config.dtype]
        if has_masters or (has_masters is None and self.config.is_sharded):  # weights that are their own masters
            slot.master = value
        else:
            weight = value.to(dtype)
            slot.master = torch.where(slot.master.to(dtype) == weight, slot.master, weight.float())

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.is_vague = not set_to_none and (self.is_vague or bool(self.grads))
        self.grads = {} if set_to_none else {index: torch.zeros_like(grad) for index, grad in self.grads.items()}
        self.num_summed, self.is_clipped, self.is_unsent = 0, False, False

    def step(self) -> dict[int, Slot]:
        """Return what the parameters that the step updates should have, in fp64."""
        self.stepped, after = self.is_boundary(in_step=True), {}
        if self.stepped:
            norm, self.applied = self.global_norm(), self.is_finite()
            self.norm = norm if not self.is_clipped else math.nan  # before or after, as the ranks know it
            clips = self.config.clip > 0 and self.applied
            factor = min(1.0, self.config.clip / (norm + 1e-6)) if clips else 1.0
            if self.applied:
                after = {
                    index: apply(self.config.rule, self.slots[index], grad * factor, self.options(index))
                    for index, grad in self.grads.items()
                }
            self.scale.update(self.config, not self.applied)
            num_micro = self.accumulation if self.config.managed else self.num_backwards
            self.global_samples += num_micro * self.micro_batch * self.config.size
            self.global_steps += 1
            self.num_backwards = 0
            if self.schedule is not None and self.applied:
                self.schedule.step()
            self.zero_grad()
        self.micro_steps += 1
        self.since_boundary = 0 if self.stepped else self.since_boundary + 1
        return after

    def save(self, tag: str, is_latest: bool) -> None:
        names = ("slots", "scale", "global_steps", "global_samples")
        self.saved[tag] = copy.deepcopy({name: getattr(self, name) for name in names})
        self.saved[tag]["groups"] = self._rates()
        self.saved[tag]["schedule"] = None if self.schedule is None else copy.deepcopy(self.schedule.state_dict())
        self.latest = tag if is_latest else self.latest

    def _rates(self) -> list[dict[str, Any]]:
        return [{key: group[key] for key in ("lr", "betas", "momentum") if key in group} for group in self.groups]

    def load(self, tag: str, how: str) -> None:
        """Load all, or with how= "module": weights; "no optimizer", "no schedule": all but that."""
        saved = copy.deepcopy(self.saved[tag])
        if how in ("module", "no optimizer"):
            for index, slot in enumerate(saved["slots"]):
                self.write(index, slot.master)
            if how == "module":
                return
        else:
            self.slots, self.scale = saved["slots"], saved["scale"]
            for group, own in zip(self.groups, saved["groups"], strict=True):
                group.update(own)
        self.global_steps, self.global_samples = saved["global_steps"], saved["global_samples"]
        self.micro_steps, self.since_boundary = self.global_steps * self.accumulation, 0
        self.zero_grad()
        if self.schedule is None:
            return
        if how != "no schedule":
            self.schedule.load_state_dict(saved["schedule"])
        if how != "all":
            for group, rate in zip(self.groups, self.schedule.get_last_lr(), strict=True):
                set_rate(group, rate)
        if isinstance(self.schedule, Schedule):
            self.schedule.apply()
