"""One of test_state_machine.py's programs on one rank: the optimizer beside the model of what torch owes."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from program_model import (
    FP32,
    LARGEST,
    ROUNDING,
    Config,
    Grad,
    Model,
    Op,
    Program,
    Slot,
    adam,
    coefficient,
    start,
    top,
    unit_of,
)
from program_state import StateOps
from tolerances import ADAM
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyzero

TIMEOUT_S = 20  # of a collective: ranks that went apart


@dataclass
class Outcome:
    """Of one rank."""

    status: str = "done"  # or "refused", or "failed"
    at: int = -1  # the op's number
    text: str = ""
    order_matters: bool = False
    rounds: bool = False  # by where shards are cut
    records: list[tuple[str, str]] = field(default_factory=list)  # what was seen, and a digest of its bits


class Broken(Exception):
    """Raised in a backward."""


class _Break(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise Broken


def loss_of(params: list[nn.Parameter], grads: dict[int, Tensor], others: set[int], how: str) -> Any:
    """Its gradients are `grads`, and 1 where it reaches others."""

    def term(index: int, grad: Tensor) -> Tensor:
        param = params[index]
        if how == "tied":
            return (param.float() * (grad / 2)).sum() + (grad / 2 * param.float()).sum()
        if how == "create_graph":  # a gradient with a graph of its own
            return (param.float() * grad).sum() + (0.0 * param.float().square()).sum()
        found = (param.float() * grad).sum()
        if how == "broken" and index == min(grads):  # what was made first comes last in a backward
            found = _Break.apply(found)  # type: ignore[no-untyped-call]
        return found

    def checkpointed(index: int, grad: Tensor) -> Tensor:
        dummy = torch.zeros((), requires_grad=True)
        found: Tensor = checkpoint(lambda x: term(index, grad) + x, dummy, use_reentrant=True)
        return found

    terms = [(checkpointed if how == "reentrant" else term)(index, grad) for index, grad in grads.items()]
    terms += [params[index].float().sum() for index in sorted(others)]
    return sum(terms)


class Run(StateOps):
    """One program on this rank. `quiet`: reads and checks are left out, but for those at the end."""

    def __init__(self, group: Any, config: Config, quiet: bool) -> None:
        self.group, self.config, self.quiet = group, config, quiet
        self.rank = group.rank()
        self.model = Model(config)
        offsets = [0.0 if frozen else float(self.rank) for _, _, frozen in config.specs]  # rank 0's values count
        values = [start(config, index) + offset for index, offset in enumerate(offsets)]
        self.params = [nn.Parameter(v, requires_grad=not s[2]) for v, s in zip(values, config.specs, strict=True)]
        self.module = nn.ParameterList(self.params)
        self.optimizer = self.build(config)
        self.saved: Any = None
        self.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.records: list[tuple[str, str]] = []
        self.number = 0

    # ---- telling

    def record(self, name: str, value: Tensor) -> None:
        """For the comparison with other ranks and the second run."""
        value = value.detach().float()
        value = torch.where(value.isnan(), torch.full_like(value, math.nan), value)  # which NaN is nobody's promise
        bits = value.contiguous().numpy().tobytes()
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
        if not unit:
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
                same = (grad.shape, grad.dtype) == (param.shape, param.dtype)
                assert same, f"`.grad` of parameter {index}: {grad.shape}, {grad.dtype}"

    # ---- ops

    def do(self, op: Op) -> None:
        if self.model.legal(op):
            getattr(self, f"do_{op[0]}")(*op[1:])
            self.model.follow(op)
            self.look()

    def gradients(self, number: int, mask: int, rank: int, bad: tuple[int, str] | None) -> dict[int, Tensor]:
        found = {i: coefficient(self.config, i, number, rank) for i in sorted(self.model.used(mask))}
        victim = next((grad for grad in found.values() if grad.numel()), None)
        if victim is not None and bad is not None and bad[0] % self.config.num_parts == rank:
            victim.view(-1)[-1] = float(bad[1])
        return found

    def too_large(self, index: int, more: float) -> bool:
        largest = more * self.model.scale * self.config.largest_sum
        return self.config.dtype(index) == torch.float16 and largest > LARGEST

    def do_backward(
        self,
        number: int,
        scaled: bool,
        sync: bool,
        masks: tuple[int, ...],
        bad: tuple[int, str] | None,
        how: str = "usual",
    ) -> None:
        by_rank, times = self.gradients_by_rank(number, masks, bad), 2 if how == "twice" else 1
        if self.are_too_large(by_rank, times):
            return
        mine = by_rank[self.rank % self.config.num_parts]
        others = self.model.used(63) - mine.keys() if how == "inputs" else set()
        loss = loss_of(self.params, mine, others, how)
        for left in reversed(range(times)):
            self.begin_backward(by_rank, scaled, sync)
            if mine:
                with contextlib.nullcontext() if sync else self.optimizer.no_sync():
                    self.run_backward(loss, [self.params[i] for i in mine], scaled, how, retain_graph=left > 0)
            self.count_backward(by_rank, sync)

    def run_backward(self, loss: Any, inputs: list[Tensor], scaled: bool, how: str, retain_graph: bool) -> None:
        """In one of the ways in which it can be called."""
        options: dict[str, Any] = {"retain_graph": True} if retain_graph else {}
        if how == "autograd.grad":
            torch.autograd.grad(loss, inputs, retain_graph=True)
        if how == "inputs":
            options["inputs"] = inputs
        if how == "create_graph":
            options["create_graph"] = True
        if how == "scale" and scaled:
            self.optimizer.scale(loss).backward(**options)
        elif scaled:
            self.optimizer.backward(loss, **options)
        else:
            loss.backward(**options)

    def gradients_by_rank(
        self, number: int, masks: tuple[int, ...], bad: tuple[int, str] | None
    ) -> list[dict[int, Tensor]]:
        return [self.gradients(number, masks[rank], rank, bad) for rank in range(self.config.num_parts)]

    def are_too_large(self, by_rank: list[dict[int, Tensor]], times: int) -> bool:
        used = set().union(*by_rank)
        return any(self.too_large(i, self.model.grads[i].bound + 12 * times * unit_of(i)) for i in used)

    def begin_backward(self, by_rank: list[dict[int, Tensor]], scaled: bool, sync: bool) -> None:
        """In the model: what may be refused."""
        self.model.kinds.add("scaled" if scaled else "plain")
        self.model.by_itself &= self.model.is_round(sync) and not set().union(*by_rank) & self.model.idle

    def count_backward(self, by_rank: list[dict[int, Tensor]], sync: bool) -> None:
        """In the model: the gradients have come."""
        model, used = self.model, set().union(*by_rank)
        is_round = model.is_round(sync)
        for index in sorted(used):
            grads = [grads[index].double() for grads in by_rank if index in grads]
            model.add(index, torch.stack(grads).sum(0) / self.config.num_parts)
        model.local |= used
        if not is_round and not model.alone:
            everywhere = set.intersection(*map(set, by_rank))
            model.carried |= everywhere
            model.norms_apart |= model.has_norms and not all(by_rank)
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
        elif what == "full_state_dict":
            optimizer.full_state_dict(to=0)
            model.placed |= model.added & model.trained
        elif what == "model":
            copy.deepcopy(self.module).load_state_dict(self.module.state_dict())
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
        if not (known if model.alone else index in model.carried) or model.norms_apart:
            return
        assert param.grad is not None, f"`.grad` of parameter {index} is None after a round"
        if what == "norm":
            unit = ROUNDING[param.dtype]
            self.compare_norm(f"`.grad`.norm() of parameter {index}", param.grad.norm(), model.norm([index]), unit)
            model.reduce()
            model.has_norms = True
        elif model.alone or index not in model.local:
            got, value = bool(torch.isfinite(param.grad).all()), model.grads[index].value
            wanted = value is None or bool(value.isfinite().all())
            assert got == wanted, f"`.grad` of parameter {index}: isfinite().all() is {got}"
            model.has_norms = True

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
        if not indices or model.norms_apart:
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
        model.has_norms = True

    def do_assign(self, how: str, number: int, index: int) -> None:
        model, config = self.model, self.config
        model.edit([index])
        model.kinds.add("plain")
        values = [coefficient(config, index, number, rank) for rank in range(self.config.num_parts)]
        value = values[self.rank % self.config.num_parts].to(config.dtype(index))
        if how == "strided":
            value = value.mT.contiguous().mT if value.dim() == 2 else torch.stack([value, value], -1)[..., 0]
        self.params[index].grad = value
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

    def do_zero(self, mask: int) -> None:
        """`.grad` of some parameters."""
        model = self.model
        indices = [index for index in model.chosen(mask) if model.grads[index].value is not None]
        model.edit(indices)
        for index in indices:
            grad, value = self.params[index].grad, model.grads[index].value
            if grad is not None:
                grad.zero_()
            assert value is not None
            model.grads[index] = Grad(torch.zeros_like(value))

    def do_broken(self, number: int, who: int, by: str, masks: tuple[int, ...]) -> None:
        """A backward that fails half-way, on one rank or on all; the loop drops the gradients and goes on."""
        mine = self.gradients(number, masks[0], self.rank, None)
        if len(mine) < 2 or max(mine) not in self.model.placed:
            return  # before its first gradient has come, a rank does not know that the others send theirs
        scaled = self.config.loss_scale is not None
        self.begin_backward([mine], scaled, sync=True)
        fails = who == 3 or who % self.config.size == self.rank
        loss = loss_of(self.params, mine, set(), "broken" if fails else "usual")
        try:
            self.run_backward(loss, [], scaled, "usual", retain_graph=False)
        except Broken:
            pass
        self.do_zero_grad(by, True)

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

    def do_closure(self, number: int, how: str, masks: tuple[int, ...]) -> None:
        def closure() -> float:
            self.do_zero_grad("optimizer", True)
            self.do_backward(number, self.config.loss_scale is not None, True, masks, None, how)
            return 3.0

        self.do_step(closure)

    def do_step(self, closure: Callable[[], float] | None = None) -> None:
        model, optimizer = self.model, self.optimizer
        loss = optimizer.step(closure)
        assert loss == (3.0 if closure else None)
        applied = model.all_finite()
        model.last_norm, model.is_norm_known = model.norm(model.added), not model.before_clip
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

    def do_grad_scaler(
        self, number: int, unscale: bool, max_norm: float | None, bad: tuple[int, str] | None, masks: tuple[int, ...]
    ) -> None:
        """A whole iteration with torch's."""
        model, optimizer, scaler = self.model, self.optimizer, self.grad_scaler
        self.do_zero_grad("optimizer", True)
        by_rank = self.gradients_by_rank(number, masks, bad)
        mine = by_rank[self.rank % self.config.num_parts]
        if mine:
            scaler.scale(loss_of(self.params, mine, set(), "usual")).backward()
        else:
            scaler.scale(torch.zeros(()))  # it makes its tensors in the first call
        self.count_backward(by_rank, sync=True)
        if unscale:
            scaler.unscale_(optimizer)
            if max_norm is not None:
                self.do_clip(max_norm, 2.0)
        scaler.step(optimizer)
        scaler.update()
        applied = model.all_finite()
        model.placed |= model.added & model.trained
        model.after_step(applied)
        model.last_norm, model.is_norm_known = model.norm(model.added), False
        if not self.quiet:
            assert optimizer.was_step_applied == applied, f"was_step_applied is {not applied}"
            taken = [None if grad.value is None else grad.value.float() for grad in model.grads]
            self.compare_state(applied, {index: taken[index] for index in sorted(model.added)})
        self.do_zero_grad("optimizer", True)

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
            after = adam(before, grad.double() * factor, model.options(index))
            assert got["step"] == after.step, f"step of parameter {index} is {got['step']}, not {after.step}"
            for name, limit in self.limits(index, before, after, top(grad), clips or rough).items():
                off = top(got[name].double() - getattr(after, name))
                text = f"{name} of parameter {index}: off by {off:.3g}, at most {limit:.3g}"
                assert off <= limit, f"{text}:\n{got[name]}\n{getattr(after, name).float()}"
            model.slots[index] = Slot(got["master"], got["exp_avg"], got["exp_avg_sq"], after.step)

    def limits(self, index: int, before: Slot, after: Slot, grad: float, clips: bool) -> dict[str, float]:
        """The table's for one step, and what a clip adds; see test_properties.limits_of."""
        options, row = self.model.options(index), ADAM[torch.float32]
        lr, decay, beta2 = options["lr"], options["weight_decay"], options["betas"][1]
        decoupled = options["decoupled_weight_decay"]
        largest = max(grad + (0.0 if decoupled else decay * top(before.master)), top(before.exp_avg))
        largest = max(largest, top(before.exp_avg_sq.sqrt()))
        moved = max(lr, top(after.master - before.master))
        kept = 1 - lr * decay if decoupled else 1.0
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


