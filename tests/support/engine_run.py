"""Runs one of test_engine_state_machine.py's programs on one rank, with the engine beside the model."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_model import Config, Model, Op, Program, part, start
from models import Failing
from program_rules import FP32, Slot, limits, top
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

import pyzero
from pyzero.checkpoint.files import CheckpointError
from pyzero.deepspeed import utils, zero
from pyzero.sharding.local_param import whole_of

LOAD_OPTIONS = {
    "all": {},
    "module": {"load_module_only": True},
    "no optimizer": {"load_optimizer_states": False},
    "no schedule": {"load_lr_scheduler_states": False},
}


def multiplied(weight: Tensor, grad: Tensor, fails: str) -> Tensor:
    if fails == "forward":
        raise ValueError("as planned")
    return ((Failing.apply(weight.float()) if fails else weight.float()) * grad).sum()


class Part(nn.Module):
    """One weight, whose gradient is what it is called with."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)

    def forward(self, grad: Tensor, fails: str) -> Tensor:
        return multiplied(self.weight, grad, fails)


class Net(nn.Module):
    def __init__(self, values: list[Tensor], frozen: int) -> None:
        super().__init__()
        self.root = nn.Parameter(values[0])
        self.blocks = nn.ModuleList(Part(value) for value in values[1:])
        for index, param in enumerate(self.parameters()):
            param.requires_grad_(index != frozen)

    def forward(self, grads: dict[int, Tensor], fails: tuple[int, str] | None = None) -> Tensor:
        outputs = []
        for index, grad in grads.items():
            how = fails[1] if fails and fails[0] == index else ""
            outputs.append(self.blocks[index - 1](grad, how) if index else multiplied(self.root, grad, how))
        return torch.stack(outputs)


@dataclass
class Outcome:
    """The outcome on one rank."""

    text: str = ""  # of a failure
    records: list[tuple[str, str]] = field(default_factory=list)  # names of values, and digests of their bits


