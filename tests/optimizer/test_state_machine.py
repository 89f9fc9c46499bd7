"""FusedZeroAdam as a state machine: any order of backward, reads, clips, edits, zero_grad, freezing, saving and step.

hypothesis builds a program, a list of tuples; teardown runs it once on some ranks. Each rank runs beside the optimizer
a model of what torch owes: for each parameter one gradient, the mean over ranks, in fp64, or None; and Adam in fp64.
The program runs a second time with another bucket size and overlap, and without its reads: the bits must be the same.

Gradients are exact, as in test_properties.py, until something clips them. From then on a gradient has a bound of its
error, and once a step has found it within that bound, the model goes on with the optimizer's. So it does with masters
and moments after each step, so that all tolerances are those of one step.

A failure prints `replay(program, config)`. A long hunt:

    PYTHONPATH=tests/support python tests/optimizer/test_state_machine.py --examples 2000 --seed 7
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import hashlib
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from ranks import Ranks
from tolerances import ADAM, UNIT
from torch import Tensor, nn

import pyzero

NUM_EXAMPLES = 200
MOST_REFUSED = 0.4  # of the programs; more, and the test tests refusals
TIMEOUT_S = 20  # of a collective: ranks that went apart
SETTINGS = settings(
    max_examples=NUM_EXAMPLES,
    stateful_step_count=16,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FP32 = UNIT[torch.float32]
TINIEST = 2.0**-25  # half of fp16's smallest number
LARGEST = 30000.0  # in fp16, loss scale included, with room for a norm
DYNAMIC = dict(init_scale=16.0, growth_interval=2, min_scale=2.0, max_scale=256.0)
GROUPS = (  # of even parameters, of odd ones, of those added later
    dict(lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1),
    dict(lr=3e-3, betas=(0.8, 0.95), weight_decay=0.0),
    dict(lr=2e-2, betas=(0.9, 0.99), weight_decay=0.01),
)
EPS = 1e-8

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
    other_cap_mb: float = 1e-3  # of the second run
    other_overlap: bool = False
    other_transport: str = "exact"
    loss_scale: float | str | None = None  # "dynamic" is DYNAMIC
    max_grad_norm: float | None = None
    decoupled: bool = True
    seed: int = 0

    @property
    def specs(self) -> tuple[tuple[tuple[int, ...], str, bool], ...]:
        return self.params + self.spares

    def dtype(self, index: int) -> torch.dtype:
        return DTYPES[self.specs[index][1]]

    def group(self, index: int) -> dict[str, Any]:
        return GROUPS[2 if index >= len(self.params) else index % 2]


class World:
    """What makes an op legal, known without running it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.added = set(range(len(config.params)))
        self.trained = {index for index, spec in enumerate(config.specs) if not spec[2]}
        self.placed = self.added & self.trained  # the optimizer has state of them
        self.ever_scaled = False
        self.can_load = False

    def used(self, mask: int) -> set[int]:
        """The parameters that a mask means in a backward."""
        return {index for index in self.added & self.trained if mask >> index & 1}

    def chosen(self, mask: int) -> list[int]:
        """And elsewhere."""
        return [index for index in sorted(self.added) if mask >> index & 1]

    def legal(self, op: Op) -> bool:
        """Ops that promise nothing are left out; so are those whose arguments mean nothing."""
        name, args, config = op[0], op[1:], self.config
        index = args[-1] if name in ("assign", "set_full_grad", "drop", "freeze", "thaw", "write", "read") else None
        if index is not None and index not in self.added:
            return False
        if name == "backward":
            used = [self.used(mask) for mask in args[3][: config.size]]
            if config.stage == 2 and config.size > 1:  # a round on every rank, or on none
                return all(one & self.placed for one in used)
            return any(used)
        if name == "assign":  # whether v carries the loss scale, nobody says
            return index in self.trained and not (config.loss_scale is not None and self.ever_scaled)
        if name == "set_full_grad":
            return index in self.trained & self.placed
        if name == "torch_clip":  # one rank: `.grad` carries the loss scale
            return config.size > 1 or config.loss_scale is None
        if name == "freeze":
            return index in self.trained & self.placed and len(self.trained & self.placed) > 1
        if name == "thaw":
            return index not in self.trained
        if name == "add_group":
            return len(self.added) < len(config.specs)
        return name != "load" or self.can_load

    def follow(self, op: Op) -> None:
        """An op that is legal has been done."""
        name, index = op[0], op[-1]
        if name == "backward":
            self.ever_scaled |= op[2]
        elif name == "freeze":
            self.trained.discard(index)
        elif name == "thaw":
            self.trained.add(index)
            self.can_load &= index in self.placed
        elif name == "add_group":
            new = len(self.added)
            self.added.add(new)
            self.placed |= {new} & self.trained
            self.can_load = False
        elif name == "step":
            self.placed |= self.added & self.trained
        elif name == "save":
            self.can_load = self.added & self.trained <= self.placed  # what is placed in between would not fit


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
    return (sign * size).to(config.dtype(index))


def unit_of(index: int) -> float:
    return 2.0 ** -(index % 5)


def coefficient(config: Config, index: int, number: int, rank: int) -> Tensor:
    """fp32: +-3 * {1, 2, 3, 4} units, so that a third of any sum is exact too."""
    shape, generator = config.specs[index][0], seeded(config.seed, index, number, rank)
    sign = torch.randint(0, 8, shape, generator=generator).clamp(max=1) * 2.0 - 1.0
    return sign * 3.0 * torch.randint(1, 5, shape, generator=generator) * unit_of(index)


def written(config: Config, index: int, count: int) -> Tensor:
    """Of the count-th write: in a range of its own, so that it is news in every element."""
    shape, generator = config.specs[index][0], seeded(config.seed, index, count, 5)
    sign = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
    size = 4.0 + count + torch.randint(0, 3, shape, generator=generator) / 4
    return (sign * size).to(config.dtype(index))


