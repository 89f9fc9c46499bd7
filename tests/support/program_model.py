"""Programs over an optimizer, as data, and a model of torch's result for each: the oracle of test_state_machine.py.

For each parameter the model has one gradient (the mean over ranks, in fp64) or None, and its update rule in fp64.

Gradients are exact, as in test_properties.py, until something clips them. From then on a gradient has an error bound.
When a step finds the optimizer's gradient within that bound, the model takes it over. It also takes over masters and
moments after each step, so that all tolerances are those of one step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from program_rules import GROUPS, Slot, slots_of
from tolerances import UNIT
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FP32 = UNIT[torch.float32]
TINIEST = 2.0**-25  # half of fp16's smallest number
LARGEST = 30000.0  # in fp16, loss scale included, with room for a norm
DYNAMIC = dict(init_scale=16.0, growth_interval=2, min_scale=2.0, max_scale=256.0)
JOINS = "a parameter joins with a gradient, which may carry the loss scale"
WITH_INDEX = ("assign", "set_full_grad", "drop", "freeze", "thaw", "write", "read", "option", "set_state", "edit_state")

Op = tuple[Any, ...]
Program = list[Op]


# ---- a program, and what it runs on ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Plain data. A parameter is (shape, dtype, frozen); spares are added later."""

    params: tuple[tuple[tuple[int, ...], str, bool], ...]
    spares: tuple[tuple[tuple[int, ...], str, bool], ...] = ()
    size: int = 2
    stage: int = 2
    cap_mb: float = 25.0
    overlap: bool = True
    transport: str = "auto"
    other_cap_mb: float = 1e-3  # these three: of the second run
    other_overlap: bool = False
    other_transport: str = "exact"
    reduce_grads: bool = True  # False: all ranks have the same gradients
    transposed: bool = False  # whether matrices are transposed in memory
    grad_reduce_dtype: str | None = None
    has_second: bool = False  # another optimizer, with other parameters, takes turns
    loss_scale: float | str | None = None  # "dynamic" is DYNAMIC
    max_grad_norm: float | None = None
    rule: str = "adamw"
    seed: int = 0

    def second(self) -> Config:
        """The config of the other optimizer."""
        return replace(
            self,
            params=self.params[::-1],
            spares=(),
            stage=3 - self.stage,
            cap_mb=self.other_cap_mb,
            other_cap_mb=self.cap_mb,
            seed=self.seed + 50,
            has_second=False,
        )

    @property
    def largest_sum(self) -> int:
        """How many ranks' gradients a rounded sum may have."""
        return self.num_parts if "collective" in (self.transport, self.other_transport) else 1

    @property
    def specs(self) -> tuple[tuple[tuple[int, ...], str, bool], ...]:
        return self.params + self.spares

    def dtype(self, index: int) -> torch.dtype:
        return DTYPES[self.specs[index][1]]

    @property
    def alone(self) -> bool:
        """Whether `.grad` is a plain tensor: on one rank, or without reduction."""
        return self.size == 1 or not self.reduce_grads

    @property
    def num_parts(self) -> int:
        """The number of gradients in a mean."""
        return 1 if self.alone else self.size

    def options(self, index: int) -> dict[str, Any]:
        """A parameter's initial hyper-parameters, in a group of even parameters, of odd ones, or of its own."""
        return dict(GROUPS[self.rule][2 if index >= len(self.params) else index % 2])