class Run:
    """One program on this rank. `quiet`: without reads and checks, except those at the end."""

    def __init__(self, group: Any, config: Config, folder: str, quiet: bool) -> None:
        self.group, self.config, self.folder, self.quiet = group, config, folder, quiet
        self.rank = group.rank()
        self.model = Model(config)
        self.records: list[tuple[str, str]] = []
        self.number = 0
        self.build()

    def build(self) -> None:
        config = self.config
        # Rank 0's values are used.
        values = [start(config, index) + float(self.rank) for index in range(len(config.shapes))]
        net = Net(values, config.frozen)
        params = list(net.parameters())
        groups = [
            {**config.options(number), "params": [params[index] for index in members]}
            for number in (0, 1)
            if (members := [index for index in self.model.trained if index % 2 == number])
        ]
        options: dict[str, Any] = {"model_parameters": groups}
        if config.passes_optimizer:
            options = {"optimizer": (torch.optim.SGD if config.rule == "sgd" else torch.optim.AdamW)(groups)}
        self.engine = pyzero.initialize(model=net, config=config.as_json(), **options)[0]

    @property
    def params(self) -> list[Tensor]:
        return list(self.engine.module.parameters())

    # ---- comparing

    def record(self, name: str, value: Any) -> None:
        """Record a value, to compare it with other ranks and the second run."""
        # A copy, because fully_shard cannot free memory that numpy has seen.
        bits = value.detach().float().clone().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
        self.records.append((f"op {self.number}: {name}", hashlib.blake2b(bits, digest_size=8).hexdigest()))

    def same(self, name: str, got: Any, wanted: Any) -> None:
        is_same = torch.equal(got, wanted) if isinstance(wanted, Tensor) else got == wanted
        assert is_same, f"{name}: got {got}, wanted {wanted}"
        self.record(name, got)

    def compare_status(self) -> None:
        engine, model = self.engine, self.model
        self.same("counters", (engine.micro_steps, engine.global_steps), (model.micro_steps, model.global_steps))
        self.same("global_samples", engine.global_samples, model.global_samples)
        self.same("skipped_steps", engine.skipped_steps, model.scale.skipped)
        self.same("cur_scale", engine.cur_scale, model.scale.value)
        self.same("was_step_applied", engine.was_step_applied(), model.stepped and model.applied)
        self.same("boundary", engine.is_gradient_accumulation_boundary(), model.is_boundary())
        self.same("get_lr", engine.get_lr(), [float(group["lr"]) for group in model.groups])
        if self.config.rule != "sgd":
            self.same("get_mom", engine.get_mom(), [group["betas"] for group in model.groups])
        norm = engine.get_global_grad_norm()
        if norm is None or model.norm is None:
            self.same("get_global_grad_norm", norm, model.norm)
        elif torch.tensor(model.norm).isfinite():
            assert abs(norm - model.norm) <= 8 * FP32 * model.norm, f"norm: got {norm}, wanted {model.norm}"

    def compare_grad(self, index: int) -> None:
        got, wanted = utils.safe_get_full_grad(self.params[index]), self.model.grads.get(index)
        name = f"gradient of parameter {index}"
        if got is None or wanted is None:
            assert got is wanted is None, f"{name}: got {got}, wanted {wanted}"
        elif not wanted.isfinite().all():
            self.same(f"{name} is finite", bool(got.isfinite().all()), False)
        elif not self.model.is_clipped:
            self.same(name, got + 0.0, wanted.float() + 0.0)
        else:
            assert top(got - wanted) <= 8 * FP32 * top(wanted), f"{name}: got {got}, wanted {wanted}"

    def compare_step(self, after: dict[int, Slot], before: Any, grads: Any, options: Any, clip: Any) -> None:
        """After a step: the model takes over the engine's values of the parameters that were updated."""
        for index, wanted in after.items():
            got = self.whole(index)
            allowed = limits(self.config.rule, options[index], before[index], wanted, grads[index], clip)
            for name, value in {"master": wanted.master, **wanted.state}.items():
                off = (got[name].double() - value).abs()
                text = f"{name} of parameter {index}: off by {top(off):.3g}, at most {allowed[name]}"
                assert bool((off <= allowed[name]).all()), f"{text}:\n{got[name]}\n{value.float()}"
            self.model.slots[index] = Slot(got["master"], {name: got[name] for name in wanted.state}, wanted.step)
        self.compare_state()

    def compare_state(self) -> None:
        """Masters, state and weights against the model's, bit for bit."""
        for index, slot in enumerate(self.model.slots):
            got = self.whole(index)
            if index in self.model.trained:
                for name, value in {"master": slot.master, **slot.state}.items():
                    self.same(f"{name} of parameter {index}", got[name], value)
                self.same(f"step of parameter {index}", int(got["step"]), slot.step)
            weight = whole_of(self.params[index]).detach()
            is_shard = weight.dtype == torch.float32  # in stage 3; some are left gathered
            self.same(f"weight {index}", weight, slot.master if is_shard else self.model.weight(index))

    def whole(self, index: int) -> dict[str, Tensor]:
        """A trained parameter's master and state."""
        param = self.params[index]
        if index not in self.model.trained:
            return {}
        names = self.model.slots[index].state
        state = {name: utils.safe_get_full_optimizer_state(param, name) for name in (*names, "step")}
        return {"master": utils.safe_get_full_fp32_param(param), **state}

    # ---- ops

    def do(self, op: Op) -> None:
        getattr(self, f"do_{op[0]}")(*op[1:])
        if not self.quiet:
            self.compare_status()

    def batch(self, number: int, masks: tuple[int, ...], factor: int, bad: Any = None) -> dict[int, Tensor]:
        """This rank's inputs. Adds to the model's gradients. bad: (rank, value) of one that is inf or NaN."""
        config, model = self.config, self.model
        masks = masks[:1] * 3 if config.is_sharded else masks
        mine: dict[int, Tensor] = {}
        for rank in range(config.size):
            for index in model.used(masks[rank]):
                grad = part(config, number, index, rank)
                if bad is not None and bad[0] % config.size == rank and grad.numel():
                    grad.view(-1)[-1] = float(bad[1])
                model.add(index, grad)
                if rank == self.rank:
                    mine[index] = (grad * config.size * factor).float()
        return mine

    def forward(self, inputs: dict[int, Tensor], **options: Any) -> Tensor:
        outputs: Tensor = self.engine(inputs, **options)
        for got, (index, grad) in zip(outputs.detach(), inputs.items(), strict=True):
            products = self.model.weight(index).double() * grad
            off, limit = abs(float(got) - float(products.sum())), FP32 * products.numel() * float(products.abs().sum())
            is_fine = off <= limit or not products.isfinite().all()
            assert self.quiet or is_fine, f"output of parameter {index}: got {got}, wanted {products.sum()}"
        return outputs

    def do_backward(self, number: int, how: str, sync: bool, masks: tuple[int, ...], bad: Any = None) -> None:
        engine, model = self.engine, self.model
        if not model.fits() or (how == "plain" and model.is_scaled):
            return
        inputs = self.batch(number, masks, 1 if how == "no gas" else model.accumulation, bad)
        with contextlib.nullcontext() if sync else engine.no_sync():
            loss = self.forward(inputs).sum()
            if how in ("engine", "no gas"):
                engine.backward(loss, scale_wrt_gas=how == "engine")
                model.num_backwards += 1
            else:
                (engine.scale(loss) if how == "scale" else loss).backward()
        model.num_summed += 1
        model.is_unsent, model.is_vague = not sync, False

    def do_broken(self, number: int, who: int, index: int, sync: bool, where: str) -> None:
        """A pass through a parameter that raises on one rank, or on all for who=3. Then zero_grad."""
        if not self.model.fits() or ((self.config.is_sharded or where == "forward") and who < 3):
            return
        index = self.model.trained[index % len(self.model.trained)]
        fails = who == 3 or who % self.config.size == self.rank
        inputs = self.batch(number, (63,) * 3, self.model.accumulation)
        try:
            with contextlib.nullcontext() if sync else self.engine.no_sync():
                self.engine.backward(self.engine(inputs, fails=(index, where) if fails else None).sum())
            assert not fails, "the error was lost"
        except ValueError as error:
            assert fails and str(error) == "as planned", error
        self.model.num_backwards += where == "backward"
        self.do_zero_grad(True)

    def do_coalesce(self, numbers: tuple[int, ...], steps: bool) -> None:
        if not self.model.fits(len(numbers)):
            return
        model, before = self.model, self.model.boundary
        with self.engine.coalesce_grad_reduction():
            model.boundary = False
            for number in numbers:
                self.do_backward(number, "engine", True, (63,) * 3)
                if steps:
                    self.do_step()
        model.boundary = before

    def do_step(self) -> None:
        model, config = self.model, self.config
        acts = model.is_boundary(in_step=True)
        if acts and model.is_unsent and config.is_sharded:
            try:
                self.engine.step()
            except RuntimeError as error:
                assert "expected a backward outside no_sync()" in str(error), error
                model.stepped = False
                return
            raise AssertionError("a step without the gradients that no_sync() has kept")
        is_clipped = model.is_clipped
        before, grads = list(model.slots), dict(model.grads)
        options = {index: model.options(index) for index in model.trained}
        after = model.step()
        self.engine.step()
        clip = (FP32, 8 * FP32 * (1 + is_clipped)) if config.clip or is_clipped else (0.0, 0.0)
        if not self.quiet and acts:
            self.compare_step(after, before, grads, options, clip)
        else:
            for index, slot in after.items():
                model.slots[index] = Slot(slot.master.float(), slot.state, slot.step)

    def do_accumulate(self, number: int, how: str, masks: tuple[int, ...]) -> None:
        """All micro-batches of a step."""
        for micro in range(self.model.accumulation):
            self.do_backward(number + micro, how, True, masks)
            self.do_step()

    def do_zero_grad(self, set_to_none: bool) -> None:
        set_to_none |= self.model.is_unsent and self.config.is_sharded  # some would be None all the same
        self.engine.zero_grad(set_to_none)
        self.model.zero_grad(set_to_none)

    def do_boundary(self, value: bool) -> None:
        if self.config.managed:
            self.engine.set_gradient_accumulation_boundary(value)
            self.model.boundary = value

    def do_micro_steps(self, value: int) -> None:
        self.engine.micro_steps = self.model.micro_steps = value
        self.model.since_boundary = value % self.model.accumulation

    def do_accumulation(self, steps: int, micro: int) -> None:
        self.engine.set_train_micro_batch_size(micro)
        self.engine.set_train_batch_size(micro * self.config.size * steps)
        self.model.accumulation, self.model.micro_batch = steps, micro
        self.same("get_batch_info", self.engine.get_batch_info(), (micro * self.config.size * steps, micro, steps))

    def do_rate(self, value: float, index: int) -> None:
        index %= len(self.model.groups)
        self.engine.optimizer.param_groups[index]["lr"] = self.model.groups[index]["lr"] = value

    def do_clip(self, max_norm: float) -> None:
        model = self.model
        rounds = model.is_scaled or (self.config.size == 1 and self.config.dtype == "bf16")
        if rounds or model.is_unsent or not model.grads or not model.is_finite() or model.is_clipped:
            return
        norm = model.global_norm()
        got = float(whole_of(torch.nn.utils.clip_grad_norm_(self.engine.parameters(), max_norm)))
        assert abs(got - norm) <= 8 * FP32 * norm, f"clip_grad_norm_: got {got}, wanted {norm}"
        factor = min(1.0, max_norm / (norm + 1e-6))
        model.grads = {index: grad * factor for index, grad in model.grads.items()}
        model.is_clipped = True

    def do_look(self, number: int, mask: int, kind: str) -> None:
        """A forward without a backward."""
        if self.quiet:
            return
        inputs = {index: part(self.config, number, index, 0).float() for index in self.model.used(mask)}
        if kind == "eval":
            self.engine.eval()
        with torch.no_grad() if kind != "grad" else contextlib.nullcontext():
            self.forward(inputs)
        self.engine.train()

    def do_read(self, what: str, index: int) -> None:
        if self.quiet:
            return
        engine, model = self.engine, self.model
        index %= len(self.config.shapes)
        if what == "grad":
            if not (model.is_unsent and self.config.is_sharded) and index in model.trained:
                self.compare_grad(index)
        elif what == "state":
            self.compare_state()
        elif what == "fp32":
            for (name, value), slot in zip(engine.get_fp32_state_dict().items(), model.slots, strict=True):
                master = slot.master if name in self.names_trained() else None
                self.same(name, value, value if master is None else master)
        elif what == "gathered":
            params = self.params
            with zero.GatheredParameters(params):
                for number, param in enumerate(params):
                    self.same(f"gathered weight {number}", param.detach().clone(), model.weight(number))
        elif what == "state_dict":
            for number, value in enumerate(engine.module_state_dict().values()):
                wanted = model.slots[number].master if self.config.is_sharded else model.weight(number)
                self.same(f"state_dict's {number}", whole_of(value).detach(), wanted)

    def names_trained(self) -> set[str]:
        names = [name for name, _ in self.engine.module.named_parameters()]
        return {names[index] for index in self.model.trained}

    def value(self, number: int, index: int) -> Tensor:
        """A weight that 16 bits can hold."""
        return part(self.config, number, index, 1).float() + number / 2

    def do_set_grad(self, number: int, index: int) -> None:
        model = self.model
        index = model.trained[index % len(model.trained)]
        if (model.is_unsent and self.config.is_sharded) or not model.fits() or not model.is_finite():
            return
        if model.is_scaled and model.is_torchs and not (model.num_summed and model.grads):
            return  # it would carry no scale
        value = part(self.config, number, index, 2)
        utils.safe_set_full_grad(self.params[index], value.float())
        model.grads[index] = value
        model.is_vague |= not model.num_summed

    def do_set_state(self, number: int, index: int, what: str) -> None:
        model = self.model
        index = model.trained[index % len(model.trained)]
        if what == "master":
            value = self.value(number, index) / 3
            utils.safe_set_full_fp32_param(self.params[index], value)
            model.slots[index].master = value
        elif self.config.rule != "sgd" or model.slots[index].step:  # torch's SGD begins with the first gradient
            for name in model.slots[index].state:
                value = self.value(number, index).abs() / 3
                utils.safe_set_full_optimizer_state(self.params[index], value, name)
                model.slots[index].state[name] = value

    def do_edit(self, number: int, index: int, how: str) -> None:
        """Write weights as scripts do."""
        model, index = self.model, index % len(self.config.shapes)
        chosen = [index] if how == "gathered" else range(len(self.config.shapes))
        values = {index: self.value(number, index) for index in chosen}
        if how == "gathered":
            param = self.params[index]
            with zero.GatheredParameters([param], modifier_rank=0), torch.no_grad():
                if self.rank == 0:
                    param.copy_(values[index])
        else:
            names = [name for name, _ in self.engine.module.named_parameters()]
            self.engine.load_module_state_dict({"module": {names[index]: value for index, value in values.items()}})
        for index, value in values.items():
            model.write(index, value, has_masters=False if how == "gathered" else None)

    def do_save(self, tag: str, is_latest: bool) -> None:
        model = self.model
        if model.is_vague:
            return
        try:
            self.engine.save_checkpoint(self.folder, tag, {"op": self.number}, save_latest=is_latest)
        except CheckpointError as error:
            assert model.grads and ("gradient" in str(error)), error
            return
        assert not model.grads, "a save in the middle of an accumulation"
        model.save(tag, is_latest)
        model.saved[tag]["client_state"] = {"op": self.number}

    def do_load(self, tag: str | None, how: str) -> None:
        model = self.model
        found = model.latest if tag is None else tag
        if found not in model.saved or (how == "module" and model.grads):
            return
        path, client_state = self.engine.load_checkpoint(self.folder, tag, **LOAD_OPTIONS[how])
        assert Path(path) == Path(self.folder) / found
        self.same("client_state", client_state, model.saved[found]["client_state"])
        model.load(found, how)
        if not self.quiet:
            self.compare_state()

    def do_rebuild(self, stage: int, accumulation: int) -> None:
        """Go on in a new engine, of another stage."""
        old = self.model
        if old.latest is None or (stage == 3 and self.config.rule == "lamb"):
            return
        self.config = replace(self.config, stage=stage, accumulation=accumulation)
        self.model = Model(self.config)
        self.model.saved, self.model.latest = old.saved, old.latest
        del self.engine
        self.build()
        self.do_load(None, "all")

    def finish(self) -> None:
        """Record what both runs must have, at the end."""
        self.number = -1
        self.compare_status()
        if not self.quiet:
            self.compare_state()
        for index in range(len(self.config.shapes)):
            for name, value in self.whole(index).items():
                self.record(f"at the end, {name} of parameter {index}", value)
        self.record("at the end, norm", self.engine.get_global_grad_norm())


@contextlib.contextmanager
def alone(group: Any) -> Any:
    """A context in which these ranks are all that there are, and pyzero logs nothing."""
    logger, world = logging.getLogger("pyzero"), dist.group.WORLD
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    c10d._update_default_pg(group)
    try:
        yield
    finally:
        c10d._update_default_pg(world)
        logger.setLevel(before)


def run_program(group: Any, config: Config, program: Program, folder: str, quiet: bool) -> Outcome:
    """Run a program on this rank."""
    run, op = None, None
    with alone(group):
        try:
            run = Run(group, config, folder, quiet)
            for run.number, op in enumerate(program):
                run.do(op)
            run.finish()
        except Exception as error:
            lines = "".join(traceback.format_exception(error)[-6:])
            return Outcome(f"op {run.number if run else 'build'} {op}: {type(error).__name__}: {error}\n{lines}")
        return Outcome(records=run.records)