# ---- the model ----------------------------------------------------------------------------------------------------


@dataclass
class Grad:
    """The mean over ranks of a parameter's gradient, as torch has it after a reduction."""

    value: Tensor | None = None  # fp64
    error: float = 0.0  # the optimizer's may be off by that
    rough: bool = False  # it rounds
    unit: float = math.inf  # all ranks' sums are multiples of it,
    bound: float = 0.0  # and not above that

    @property
    def largest(self) -> float:
        if self.value is None or not self.value.numel():
            return 0.0
        return float(self.value.abs().nan_to_num(0.0, 0.0, 0.0).max())

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        return not self.bound or self.bound / self.unit <= 1 / ROUNDING[dtype]

    def round(self, unit: float) -> None:
        self.error += unit * self.largest + TINIEST
        self.rough = True


@dataclass
class Slot:
    """A parameter's state in the model; masters and moments as the optimizer's were after the last step."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int = 0


def adam(slot: Slot, grad: Tensor, group: dict[str, Any], decoupled: bool) -> Slot:
    """torch.optim.Adam's or AdamW's step in fp64."""
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    master, step = slot.master.double(), slot.step + 1
    if decoupled:
        master = master * (1 - lr * decay)
    else:
        grad = grad + decay * master
    exp_avg = slot.exp_avg.double() * beta1 + grad * (1 - beta1)
    exp_avg_sq = slot.exp_avg_sq.double() * beta2 + grad * grad * (1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + EPS
    return Slot(master - lr / (1 - beta1**step) * exp_avg / denominator, exp_avg, exp_avg_sq, step)


def top(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


class Model(World):
    """What torch owes, and which refusals are in order."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.grads = [Grad() for _ in config.specs]
        self.slots = []
        for index in range(len(config.specs)):
            zeros = torch.zeros(config.specs[index][0])
            self.slots.append(Slot(start(config, index).float(), zeros, zeros))
        self.saved: tuple[dict[int, Slot], float, int] | None = None
        self.scale = DYNAMIC["init_scale"] if config.loss_scale == "dynamic" else config.loss_scale or 1.0
        self.clean_steps = 0
        self.num_writes = 0
        self.last_norm: tuple[float, float] | None = None
        # Where gradients lie, as far as it matters for what may be refused or asked:
        self.reduced: set[int] = set()  # some of it in shards
        self.local: set[int] = set()  # some of it not yet
        self.carried: set[int] = set()  # every rank has a `.grad` that answers for all
        self.half_edited: set[int] = set()
        self.kinds: set[str] = set()  # of the backwards since gradients were dropped
        self.by_itself = True  # each of them was reduced by itself
        self.idle: set[int] = set()  # unused in the last step: stage 2 may send these when gradients are read
        self.clipped = False  # on one rank, by the optimizer
        self.edited_after_clip = False
        self.is_leftover = False
        self.before_clip = False  # clipped by the optimizer: grad_norm may be that before it, or after it
        self.is_norm_known = True
        self.order_matters = False  # sums round: a read in between may change bits

    @property
    def alone(self) -> bool:
        return self.config.size == 1

    def excuses(self) -> list[str]:
        """The refusals of promises that may come now."""
        found = []
        if self.config.loss_scale is not None and len(self.kinds) > 1 and not self.by_itself:
            found.append("scaled and plain are mixed")
        if self.half_edited:
            found.append("a gradient was edited that is half reduced")
        if self.edited_after_clip:
            found.append("a gradient was edited after a clip on one rank")
        if self.is_leftover:
            found.append("a dynamic scale, and a gradient from before the step")
        return found

    def norm(self, indices: Iterable[int], norm_type: float = 2.0) -> tuple[float, float]:
        """And how far the optimizer's may be off."""
        grads = [self.grads[index] for index in indices]
        values = [grad.value.reshape(-1) for grad in grads if grad.value is not None]
        norm = float(torch.linalg.vector_norm(torch.cat([torch.zeros(1, dtype=torch.float64), *values]), norm_type))
        numels = [0 if grad.value is None else grad.value.numel() for grad in grads]
        off = sum(grad.error * numel ** (1 / norm_type) for grad, numel in zip(grads, numels, strict=True))
        return norm, off + norm * (4 * FP32 if norm_type == 2.0 else 1e-5)

    def all_finite(self) -> bool:
        return all(bool(grad.value.isfinite().all()) for grad in self.grads if grad.value is not None)

    def add(self, index: int, mean: Tensor) -> None:
        """A backward's."""
        self.multiply_clipped()
        grad, dtype = self.grads[index], self.config.dtype(index)
        grad.value = mean if grad.value is None else grad.value + mean
        grad.unit = min(grad.unit, unit_of(index))
        grad.bound += 12 * unit_of(index)
        exact = grad.is_exact_in(dtype)
        if grad.rough or not exact:
            grad.round(2 * ROUNDING[dtype] if self.alone or not exact else 4 * FP32)
            self.order_matters = True

    def multiply_clipped(self) -> None:
        """On one rank the clip coefficient is multiplied into `.grad` before it changes, and rounds as torch's does."""
        if self.clipped:
            for index, grad in enumerate(self.grads):
                if grad.value is not None:
                    grad.round(2 * ROUNDING[self.config.dtype(index)])

    def put(self, index: int, value: Tensor | None) -> None:
        """A gradient is replaced, or dropped."""
        self.multiply_clipped()
        self.grads[index] = Grad(value)
        if value is not None and value.any():
            self.grads[index].unit, self.grads[index].bound = unit_of(index), 12 * unit_of(index)
        for names in (self.reduced, self.local, self.half_edited, self.carried):
            names.discard(index)
        if all(grad.value is None for grad in self.grads):
            self.forget()

    def forget(self) -> None:
        """Nothing is left of any gradient."""
        self.kinds.clear()
        self.by_itself = True
        self.is_leftover = self.clipped = self.edited_after_clip = self.before_clip = False

    def scale_by(self, index: int, factor: float, unit: float) -> None:
        """An edit or a clip; `unit`: it rounds."""
        grad = self.grads[index]
        if grad.value is None:
            return
        grad.value, grad.error = grad.value * factor, grad.error * factor
        if not math.isfinite(grad.error):
            grad.error = 0.0
        if math.frexp(factor)[0] == 0.5 and not unit:
            grad.unit, grad.bound = grad.unit * factor, grad.bound * factor
        else:
            grad.round(unit)

    def reduce(self) -> None:
        """A read, a step or a round: everything that the optimizer knows of is in shards."""
        known = self.local & self.placed
        if known and not self.alone:  # a round: each trained parameter carries a gradient after it, if an empty one
            self.reduced |= known
            self.local -= known
            self.carried |= known | (self.placed & self.trained)

    def edit(self, indices: Iterable[int]) -> None:
        """In place."""
        self.multiply_clipped()
        # Carried: a round has been through, and this rank alone cannot tell that no other has sent a part.
        self.half_edited |= {index for index in indices if index in (self.reduced | self.carried) & self.local}
        self.edited_after_clip |= self.alone and self.clipped

    def clip(self, indices: Iterable[int], max_norm: float, norm_type: float = 2.0, unit: float = 0.0) -> None:
        """torch's rule; `unit`: the gradients and the norm round by that."""
        indices = list(indices)
        norm, off = self.norm(indices, norm_type)
        factor = min(1.0, max_norm / (norm + 1e-6)) if not math.isnan(norm) else math.nan
        sure = factor == 1.0 and max_norm > (norm + off) * (1 + 8 * unit) + 1e-3
        for index in indices:
            if not sure:
                relative = off / norm if math.isfinite(norm) and norm else 0.0
                self.scale_by(index, factor, 8 * unit + 8 * FP32 + relative)

    def after_step(self, applied: bool) -> None:
        """The loss scale moves."""
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