class World:
    """Decides whether an op is legal, without running it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.added = set(range(len(config.params)))
        self.group_of = {index: index % 2 for index in self.added}  # each one's index in param_groups
        self.first_of = {number: number for number in self.group_of.values()}  # each group's first parameter
        self.trained = {index for index, spec in enumerate(config.specs) if not spec[2]}
        self.placed = self.added & self.trained  # the optimizer has state for these
        self.new: set[int] = set()  # appended to param_groups by others, and not seen by the optimizer yet
        self.ever_scaled = False
        self.can_load = False
        self.stage = config.stage
        self.is_broken = False  # some ranks still have a round to finish

    def initial_options(self, index: int) -> dict[str, Any]:
        """The hyper-parameters with which a parameter's group was made."""
        return self.config.options(self.first_of[self.group_of[index]])

    def state_names(self, index: int) -> tuple[str, ...]:
        """Names of a parameter's state."""
        return slots_of(self.config.rule, self.initial_options(index))

    def join(self) -> None:
        """After a step or a read, all that are trained have state."""
        self.placed |= self.added & self.trained
        self.new.clear()

    def is_round(self, sync: bool) -> bool:
        """Whether a backward sends gradients."""
        return self.stage == 2 and sync and not self.config.alone

    def places(self, scaled: bool, sync: bool) -> bool:
        """Whether a backward may place parameters, which all ranks do together."""
        waiting = self.added & self.trained - self.placed | self.new
        return bool(waiting if scaled and self.config.loss_scale is not None else sync and waiting - self.new)

    def used(self, mask: int) -> set[int]:
        """The parameters that a mask selects in a backward."""
        return {index for index in self.added & self.trained if mask >> index & 1}

    def chosen(self, mask: int) -> list[int]:
        """The parameters that a mask selects in other ops."""
        return [index for index in sorted(self.added) if mask >> index & 1]

    def legal(self, op: Op) -> bool:
        """Ops without a promised result are illegal. So are those whose arguments have no meaning."""
        name, args, config = op[0], op[1:], self.config
        index = args[-1] if name in WITH_INDEX else None
        if index is not None and index not in self.added:
            return False
        if name == "backward":
            used = [self.used(mask) for mask in args[3][: config.num_parts]]
            if self.is_round(args[2]) or self.is_broken:  # a round on every rank, or on none
                return all(one & self.placed for one in used)
            return all(used) if self.places(*args[1:3]) else any(used)
        if name in ("broken", "joint") and config.largest_sum > 1:
            return False  # gloo's reduce-scatter would wait in backward for a rank that is elsewhere
        if name in ("closure", "broken"):
            return self.legal(("backward", 0, True, True, args[-1]))
        if name == "joint":
            return self.legal(("backward", args[0], False, *args[1:]))
        if name == "grad_scaler":
            if config.alone and args[1] and any(config.dtype(index) == torch.float16 for index in self.added):
                return False  # torch's GradScaler refuses to unscale them
            return config.loss_scale is None and self.legal(("backward", 0, True, args[-2], args[-1]))
        if name == "assign":  # it is undefined whether the value includes the loss scale
            return index in self.trained and not (config.loss_scale is not None and self.ever_scaled)
        if name == "set_full_grad":
            return index in self.trained & self.placed
        if name == "set_state":
            return index in self.placed and bool({"step", "master", *self.state_names(index)} & set(args[1]))
        if name == "option" and args[0] == "momentum" and self.initial_options(index).get("nesterov"):
            return args[1] > 0
        if name == "option" and args[0] == "momentum" and "momentum_buffer" not in self.state_names(index):
            return False
        if name == "option" and args[0] not in ("schedule", "lr tensor"):
            return args[0] in self.initial_options(index)
        if name == "edit_state":
            return index in self.placed and args[1] in ("step", *self.state_names(index))
        if name == "torch_state":
            return config.rule in ("adam", "adamw")
        if name == "rebuild":
            if args[0] == "checkpoint":  # loading a checkpoint is strict
                return self.placed <= self.trained
            return args[0] == "full" or self.added & self.trained == self.placed
        if name == "torch_clip":  # on one rank `.grad` includes the loss scale
            return not config.alone or config.loss_scale is None
        if name == "freeze":
            return index in self.trained & self.placed and len(self.trained & self.placed) > 1
        if name == "thaw":
            return index not in self.trained
        if name in ("add_group", "append"):
            new, has_grad = len(self.added), len(args) > (name == "append") and args[-1] is not None
            return new < len(config.specs) and not (
                has_grad and (config.loss_scale is not None or new not in self.trained)
            )
        return name != "load" or self.can_load

    def follow(self, op: Op) -> None:
        """Update the state after a legal op."""
        name, index = op[0], op[-1]
        if name in ("backward", "step", "closure", "grad_scaler"):
            self.is_broken = False
        if name == "backward":
            self.ever_scaled |= op[2]
            if all(self.used(mask) for mask in op[4][: self.config.num_parts]) and not self.config.alone:
                if op[2] and self.config.loss_scale is not None:
                    self.join()
                elif op[3]:
                    self.placed |= (self.added & self.trained) - self.new
        elif name in ("closure", "grad_scaler", "broken"):
            self.ever_scaled = True
            self.is_broken = name == "broken"
            if name != "broken":
                self.join()
        elif name == "freeze":
            self.trained.discard(index)
        elif name == "thaw":
            self.trained.add(index)
            self.can_load &= index in self.placed
        elif name in ("add_group", "append"):
            new, number = len(self.added), len(self.first_of)
            self.added.add(new)
            self.group_of[new] = op[1] % number if name == "append" and op[1] is not None else number
            self.first_of.setdefault(self.group_of[new], new)
            if name == "append":
                self.new.add(new)
            else:
                self.placed |= {new} & self.trained
            self.can_load = False
        elif name in ("step", "torch_state"):
            self.join()
        elif name == "rebuild":
            self.stage = op[2]
            self.new.clear()
            if op[1] == "full":  # frozen parameters' state is loaded too
                self.join()
            else:
                self.can_load &= self.placed <= self.trained
                self.placed = self.added & self.trained
        elif name == "save":
            if op[1] == "full":
                self.join()
            self.can_load = self.added & self.trained <= self.placed  # a parameter placed in between would not fit