def do(runs: list[Run], op: Op) -> None:
    if op[0] == "also":
        runs[1].do(op[1:])
    elif op[0] == "joint":
        backward_of_both(runs, *op[1:])
    else:
        runs[0].do(op)


def backward_of_both(runs: list[Run], number: int, sync: bool, masks: tuple[int, ...]) -> None:
    """One loss that reaches both optimizers' parameters, in another order on each rank."""
    if not all(run.model.legal(("joint", number, sync, masks)) for run in runs):
        return
    found = [run.gradients_by_rank(number, masks, None) for run in runs]
    if any(run.are_too_large(by_rank, 1) for run, by_rank in zip(runs, found, strict=True)):
        return
    terms: list[Any] = []
    with contextlib.ExitStack() as stack:
        for run, by_rank in zip(runs, found, strict=True):
            run.begin_backward(by_rank, scaled=False, sync=sync)
            terms.append(loss_of(run.params, by_rank[run.rank % run.config.num_parts], set(), "usual"))
            if not sync:
                stack.enter_context(run.optimizer.no_sync())
        loss = sum(terms if runs[0].rank % 2 else terms[::-1])
        if isinstance(loss, Tensor):
            loss.backward()
    for run, by_rank in zip(runs, found, strict=True):
        run.count_backward(by_rank, sync)
        run.model.follow(("backward", number, False, sync, masks, None))
        run.look()


def run_program(group: Any, config: Config, program: Program, quiet: bool) -> Outcome:
    """On this rank. All ranks end at the same op, unless one hangs in a collective."""
    import torch.distributed as dist

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S), group)
    try:
        runs = [Run(group, each, quiet) for each in ([config, config.second()] if config.has_second else [config])]
    except Exception:
        return Outcome("failed", -1, traceback.format_exc())
    outcome = Outcome(records=runs[0].records)
    steps: list[Callable[[], None]] = [lambda op=op: do(runs, op) for op in program]
    for number, act in enumerate([*steps, *(run.finish for run in runs)]):
        for run in runs:
            run.number, run.records = number, outcome.records
        outcome.at = number
        try:
            act()
        except Exception as error:
            excuses = [excuse for run in runs for excuse in run.model.excuses()]
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
    outcome.order_matters = any(run.model.order_matters for run in runs)
    outcome.rounds = any(run.model.norms_round or run.model.sums_round for run in runs)
    return outcome