# ---- what each rank runs ------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Of one rank."""

    status: str = "done"  # or "refused", or "failed"
    at: int = -1  # the op's number
    text: str = ""
    order_matters: bool = False
    records: list[tuple[str, str]] = field(default_factory=list)  # what was seen, and a digest of its bits


class Run:
    """One program on this rank. `quiet`: reads and checks are left out, but for those at the end."""

    def __init__(self, group: Any, config: Config, quiet: bool) -> None:
        self.group, self.config, self.quiet = group, config, quiet
        self.rank = group.rank()
        self.model = Model(config)
        offsets = [0.0 if frozen else float(self.rank) for _, _, frozen in config.specs]  # rank 0's values count
        values = [start(config, index) + offset for index, offset in enumerate(offsets)]
        self.params = [nn.Parameter(v, requires_grad=not s[2]) for v, s in zip(values, config.specs, strict=True)]
        self.module = nn.ParameterList(self.params)
        indices = range(len(config.params))
        groups = [{"params": [self.params[i] for i in indices if i % 2 == k], **GROUPS[k]} for k in (0, 1)]
        scale: Any = pyzero.LossScale(**DYNAMIC) if config.loss_scale == "dynamic" else config.loss_scale
        cls = pyzero.FusedZeroAdamW if config.decoupled else pyzero.FusedZeroAdam
        self.optimizer = cls(
            [options for options in groups if options["params"]],
            eps=EPS,
            process_group=group,
            stage=config.stage,
            bucket_cap_mb=config.cap_mb,
            overlap=config.overlap,
            transport=config.transport,
            loss_scale=scale,
            max_grad_norm=config.max_grad_norm,
        )
        self.saved: Any = None
        self.records: list[tuple[str, str]] = []
        self.number = 0

    # ---- telling

    def record(self, name: str, value: Tensor) -> None:
        """For the comparison with other ranks and the second run."""
        bits = value.detach().float().contiguous().numpy().tobytes()
        self.records.append((f"op {self.number}: {name}", hashlib.blake2b(bits, digest_size=8).hexdigest()))

    def compare_grad(self, index: int) -> Tensor | None:
        """full_grad, and whether it is the model's."""
        got, grad = self.optimizer.full_grad(self.params[index]), self.model.grads[index]
        name = f"full_grad of parameter {index}"
        if grad.value is None:
            assert got is None, f"{name}: torch has None, got a tensor, largest {top(got)}"
            return None
        assert got is not None, f"{name}: got None, torch has a tensor, largest {top(grad.value)}"
        assert got.dtype == torch.float32 and got.shape == grad.value.shape, f"{name}: {got.dtype} {got.shape}"
        self.record(name, got)
        fine = grad.value.isfinite()
        same_kind = torch.equal(fine, got.isfinite()) and torch.equal(grad.value.isnan(), got.isnan())
        assert same_kind, f"{name}: inf or NaN where torch has none, or none where it has:\n{got}\n{grad.value.float()}"
        off, limit = top((got.double() - grad.value)[fine]), grad.error + (FP32 * grad.largest if grad.rough else 0.0)
        assert off <= limit, f"{name}: off by {off:.3g}, at most {limit:.3g}:\n{got}\n{grad.value.float()}"
        return got

    def compare_norm(self, name: str, got: Any, wanted: tuple[float, float], unit: float = 0.0) -> None:
        value, (norm, off) = float(got), wanted
        self.record(name, torch.tensor(value))
        if not math.isfinite(norm):
            assert not math.isfinite(value), f"{name}: got {value}, torch has {norm}"
            return
        assert abs(value - norm) <= off + 8 * unit * norm, f"{name}: got {value}, torch has {norm}, give or take {off}"

    def look(self) -> None:
        """At `.grad`, which is to be there where a gradient is."""
        for index, param in enumerate(self.params):
            grad, known = param.grad, self.model.grads[index].value is not None
            if known and (self.model.alone or index in self.model.carried):
                assert grad is not None, f"`.grad` of parameter {index} is None, torch has one"
            if self.model.alone and not known:
                assert grad is None, f"`.grad` of parameter {index} is not None, torch's is"
            if grad is not None:
                same = (grad.shape, grad.dtype, grad.requires_grad) == (param.shape, param.dtype, False)
                assert same, f"`.grad` of parameter {index}: {grad.shape}, {grad.dtype}, {grad.requires_grad}"

    # ---- ops

    def do(self, op: Op) -> None:
        if self.model.legal(op):
            getattr(self, f"do_{op[0]}")(*op[1:])
            self.model.follow(op)
            self.look()

    def gradients(self, number: int, mask: int, rank: int, bad: tuple[int, str] | None) -> dict[int, Tensor]:
        found = {i: coefficient(self.config, i, number, rank) for i in sorted(self.model.used(mask))}
        victim = next((grad for grad in found.values() if grad.numel()), None)
        if victim is not None and bad is not None and bad[0] % self.config.size == rank:
            victim.view(-1)[-1] = float(bad[1])
        return found

    def too_large(self, index: int, more: float) -> bool:
        return self.config.dtype(index) == torch.float16 and more * self.model.scale > LARGEST

    def do_backward(
        self, number: int, scaled: bool, sync: bool, masks: tuple[int, ...], bad: tuple[int, str] | None
    ) -> None:
        config, model = self.config, self.model
        by_rank = [self.gradients(number, masks[rank], rank, bad) for rank in range(config.size)]
        used = set().union(*by_rank)
        if any(self.too_large(index, model.grads[index].bound + 12 * unit_of(index)) for index in used):
            return
        is_round = config.stage == 2 and sync and config.size > 1
        model.kinds.add("scaled" if scaled else "plain")
        model.by_itself &= is_round and not used & model.idle
        mine = by_rank[self.rank]
        if mine:
            loss = sum((self.params[index].float() * grad).sum() for index, grad in mine.items())
            with contextlib.nullcontext() if sync else self.optimizer.no_sync():
                if scaled:
                    self.optimizer.backward(loss)
                else:
                    loss.backward()
        for index in sorted(used):
            grads = [grads[index].double() for grads in by_rank if index in grads]
            model.add(index, torch.stack(grads).sum(0) / config.size)
        model.local |= used
        if not is_round and not model.alone:
            everywhere = set.intersection(*map(set, by_rank))
            model.carried |= everywhere
        if is_round:
            model.reduce()

    def do_read(self, what: str, index: int) -> None:
        if self.quiet:
            return
        optimizer, model, param = self.optimizer, self.model, self.params[index]
        if what == "clip":
            norm = optimizer.clip_grad_norm_(1e9)
            model.clipped = model.alone
            self.compare_norm("clip_grad_norm_(1e9)", norm, model.norm(model.added))
            model.order_matters |= not math.isfinite(model.norm(model.added)[0])  # torch's factor is 0 then, or NaN
            model.clip(model.added, 1e9)
        elif what == "full_grad":
            self.compare_grad(index)
        elif what == "grad_norm":
            last, got = model.last_norm, optimizer.grad_norm
            assert (last is None) == (got is None)
            if last is not None and model.is_norm_known:
                self.compare_norm("grad_norm", got, last)
        elif what == "state_dict":
            optimizer.state_dict()
        elif what == "full_master":
            got, wanted = optimizer.full_master(param), model.slots[index].master
            assert torch.equal(got, wanted), f"full_master of parameter {index}: got\n{got}\nnot\n{wanted}"
        elif what in ("norm", "isfinite"):
            self.read_grad(what, index)
        if what in ("clip", "full_grad"):
            model.reduce()

    def read_grad(self, what: str, index: int) -> None:
        """On `.grad` itself, where every rank has one."""
        model, param = self.model, self.params[index]
        if model.alone and (self.config.loss_scale is not None or model.clipped):
            return  # `.grad` carries the scale, and lacks the factor
        known = model.grads[index].value is not None
        if not (known if model.alone else index in model.carried):
            return
        assert param.grad is not None, f"`.grad` of parameter {index} is None after a round"
        if what == "norm":
            unit = ROUNDING[param.dtype]
            self.compare_norm(f"`.grad`.norm() of parameter {index}", param.grad.norm(), model.norm([index]), unit)
            model.reduce()
        elif model.alone or index not in model.local:
            got, value = bool(torch.isfinite(param.grad).all()), model.grads[index].value
            wanted = value is None or bool(value.isfinite().all())
            assert got == wanted, f"`.grad` of parameter {index}: isfinite().all() is {got}"

    def do_clip(self, max_norm: float, norm_type: float) -> None:
        model = self.model
        wanted = model.norm(model.added, norm_type)
        got = self.optimizer.clip_grad_norm_(max_norm, norm_type)
        self.compare_norm(f"clip_grad_norm_({max_norm}, {norm_type})", got, wanted)
        model.clip(model.added, max_norm, norm_type)
        model.clipped, model.before_clip = model.alone, True
        model.reduce()

    def do_torch_clip(self, max_norm: float, foreach: bool | None, mask: int) -> None:
        """Of parameters of which all ranks have a `.grad`: torch leaves the others out."""
        model = self.model
        held = {i for i, g in enumerate(model.grads) if g.value is not None} if model.alone else model.carried
        indices = [index for index in model.chosen(mask) if index in held]
        if not indices:
            return
        unit = max(ROUNDING[self.config.dtype(index)] for index in indices)
        wanted, after_clip = model.norm(indices), model.clipped
        if model.alone:
            model.edit(indices)
        got = nn.utils.clip_grad_norm_([self.params[index] for index in indices], max_norm, foreach=foreach)
        if not (model.alone and after_clip):
            self.compare_norm(f"torch's clip_grad_norm_({max_norm}) of {indices}", got, wanted, unit)
        model.clip(indices, max_norm, unit=unit)
        model.reduce()

    def do_assign(self, number: int, index: int) -> None:
        model, config = self.model, self.config
        model.edit([index])
        model.kinds.add("plain")
        values = [coefficient(config, index, number, rank) for rank in range(config.size)]
        self.params[index].grad = values[self.rank].to(config.dtype(index))
        edited, model.by_itself = model.half_edited - {index}, False
        model.put(index, torch.stack(values).double().mean(0))
        model.kinds.add("plain")
        model.half_edited = edited
        model.local.add(index)  # not carried: a plain tensor's norm is its own

    def do_set_full_grad(self, number: int, index: int) -> None:
        model = self.model
        value = coefficient(self.config, index, number, 0)
        model.edit([index] if model.alone else [])
        if self.too_large(index, 12 * unit_of(index)):
            return
        self.optimizer.set_full_grad(self.params[index], value)
        model.reduce()
        model.put(index, value.double())
        model.kinds.add("plain" if not model.kinds else "set")
        if model.clipped:
            model.grads[index].round(2 * ROUNDING[self.config.dtype(index)])
        if not model.alone:
            model.reduced.add(index)
            model.carried.add(index)

    def do_multiply(self, how: str, factor: float, mask: int) -> None:
        model, params = self.model, self.params
        indices = model.chosen(mask)
        if any(self.too_large(index, model.grads[index].bound * factor) for index in indices):
            return
        indices = [index for index in indices if model.grads[index].value is not None]
        model.edit(indices)
        held = [index for index in indices if params[index].grad is not None]
        if how == "foreach" and held:
            torch._foreach_mul_([params[index].grad for index in held], factor)
        for index in held:
            if how == "mul_":
                params[index].grad.mul_(factor)
            elif how == "div_":
                params[index].grad.div_(1 / factor)
            elif how == "*=":
                params[index].grad *= factor
        for index in indices:
            model.scale_by(index, factor, 0.0)

    def do_zero_grad(self, by: str, set_to_none: bool) -> None:
        model = self.model
        whole = by == "optimizer" or set_to_none
        if not whole:
            model.edit(index for index in model.added if model.grads[index].value is not None)
        (self.optimizer if by == "optimizer" else self.module).zero_grad(set_to_none)
        half, places = set(model.half_edited), (set(model.reduced), set(model.local), set(model.carried))
        for index in model.added:
            value = model.grads[index].value
            model.put(index, None if set_to_none or value is None else torch.zeros_like(value))
        if whole:
            model.forget()
        if not set_to_none:
            model.reduced, model.local, model.carried = places
            model.half_edited = set() if whole else half

    def do_drop(self, index: int) -> None:
        self.params[index].grad = None
        self.model.put(index, None)

    def do_freeze(self, index: int) -> None:
        self.params[index].requires_grad_(False)

    def do_thaw(self, index: int) -> None:
        self.params[index].requires_grad_(True)

    def do_add_group(self) -> None:
        self.optimizer.add_param_group({"params": [self.params[len(self.model.added)]], **GROUPS[2]})

    def do_write(self, index: int) -> None:
        model = self.model
        model.num_writes += 1
        value = written(self.config, index, model.num_writes)
        with torch.no_grad():
            self.params[index].copy_(value)
        model.slots[index] = replace(model.slots[index], master=value.float())

    def do_save(self) -> None:
        model = self.model
        self.saved = copy.deepcopy(self.optimizer.state_dict())
        model.saved = ({index: model.slots[index] for index in model.placed}, model.scale, model.clean_steps)

    def do_load(self) -> None:
        model = self.model
        self.optimizer.load_state_dict(copy.deepcopy(self.saved))
        assert model.saved is not None
        slots, model.scale, model.clean_steps = model.saved
        for index, slot in slots.items():
            model.slots[index] = slot
        if model.alone and self.config.loss_scale == "dynamic":
            model.is_leftover |= any(grad.value is not None for grad in model.grads)

    def do_step(self) -> None:
        model, optimizer = self.model, self.optimizer
        applied = model.all_finite()
        model.last_norm, model.is_norm_known = model.norm(model.added), not model.before_clip
        optimizer.step()
        model.reduce()
        model.placed |= model.added & model.trained
        model.reduce()
        model.after_step(applied)
        if self.quiet:
            return
        assert optimizer.was_step_applied == applied, f"was_step_applied is {not applied}"
        if model.is_norm_known:
            self.compare_norm("grad_norm", optimizer.grad_norm, model.last_norm)
        if self.config.loss_scale is not None:
            got = optimizer.loss_scale
            assert got == model.scale, f"the loss scale is {got}, not {model.scale}"
        excuse = model.excuses()
        try:
            taken = [self.compare_grad(index) for index in sorted(model.added)]
        except RuntimeError:
            if not excuse or not model.is_leftover:
                raise
            taken = [None if grad.value is None else grad.value.float() for grad in model.grads]
        self.compare_state(applied, dict(zip(sorted(model.added), taken, strict=False)))

    def compare_state(self, applied: bool, taken: dict[int, Tensor | None]) -> None:
        """After a step: all that it changed, and what not. The model goes on with what it finds."""
        model, config = self.model, self.config
        factor, clips = 1.0, config.max_grad_norm is not None
        if clips and model.last_norm is not None and math.isfinite(model.last_norm[0]):
            factor = min(1.0, config.max_grad_norm / (model.last_norm[0] + 1e-6))
        for index in sorted(model.added):
            grad, before, got = taken[index], model.slots[index], self.whole(index)
            if not got:
                continue
            if grad is not None and model.grads[index].rough:
                model.grads[index].value, model.grads[index].error = grad.double(), 0.0
            if not applied or grad is None:
                for name in ("master", "exp_avg", "exp_avg_sq"):
                    wanted = getattr(before, name)
                    same = torch.equal(got[name], wanted)
                    assert same, f"{name} of parameter {index} was touched:\n{got[name]}\n{wanted}"
                assert got["step"] == before.step, f"step of parameter {index} is {got['step']}, not {before.step}"
                continue
            rough = model.grads[index].rough
            after = adam(before, grad.double() * factor, config.group(index), config.decoupled)
            assert got["step"] == after.step, f"step of parameter {index} is {got['step']}, not {after.step}"
            for name, limit in self.limits(index, before, after, top(grad), clips or rough).items():
                off = top(got[name].double() - getattr(after, name))
                text = f"{name} of parameter {index}: off by {off:.3g}, at most {limit:.3g}"
                assert off <= limit, f"{text}:\n{got[name]}\n{getattr(after, name).float()}"
            model.slots[index] = Slot(got["master"], got["exp_avg"], got["exp_avg_sq"], after.step)

    def limits(self, index: int, before: Slot, after: Slot, grad: float, clips: bool) -> dict[str, float]:
        """The table's for one step, and what a clip adds; see test_properties.limits_of."""
        group, row = self.config.group(index), ADAM[torch.float32]
        lr, decay, beta2 = group["lr"], group["weight_decay"], group["betas"][1]
        largest = max(grad + (0.0 if self.config.decoupled else decay * top(before.master)), top(before.exp_avg))
        largest = max(largest, top(before.exp_avg_sq.sqrt()))
        moved = max(lr, top(after.master - before.master))
        kept = 1 - lr * decay if self.config.decoupled else 1.0
        magnitude, by_clip = max(top(before.master), top(after.master)), FP32 if clips else 0.0
        relative = 0.0
        if self.model.last_norm is not None and clips and math.isfinite(self.model.last_norm[0]):
            norm, off = self.model.last_norm
            relative = off / norm if norm else 0.0
        return {
            "master": row.master(1, magnitude, moved, beta2, kept) + (8 * by_clip + 2 * relative) * moved,
            "exp_avg": row.exp_avg(largest) + (5 * by_clip + relative) * largest,
            "exp_avg_sq": row.exp_avg_sq(largest, beta2) + (10 * by_clip + 2 * relative) * largest**2,
        }

    def whole(self, index: int) -> dict[str, Tensor]:
        """All state of a parameter; its weight is the master, rounded."""
        param, model = self.params[index], self.model
        state = self.optimizer.full_state(param)
        model.placed |= model.added & model.trained  # a read places what was thawed
        assert bool(state) == (index in model.placed), f"full_state of parameter {index} has {sorted(state)}"
        master = self.optimizer.full_master(param)
        rounded = master.to(param.dtype)
        assert torch.equal(rounded, param), f"weight {index} is not its master, rounded:\n{param.detach()}\n{master}"
        for name, value in {"weight": param, "master": master, **state}.items():
            self.record(f"{name} of parameter {index}", value)
        return state

    def finish(self) -> None:
        """What can be read at the end."""
        self.number = -1
        if self.quiet:
            for index in sorted(self.model.added):
                got = self.optimizer.full_grad(self.params[index])
                if got is not None:
                    self.record(f"full_grad of parameter {index}", got)
                self.whole(index)
            return
        for index in sorted(self.model.added):
            self.compare_grad(index)
            state, slot = self.whole(index), self.model.slots[index]
            if state:
                same = torch.equal(state["master"], slot.master)
                assert same, f"master of parameter {index} at the end:\n{state['master']}\n{slot.master}"