# ---- values -------------------------------------------------------------------------------------------------------


def seeded(*numbers: int) -> torch.Generator:
    seed = 17
    for number in numbers:
        seed = seed * 31 + number
    return torch.Generator().manual_seed(seed)


def start(config: Config, index: int) -> Tensor:
    shape, _, _ = config.specs[index]
    size = 0.5 + 1.5 * torch.rand(shape, generator=seeded(config.seed, index, 1))
    sign = torch.randint(0, 2, shape, generator=seeded(config.seed, index, 2)) * 2.0 - 1.0
    value = (sign * size).to(config.dtype(index))
    return value.mT.contiguous().mT if config.transposed and value.dim() == 2 else value


def unit_of(index: int) -> float:
    return 2.0 ** -(index % 5)


def coefficient(config: Config, index: int, number: int, rank: int) -> Tensor:
    """An fp32 gradient: +-3 * {1, 2, 3, 4} units, so that a third of any sum is exact, too."""
    shape, generator = config.specs[index][0], seeded(config.seed, index, number, rank)
    sign = torch.randint(0, 8, shape, generator=generator).clamp(max=1) * 2.0 - 1.0
    return sign * 3.0 * torch.randint(1, 5, shape, generator=generator) * unit_of(index)


def written(config: Config, index: int, count: int) -> Tensor:
    """The values of the count-th write. They have a range of their own, so that every element changes."""
    shape, generator = config.specs[index][0], seeded(config.seed, index, count, 5)
    sign = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
    size = 4.0 + count + torch.randint(0, 3, shape, generator=generator) / 4
    return (sign * size).to(config.dtype(index))


def state_value(config: Config, index: int, number: int, name: str) -> Tensor:
    """The value for set_full_state."""
    if name == "step":
        return torch.tensor(float(number))
    value = 0.1 + number + torch.rand(config.specs[index][0], generator=seeded(config.seed, index, number, len(name)))
    return value if name == "exp_avg_sq" else -value if number % 2 else value


def fresh(weight: Tensor, names: Iterable[str]) -> Slot:
    """The initial state."""
    return Slot(weight.float(), {name: torch.zeros(weight.shape) for name in names})


# ---- the model ----------------------------------------------------------------------------------------------------


@dataclass
class Grad:
    """The mean over ranks of a parameter's gradient, as torch has it after a reduction."""

    value: Tensor | None = None  # fp64
    error: float = 0.0  # the optimizer's gradient may differ by this
    rough: bool = False  # the optimizer's gradient is rounded
    unit: float = math.inf  # all ranks' sums are multiples of this,
    bound: float = 0.0  # and at most this

    @property
    def largest(self) -> float:
        if self.value is None or not self.value.numel():
            return 0.0
        return float(self.value.abs().nan_to_num(0.0, 0.0, 0.0).max())

    def is_exact_in(self, dtype: torch.dtype, largest_sum: int) -> bool:
        return not self.bound or largest_sum * self.bound / self.unit <= 1 / ROUNDING[dtype]

    def round(self, unit: float) -> None:
        self.error += unit * self.largest + TINIEST
        self.rough = True


