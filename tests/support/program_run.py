"""Runs one of test_state_machine.py's programs on one rank, with the optimizer beside the model."""

from __future__ import annotations

import contextlib
import hashlib
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from program_gradients import GradOps, loss_of
from program_model import (
    FP32,
    JOINS,
    Config,
    Model,
    Op,
    Program,
    start,
)
from program_rules import Slot, apply, limits, top
from program_state import StateOps
from torch import Tensor, nn

import pyzero

TIMEOUT_S = 20  # of a collective, if ranks have diverged


@dataclass
class Outcome:
    """The outcome on one rank."""

    status: str = "done"  # or "refused", or "failed"
    at: int = -1  # the number of the op
    text: str = ""
    order_matters: bool = False
    rounds: bool = False  # bits may depend on where shards are cut
    records: list[tuple[str, str]] = field(default_factory=list)  # names of values, and digests of their bits


class Run(GradOps, StateOps):
    """One program on this rank. `quiet`: without reads and checks, except those at the end."""

    def __init__(self, group: Any, config: Config, quiet: bool) -> None:
        self.group, self.config, self.quiet = group, config, quiet
        self.rank = group.rank()
        self.model = Model(config)
        values = [start(config, index) + float(self.rank) for index in range(len(config.specs))]  # rank 0's are used
        self.params = [nn.Parameter(v, requires_grad=not s[2]) for v, s in zip(values, config.specs, strict=True)]
        self.module = nn.ParameterList(self.params)
        self.optimizer = self.build(config)
        self.saved: Any = None
        self.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.records: list[tuple[str, str]] = []
        self.number = 0

    # ---- comparing

    def record(self, name: str, value: Tensor) -> None:
        """Record a value, to compare it with other ranks and the second run."""
        value = value.detach().float()
        value = torch.where(value.isnan(), torch.full_like(value, math.nan), value)  # which NaN it is may differ
        bits = value.contiguous().numpy().tobytes()
        self.records.append((f"op {self.number}: {name}", hashlib.blake2b(bits, digest_size=8).hexdigest()))

    def compare_grad(self, index: int) -> Tensor | None:
        """Compare full_grad with the model, and return it."""
        got, grad = self.optimizer.full_grad(self.params[index]), self.model.grads[index]
        name = f"full_grad of parameter {index}"
        if grad.value is None:
            assert got is None, f"{name}: torch has None, got a tensor, largest {top(got)}"
            return None
        assert got is not None, f"{name}: got None, torch has a tensor, largest {top(grad.value)}"
        assert got.dtype == torch.float32 and got.shape == grad.value.shape, f"{name}: {got.dtype} {got.shape}"
        self.record(name, got + 0.0)  # makes -0 a 0: the sign of a zero depends on how the sum was made
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
        """Check that `.grad` is present if there is a gradient."""
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
            self.model.take_added()
            self.look()

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
        model.join()
        model.reduce()
        model.after_step(applied)
        if self.quiet:
            return
        assert optimizer.was_step_applied == applied, f"was_step_applied is {not applied}"
        if model.is_norm_known:
            self.compare_norm("grad_norm", optimizer.grad_norm, model.last_norm)
        elif optimizer.grad_norm is not None:
            self.record("grad_norm", optimizer.grad_norm)
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
        self,
        number: int,
        unscale: bool,
        max_norm: float | None,
        bad: tuple[int, str] | None,
        sync: bool,
        masks: tuple[int, ...],
    ) -> None:
        """A whole iteration with torch's GradScaler."""
        model, optimizer, scaler = self.model, self.optimizer, self.grad_scaler
        self.do_zero_grad("optimizer", True)
        by_rank = self.gradients_by_rank(number, masks, bad)
        mine = by_rank[self.rank % self.config.num_parts]
        if mine:
            with contextlib.nullcontext() if sync else optimizer.no_sync():
                scaler.scale(loss_of(self.params, mine, set(), "usual")).backward()
        else:
            scaler.scale(torch.zeros(()))  # the first call makes its tensors
        self.count_backward(by_rank, sync)
        if unscale:
            scaler.unscale_(optimizer)
            if max_norm is not None:
                self.do_clip(max_norm, 2.0)
        scaler.step(optimizer)
        scaler.update()
        applied = model.all_finite()
        model.join()
        model.after_step(applied)
        model.last_norm, model.is_norm_known = model.norm(model.added), False
        if not self.quiet:
            assert optimizer.was_step_applied == applied, f"was_step_applied is {not applied}"
            taken = [None if grad.value is None else grad.value.float() for grad in model.grads]
            self.compare_state(applied, {index: taken[index] for index in sorted(model.added)})
        self.do_zero_grad("optimizer", True)

    def compare_state(self, applied: bool, taken: dict[int, Tensor | None]) -> None:
        """After a step, check all state, changed or not. The model takes over the optimizer's values."""
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
                for name, wanted in (("master", before.master), *before.state.items()):
                    same = torch.equal(got[name], wanted)
                    assert same, f"{name} of parameter {index} was touched:\n{got[name]}\n{wanted}"
                assert got["step"] == before.step, f"step of parameter {index} is {got['step']}, not {before.step}"
                continue
            rough = model.grads[index].rough
            after = apply(config.rule, before, grad.double() * factor, model.options(index))
            assert got["step"] == after.step, f"step of parameter {index} is {got['step']}, not {after.step}"
            clip = self.clip_error(clips or rough)
            allowed = limits(config.rule, model.options(index), before, after, grad, clip)
            for name, wanted in {"master": after.master, **after.state}.items():
                off, limit = (got[name].double() - wanted).abs(), allowed[name]
                text = f"{name} of parameter {index}: off by {top(off):.3g}, at most {limit}"
                assert bool((off <= limit).all()), f"{text}:\n{got[name]}\n{wanted.float()}"
            model.slots[index] = Slot(got["master"], {name: got[name] for name in before.state}, after.step)

    def clip_error(self, clips: bool) -> tuple[float, float]:
        """See program_rules.limits."""
        if not clips:
            return 0.0, 0.0
        norm, off = self.model.last_norm or (0.0, 0.0)
        return FP32, off / norm if norm and math.isfinite(norm) else 0.0

    def whole(self, index: int) -> dict[str, Tensor]:
        """All state of a parameter. Checks that its weight is the rounded master."""
        param, model = self.params[index], self.model
        state = self.optimizer.full_state(param)
        model.join()  # a read places thawed parameters
        names = {"step", "master", *model.state_names(index)} if index in model.placed else set()
        assert set(state) == names, f"full_state of parameter {index} has {sorted(state)}"
        master = self.optimizer.full_master(param)
        rounded = master.to(param.dtype)
        assert torch.equal(rounded, param), f"weight {index} is not its master, rounded:\n{param.detach()}\n{master}"
        for name, value in {"weight": param, "master": master, **state}.items():
            self.record(f"{name} of parameter {index}", value)
        return state

    def finish(self) -> None:
        """Check everything that can be read at the end."""
        self.number = -1
        if self.quiet:
            for index in sorted(self.model.added):
                got = self.optimizer.full_grad(self.params[index])
                if got is not None:
                    self.record(f"full_grad of parameter {index}", got + 0.0)
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
    """One loss that reaches both optimizers' parameters, in different orders on odd and even ranks."""
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
    """Run the program on this rank. All ranks end at the same op, unless one hangs in a collective."""
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
            kinds = (RuntimeError, ValueError) if JOINS in excuses else RuntimeError
            is_refusal = isinstance(error, kinds) and not isinstance(error, pyzero.CollectiveError)
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