def run_program(group: Any, config: Config, program: Program, quiet: bool) -> Outcome:
    """On this rank. All ranks end at the same op, unless one hangs in a collective."""
    import torch.distributed as dist

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S), group)
    try:
        run = Run(group, config, quiet)
    except Exception:
        return Outcome("failed", -1, traceback.format_exc())
    outcome = Outcome(records=run.records)
    steps: list[Callable[[], None]] = [lambda op=op: run.do(op) for op in program] + [run.finish]
    for number, act in enumerate(steps):
        run.number = number
        outcome.at = number
        try:
            act()
        except Exception as error:
            excuses = run.model.excuses()
            is_refusal = isinstance(error, RuntimeError) and not isinstance(error, pyzero.CollectiveError)
            if is_refusal and excuses:
                outcome.status, outcome.text = "refused", f"{excuses[0]}: {error}"
            else:
                outcome.status, outcome.text = "failed", traceback.format_exc()
        if config.size > 1:
            ended = torch.tensor(float(outcome.status != "done"))
            try:
                dist.all_reduce(ended, dist.ReduceOp.MAX, group=group)
            except RuntimeError as error:
                text = f"{outcome.text}\nthe ranks went apart: {error}"
                outcome.status, outcome.text = "failed", text
            if ended and outcome.status == "done":
                outcome.status, outcome.text = "refused", "another rank ended here"
        if outcome.status != "done":
            break
    outcome.order_matters = run.model.order_matters
    return outcome