class Model(World):
    """The result that torch gives, and the refusals that are allowed."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.grads = [Grad() for _ in config.specs]
        self.slots: dict[int, Slot] = {}
        self.groups: dict[int, dict[str, Any]] = {}
        self.take_added()
        self.saved: tuple[dict[int, Slot], dict[int, dict[str, Any]], float, int] | None = None
        self.scale = DYNAMIC["init_scale"] if config.loss_scale == "dynamic" else config.loss_scale or 1.0
        self.clean_steps = 0
        self.num_writes = 0
        self.last_norm: tuple[float, float] | None = None
        # Where gradients are, as far as refusals and reads depend on it:
        self.reduced: set[int] = set()  # partly in shards
        self.local: set[int] = set()  # partly not yet in shards
        self.carried: set[int] = set()  # every rank has a `.grad` that stands for all ranks
        self.half_edited: set[int] = set()
        self.kinds: set[str] = set()  # kinds of backward since gradients were dropped
        self.by_itself = True  # each backward was reduced by itself
        self.idle: set[int] = set()  # unused in the last step; stage 2 may send these when gradients are read
        self.clipped = False  # on one rank, by the optimizer
        self.edited_after_clip = False
        self.is_leftover = False
        self.before_clip = False  # clipped by the optimizer: grad_norm may be the norm before or after it
        self.is_norm_known = True
        self.order_matters = False  # sums are rounded, so a read in between may change bits
        self.norms_round = False  # a norm that was used is rounded, so the cuts of shards may change bits
        self.sums_round = False  # sums of the collective library are rounded
        self.has_norms = False  # ranks keep norms of single parameters until a new gradient comes
        self.norms_apart = False  # one came on some ranks only: the others would not ask for norms again

    @property
    def alone(self) -> bool:
        return self.config.alone

    def options(self, index: int) -> dict[str, Any]:
        """A parameter's present hyper-parameters."""
        return self.groups[self.group_of[index]]

    def take_added(self) -> None:
        """Give new parameters their state, and new groups their hyper-parameters."""
        for index in self.added - self.slots.keys():
            self.slots[index] = fresh(start(self.config, index), self.state_names(index))
            self.groups.setdefault(self.group_of[index], self.initial_options(index))

    def excuses(self) -> list[str]:
        """The reasons for which the optimizer may refuse now."""
        found = []
        if self.config.loss_scale is not None and any(self.grads[index].value is not None for index in self.new):
            found.append(JOINS)
        if self.config.loss_scale is not None and len(self.kinds) > 1 and not self.by_itself:
            found.append("scaled and plain are mixed")
        if self.half_edited:
            found.append("a gradient was edited that is half reduced")
        if self.edited_after_clip:
            found.append("a gradient was edited after a clip on one rank")
        if self.is_leftover:
            found.append("another scale may be in force, and a gradient is from before it")
        return found

    def norm(self, indices: Iterable[int], norm_type: float = 2.0) -> tuple[float, float]:
        """The norm, and how far the optimizer's may differ."""
        grads = [self.grads[index] for index in indices]
        values = [grad.value.reshape(-1) for grad in grads if grad.value is not None]
        norm = float(torch.linalg.vector_norm(torch.cat([torch.zeros(1, dtype=torch.float64), *values]), norm_type))
        numels = [0 if grad.value is None else grad.value.numel() for grad in grads]
        off = sum(grad.error * numel ** (1 / norm_type) for grad, numel in zip(grads, numels, strict=True))
        return norm, off + norm * (4 * FP32 if norm_type == 2.0 else 1e-5)

    def all_finite(self) -> bool:
        return all(bool(grad.value.isfinite().all()) for grad in self.grads if grad.value is not None)

    def add(self, index: int, mean: Tensor) -> None:
        """Add the mean gradient of a backward."""
        self.multiply_clipped()
        grad, dtype = self.grads[index], self.config.dtype(index)
        grad.value = mean if grad.value is None else grad.value + mean
        grad.unit = min(grad.unit, unit_of(index))
        grad.bound += 12 * unit_of(index)
        sums = self.config.largest_sum
        exact = grad.is_exact_in(dtype, sums)
        if grad.rough or not exact:
            self.sums_round |= sums > 1
            grad.round(2 * sums * ROUNDING[dtype] if self.alone or not exact or sums > 1 else 4 * FP32)
            self.order_matters = True

    def multiply_clipped(self) -> None:
        """On one rank, the clip coefficient is multiplied into `.grad` before an edit. It rounds like torch's clip."""
        if self.clipped:
            for index, grad in enumerate(self.grads):
                if grad.value is not None:
                    grad.round(2 * ROUNDING[self.config.dtype(index)])

    def put(self, index: int, value: Tensor | None) -> None:
        """Replace or drop a gradient."""
        self.multiply_clipped()
        self.grads[index] = Grad(value)
        if value is not None and value.any():
            self.grads[index].unit, self.grads[index].bound = unit_of(index), 12 * unit_of(index)
        for names in (self.reduced, self.local, self.half_edited, self.carried):
            names.discard(index)
        if all(grad.value is None for grad in self.grads):
            self.forget()

    def forget(self) -> None:
        """Forget all gradients."""
        self.kinds.clear()
        self.by_itself = True
        self.has_norms = self.norms_apart = False
        self.is_leftover = self.clipped = self.edited_after_clip = self.before_clip = False

    def scale_by(self, index: int, factor: float, unit: float) -> None:
        """Apply the factor of an edit or a clip. `unit`: the relative rounding of a clip, or 0."""
        grad = self.grads[index]
        if grad.value is None:
            return
        size = abs(factor)
        grad.value, grad.error = grad.value * factor, grad.error * size
        if not math.isfinite(grad.error):
            grad.error = 0.0
        if math.frexp(size)[0] == 0.5 and not unit:
            grad.unit, grad.bound = grad.unit * size, grad.bound * size
        else:
            grad.round(unit)

    def reduce(self) -> None:
        """After a read, a step or a round, all gradients of known parameters are in shards."""
        known = self.local & self.placed
        if known and not self.alone:  # after a round, each trained parameter has a `.grad`, even if an empty one
            self.reduced |= known
            self.local -= known
            self.has_norms = self.norms_apart = False
            self.carried |= known | (self.placed & self.trained)

    def edit(self, indices: Iterable[int]) -> None:
        """Note an edit in place."""
        self.multiply_clipped()
        # Carried ones count, too: after a round, a rank does not know whether another has sent a part.
        self.half_edited |= {index for index in indices if index in (self.reduced | self.carried) & self.local}
        self.edited_after_clip |= self.alone and self.clipped

    def clip(self, indices: Iterable[int], max_norm: float, norm_type: float = 2.0, unit: float = 0.0) -> None:
        """Clip by torch's rule. `unit`: relative rounding of the gradients and the norm."""
        indices = list(indices)
        norm, off = self.norm(indices, norm_type)
        factor = min(1.0, max_norm / (norm + 1e-6)) if not math.isnan(norm) else math.nan
        sure = factor == 1.0 and max_norm > (norm + off) * (1 + 8 * unit) + 1e-3
        self.norms_round |= not sure and not self.alone and (norm_type != 2.0 or unit > 0.0)
        for index in indices:
            if not sure:
                relative = off / norm if math.isfinite(norm) and norm else 0.0
                self.scale_by(index, factor, 8 * unit + 8 * FP32 + relative)

    def after_step(self, applied: bool) -> None:
        """Update the loss scale after a step."""
        unused = {index for index in self.placed if self.grads[index].value is None}
        self.idle = unused if unused < self.placed else set()
        self.is_leftover |= (
            self.alone and self.config.loss_scale == "dynamic" and any(grad.value is not None for grad in self.grads)
        )
        if self.config.loss_scale != "dynamic":
            return
        self.clean_steps = self.clean_steps + 1 if applied else 0
        if not applied:
            self.scale = max(self.scale / 2, DYNAMIC["min_scale"])
        elif self.clean_steps == DYNAMIC["growth_interval"]:
            self.scale, self.clean_steps = min(self.scale * 2, DYNAMIC["max_scale"]), 0