# ---- both runs, and what they must have in common -----------------------------------------------------------------

TALLY: collections.Counter[str] = collections.Counter()


class ProgramFailed(AssertionError):
    """With a text that can be pasted."""


def spell(program: Program, config: Config) -> str:
    ops = "".join(f"    {op!r},\n" for op in program)
    return f"replay([\n{ops}], {config!r})"


def fail(program: Program, config: Config, text: str) -> None:
    raise ProgramFailed(f"{text.strip()}\n\n{spell(program, config)}")


def on_all_ranks(pool: Ranks, config: Config, program: Program, quiet: bool) -> Outcome:
    """Rank 0's outcome, after a comparison with the others'."""
    try:
        outcomes = pool.run(config.size, run_program, config, program, quiet)
    except Exception:
        pool.stop()
        raise
    which = "second run (other buckets, no reads), " if quiet else ""
    failed = [f"{which}rank {r}, op {o.at}: {o.text}" for r, o in enumerate(outcomes) if o.status == "failed"]
    if failed:
        if any("went apart" in text or "CollectiveError" in text or "Timed out" in text for text in failed):
            pool.stop()  # what is under way in its groups would meet the next program's
        fail(program, config, "\n".join(failed))
    first = next((outcome for outcome in outcomes if outcome.status == "refused" and ": " in outcome.text), outcomes[0])
    for rank, other in enumerate(outcomes):
        if (other.at, first.status) != (first.at, other.status):
            fail(program, config, f"{which}rank {rank} ended at op {other.at}, {other.status}; another {first}")
        if first.status == "done":
            compare_records(outcomes[0].records, other.records, program, config, f"{which}ranks 0 and {rank} differ")
    return first


def compare_records(
    one: list[tuple[str, str]], two: list[tuple[str, str]], program: Program, config: Config, what: str
) -> None:
    for left, right in zip(one, two, strict=False):
        if left != right:
            fail(program, config, f"{what}: {left} and {right}")
    if len(one) != len(two):
        fail(program, config, f"{what}: {len(one)} and {len(two)} records")


def at_the_end(outcome: Outcome) -> list[tuple[str, str]]:
    return [record for record in outcome.records if record[0].startswith("op -1")]


def check(pool: Ranks, program: Program, config: Config) -> Outcome:
    """Run it twice; raises ProgramFailed."""
    TALLY["programs"] += 1
    first = on_all_ranks(pool, config, program, quiet=False)
    if first.status == "refused":
        TALLY["refused: " + first.text.split(": ")[0]] += 1
        return first
    other = replace(config, cap_mb=config.other_cap_mb, overlap=config.other_overlap, transport=config.other_transport)
    quiet = not first.order_matters
    second = on_all_ranks(pool, other, program, quiet)
    if second.status == "refused":
        TALLY["refused without reads: " + second.text.split(": ")[0]] += 1
        if not quiet:
            fail(program, config, f"refused with other buckets: {second.text}")
        return second
    what = "two runs differ, the second with other buckets"
    if quiet:
        compare_records(at_the_end(first), at_the_end(second), program, config, what + " and without reads")
    else:
        compare_records(first.records, second.records, program, config, what)
    TALLY["compared " + ("without reads" if quiet else "with the same reads")] += 1
    return second


def replay(program: Program, config: Config) -> Outcome:
    """Run a program that a failure printed."""
    with lone_pool() as pool:
        return check(pool, program, config)


@contextlib.contextmanager
def lone_pool() -> Iterator[Ranks]:
    pool = Ranks()
    try:
        yield pool
    finally:
        pool.stop()


# ---- strategies ---------------------------------------------------------------------------------------------------

SHAPES = st.sampled_from([(5,), (64,), (), (0,), (1,), (63,), (65,), (4, 3), (17, 19)])
SPECS = st.tuples(SHAPES, st.sampled_from(["fp32", "bf16", "fp16"]), st.sampled_from([False] * 5 + [True]))
SPARES = st.tuples(SHAPES, st.sampled_from(["fp32", "bf16", "fp16"]), st.sampled_from([False] * 3 + [True]))
CAPS = st.sampled_from([25.0, 1e-6, 2e-4, 1e-3])
CONFIGS = st.builds(
    Config,
    params=st.lists(SPECS, min_size=1, max_size=4).filter(lambda specs: not all(s[2] for s in specs)).map(tuple),
    spares=st.lists(SPARES, max_size=2).map(tuple),
    size=st.sampled_from([2, 2, 3, 1]),
    stage=st.sampled_from([2, 1]),
    cap_mb=CAPS,
    overlap=st.booleans(),
    transport=st.sampled_from(["auto", "exact"]),
    other_cap_mb=CAPS,
    other_overlap=st.booleans(),
    other_transport=st.sampled_from(["exact", "auto"]),
    loss_scale=st.sampled_from([None, None, 8.0, "dynamic"]),
    max_grad_norm=st.sampled_from([None, None, 2.0]),
    decoupled=st.booleans(),
    seed=st.integers(0, 99),
)
NUMBERS = st.integers(0, 9)
INDICES = st.integers(0, 5)
MASKS = st.one_of(st.just(63), st.integers(1, 63))
ONE_MASK = MASKS.map(lambda mask: (mask,) * 3)
MANY_MASKS = st.tuples(*[st.one_of(MASKS, st.integers(0, 63))] * 3)
BAD = st.tuples(st.integers(0, 2), st.sampled_from(["inf", "-inf", "nan"]))
USUALLY = st.sampled_from([True, True, False])
READS = st.sampled_from(["clip", "full_grad", "grad_norm", "state_dict", "norm", "isfinite", "full_master"])
MAX_NORMS = st.sampled_from([0.5, 3.0, 40.0])


class Machine(RuleBasedStateMachine):
    """Writes a program down; teardown runs it."""

    pool: Ranks

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self.program: Program = []

    @initialize(config=CONFIGS)
    def begin(self, config: Config) -> None:
        self.world = World(config)

    def then(self, *op: Any) -> None:
        assert self.world is not None
        if op[0] == "backward":  # the same masks for all, where this one is not legal
            op = (*op[:4], op[4][: self.world.config.size], op[5])
        if self.world.legal(op):
            self.program.append(op)
            self.world.follow(op)

    def teardown(self) -> None:
        if self.world is not None and self.program:
            check(self.pool, self.program, self.world.config)

    @rule(number=NUMBERS)
    def backward(self, number: int) -> None:
        assert self.world is not None
        self.then("backward", number, self.world.config.loss_scale is not None, True, (63,) * 3, None)

    @rule(number=NUMBERS, scaled=USUALLY, sync=USUALLY, masks=ONE_MASK)
    def backward_of_some(self, number: int, scaled: bool, sync: bool, masks: tuple[int, ...]) -> None:
        self.then("backward", number, scaled, sync, masks, None)

    @rule(number=NUMBERS, sync=st.booleans(), masks=MANY_MASKS)
    def backward_of_others_on_each(self, number: int, sync: bool, masks: tuple[int, ...]) -> None:
        self.then("backward", number, True, sync, masks, None)

    @rule(number=NUMBERS, sync=st.booleans(), masks=st.one_of(ONE_MASK, MANY_MASKS), bad=BAD)
    def backward_of_nan(self, number: int, sync: bool, masks: tuple[int, ...], bad: tuple[int, str]) -> None:
        self.then("backward", number, True, sync, masks, bad)

    @rule()
    def step(self) -> None:
        self.then("step")

    @rule(number=NUMBERS, by=st.sampled_from(["optimizer", "model"]), set_to_none=st.booleans())
    def iteration(self, number: int, by: str, set_to_none: bool) -> None:
        self.then("zero_grad", by, set_to_none)
        self.backward(number)
        self.then("step")

    @rule(what=READS, index=INDICES)
    def read(self, what: str, index: int) -> None:
        self.then("read", what, index)

    @rule(max_norm=MAX_NORMS, norm_type=st.sampled_from([2.0, 2.0, math.inf, 1.0]))
    def clip(self, max_norm: float, norm_type: float) -> None:
        self.then("clip", max_norm, norm_type)

    @rule(max_norm=MAX_NORMS, foreach=st.sampled_from([None, True, False]), mask=MASKS)
    def torch_clip(self, max_norm: float, foreach: bool | None, mask: int) -> None:
        self.then("torch_clip", max_norm, foreach, mask)

    @rule(number=NUMBERS, index=INDICES)
    def assign(self, number: int, index: int) -> None:
        self.then("assign", number, index)

    @rule(number=NUMBERS, index=INDICES)
    def set_full_grad(self, number: int, index: int) -> None:
        self.then("set_full_grad", number, index)

    @rule(how=st.sampled_from(["mul_", "div_", "*=", "foreach"]), factor=st.sampled_from([0.5, 2.0]), mask=MASKS)
    def multiply(self, how: str, factor: float, mask: int) -> None:
        self.then("multiply", how, factor, mask)

    @rule(by=st.sampled_from(["optimizer", "model"]), set_to_none=st.booleans())
    def zero_grad(self, by: str, set_to_none: bool) -> None:
        self.then("zero_grad", by, set_to_none)

    @rule(index=INDICES)
    def drop(self, index: int) -> None:
        self.then("drop", index)

    @rule(index=INDICES)
    def freeze_or_thaw(self, index: int) -> None:
        assert self.world is not None
        self.then("freeze" if index in self.world.trained else "thaw", index)

    @rule()
    def add_group(self) -> None:
        self.then("add_group")

    @rule(index=INDICES)
    def write(self, index: int) -> None:
        self.then("write", index)

    @rule()
    def save(self) -> None:
        self.then("save")

    @rule()
    def load(self) -> None:
        self.then("load")


def machine_on(pool: Ranks, only: Iterable[str] = (), **fixed: Any) -> type[Machine]:
    """A Machine on a pool; with ops of these names alone, and of configs with these fields."""
    names = set(only)

    class Here(Machine):
        def then(self, *op: Any) -> None:
            if not names or op[0] in names:
                super().then(*op)

        @initialize(config=CONFIGS.map(lambda config: replace(config, **fixed)))
        def begin(self, config: Config) -> None:
            self.world = World(config)

    Here.pool = pool
    return Here


def test_any_program(ranks):
    TALLY.clear()
    run_state_machine_as_test(machine_on(ranks), settings=SETTINGS)
    refused = sum(count for name, count in TALLY.items() if name.startswith("refused:"))
    assert refused <= MOST_REFUSED * TALLY["programs"], f"too many programs are refused: {dict(TALLY)}"


# ---- a long hunt --------------------------------------------------------------------------------------------------


def hunt(examples: int, seed: int, chunk: int, only: list[str], fixed: dict[str, Any], shrink: bool) -> int:
    """Chunk by chunk, each with a seed of its own; a failure ends its chunk alone. Returns the number of failures."""
    phases = [hypothesis.Phase.generate] + [hypothesis.Phase.shrink] * shrink
    options = settings(SETTINGS, max_examples=chunk, derandomize=False, phases=phases, report_multiple_bugs=False)
    failures, begin = 0, time.time()
    with lone_pool() as pool:
        for number in range(math.ceil(examples / chunk)):
            machine = hypothesis.seed(1000 * seed + number)(machine_on(pool, only, **fixed))
            try:
                run_state_machine_as_test(machine, settings=options)
            except ProgramFailed as failure:
                failures += 1
                print(f"---- failure {failures}, chunk {number}\n{failure}\n", flush=True)
            print(f"{number + 1} chunks, {failures} failures, {time.time() - begin:.0f} s, {dict(TALLY)}", flush=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description="Run many programs.")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=50, help="programs per seed; a failure ends a chunk")
    parser.add_argument("--only", default="", help="names of ops, by comma")
    parser.add_argument("--fix", default="", help='fields of Config, as in "size=1, stage=2"')
    parser.add_argument("--no-shrink", action="store_true")
    args = parser.parse_args()
    fixed = eval(f"dict({args.fix})")
    only = [name for name in args.only.split(",") if name]
    raise SystemExit(bool(hunt(args.examples, args.seed, args.chunk, only, fixed, not args.no_shrink)))


if __name__ == "__main__":
    main()
