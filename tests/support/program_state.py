"""Ops of test_state_machine.py's programs on state, weights, groups, saving and building."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from program_model import DTYPES, DYNAMIC, Config, Model, coefficient, fresh, state_value, written
from program_rules import Slot, make
from torch import Tensor, nn

import pyzero
from pyzero.optimizer import ZeroOptimizer


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, as in a Lookahead or a SAM: it inherits torch's add_param_group."""

    def __init__(self, inner: ZeroOptimizer) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups


class StateOps:
    """A mixin of program_run.Run."""

    group: Any
    config: Config
    model: Model
    params: list[nn.Parameter]
    module: nn.ParameterList
    optimizer: ZeroOptimizer
    rank: int
    saved: Any

    def build(self, config: Config) -> ZeroOptimizer:
        """An optimizer of all parameters that are in groups now, with their initial hyper-parameters."""
        groups: dict[int, dict[str, Any]] = {}
        for index in sorted(self.model.added):
            options = self.model.initial_options(index)
            group = groups.setdefault(self.model.group_of[index], {**options, "params": []})
            group["params"].append(self.params[index])
        return make(
            config.rule,
            [groups[number] for number in sorted(groups)],
            process_group=self.group,
            stage=self.model.stage,
            bucket_cap_mb=config.cap_mb,
            overlap=config.overlap,
            transport=config.transport,
            grad_reduce_dtype=DTYPES[config.grad_reduce_dtype] if config.grad_reduce_dtype else None,
            reduce_grads=config.reduce_grads,
            loss_scale=pyzero.LossScale(**DYNAMIC) if config.loss_scale == "dynamic" else config.loss_scale,
            max_grad_norm=config.max_grad_norm,
        )

    def do_freeze(self, index: int) -> None:
        self.params[index].requires_grad_(False)

    def do_thaw(self, index: int) -> None:
        self.params[index].requires_grad_(True)

    def give_grad(self, index: int, number: int | None) -> None:
        """Assign a gradient to a parameter that is about to join, unless `number` is None."""
        if number is None:
            return
        model, config = self.model, self.config
        model.edit([index])
        values = [coefficient(config, index, number, rank) for rank in range(config.num_parts)]
        self.params[index].grad = values[self.rank % config.num_parts].to(config.dtype(index))
        model.put(index, torch.stack(values).double().mean(0))
        model.local.add(index)
        model.kinds.add("plain")

    def do_add_group(self, grad: int | None = None) -> None:
        new = len(self.model.added)
        self.give_grad(new, grad)
        self.optimizer.add_param_group({"params": [self.params[new]], **self.config.options(new)})

    def do_append(self, number: int | None, grad: int | None = None) -> None:
        """What a wrapper's add_param_group does: append a group, or a parameter to group `number`."""
        new = len(self.model.added)
        self.give_grad(new, grad)
        if number is None:
            group = {"params": [self.params[new]], **self.config.options(new)}
            torch.optim.Optimizer.add_param_group(Wrapper(self.optimizer), group)
        else:
            groups = self.optimizer.param_groups
            groups[number % len(groups)]["params"].append(self.params[new])

    def do_option(self, name: str, value: Any, index: int) -> None:
        """Change a hyper-parameter."""
        number, options = self.model.group_of[index], self.model.options(index)
        group = self.optimizer.param_groups[number]
        if name == "schedule":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that no optimizer step came before
                torch.optim.lr_scheduler.ExponentialLR(self.optimizer, value).step()
            for each in range(len(self.optimizer.param_groups)):
                self.model.groups[each] = {**self.model.groups[each], "lr": self.model.groups[each]["lr"] * value}
            return
        if name == "lr tensor":
            name, value = "lr", torch.tensor(value)
        group[name] = value
        self.model.groups[number] = {**options, name: float(value) if isinstance(value, Tensor) else value}

    def do_set_state(self, number: int, names: tuple[str, ...], index: int) -> None:
        known = {"step", "master", *self.model.state_names(index)}
        state = {name: state_value(self.config, index, number, name) for name in names if name in known}
        self.optimizer.set_full_state(self.params[index], dict(state))
        slot = self.model.slots[index]
        master, step = state.pop("master", slot.master), int(state.pop("step", torch.tensor(slot.step)))
        self.model.slots[index] = Slot(master, {**slot.state, **state}, step)

    def do_edit_state(self, how: str, name: str, factor: float, index: int) -> None:
        """Multiply this rank's part of a slot, or count two steps more, as code that knows torch's `state` does."""
        state, slot = self.optimizer.state[self.params[index]], self.model.slots[index]
        value = state[name] + 2 if name == "step" else state[name] * factor
        if how == "assign":
            state[name] = value
        elif how == "update":
            state.update({name: value})
        else:
            state[name].copy_(value)
        if name == "step":
            self.model.slots[index] = replace(slot, step=slot.step + 2)
        else:
            self.model.slots[index] = replace(slot, state={**slot.state, name: slot.state[name] * factor})

    def do_torch_state(self) -> None:
        """Load what torch's Adam would save: no masters, no loss scale, and nothing of parameters without a step."""
        model, full = self.model, self.optimizer.full_state_dict()
        kept = {"step", "exp_avg", "exp_avg_sq"}
        state = {
            number: {name: value for name, value in values.items() if name in kept}
            for number, values in full["state"].items()
            if values["step"]
        }
        own = {"lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay", "initial_lr", "params"}
        groups = [{key: value for key, value in group.items() if key in own} for group in full["param_groups"]]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for index in model.added:
            slot = model.slots[index]  # a master that rounds to its weight stays
            if not slot.step:
                model.slots[index] = fresh(slot.master, model.state_names(index))
        if model.alone and self.config.loss_scale is not None:
            model.is_leftover |= any(grad.value is not None for grad in model.grads)

    def do_write(self, how: str, index: int) -> None:
        """Write a weight, on all ranks."""
        model, param = self.model, self.params[index]
        model.num_writes += 1
        value = written(self.config, index, model.num_writes)
        with torch.no_grad():
            if how == "copy_":
                param.copy_(value)
            elif how == "data":
                param.data = value.clone()
            elif how == "transposed data":
                param.data = value.mT.contiguous().mT if value.dim() == 2 else value.clone()
            elif how == "behind its back":
                param.data.copy_(value)
                self.optimizer.refresh_fp32_params()
            elif how == "load_state_dict":
                self.module.load_state_dict({**self.module.state_dict(), str(index): value})
        model.slots[index] = replace(model.slots[index], master=value.float())

    def do_save(self, how: str) -> None:
        model = self.model
        if how == "state_dict":
            self.saved = copy.deepcopy(self.optimizer.state_dict())
        elif how == "bytes":
            self.saved = through_bytes(self.optimizer.state_dict())
        else:
            self.saved = self.optimizer.full_state_dict()
            model.join()
        model.saved = (
            {index: model.slots[index] for index in model.placed},
            dict(model.groups),
            model.scale,
            model.clean_steps,
        )

    def do_load(self) -> None:
        model = self.model
        self.optimizer.load_state_dict(copy.deepcopy(self.saved))
        assert model.saved is not None
        slots, model.groups, model.scale, model.clean_steps = model.saved
        for index, slot in slots.items():
            model.slots[index] = slot
        if model.alone and self.config.loss_scale is not None:  # a scale was loaded, even if it is the same
            model.is_leftover |= any(grad.value is not None for grad in model.grads)

    def do_rebuild(self, how: str, stage: int) -> None:
        """Replace the optimizer by one with other buckets, which loads its state."""
        model, config = self.model, self.config
        self.module.zero_grad()
        pool = multiprocessing.parent_process()
        assert pool is not None
        folder = Path(tempfile.gettempdir()) / f"pyzero-program-{pool.pid}"
        saved = None
        if how == "checkpoint":
            pyzero.save_checkpoint(folder, model=self.module, optimizer=self.optimizer, step=0)
        elif how == "full":
            saved = through_bytes(self.optimizer.full_state_dict())
        else:
            saved = copy.deepcopy(self.optimizer.state_dict())
        if how != "state_dict":
            model.join()
        del self.optimizer
        gc.collect()  # a scheduler's patch of step() makes a cycle
        self.config = replace(
            config, cap_mb=config.other_cap_mb, overlap=config.other_overlap, transport=config.other_transport
        )
        model.stage = stage
        self.optimizer = self.build(self.config)
        if how == "checkpoint":
            pyzero.load_checkpoint(folder, model=self.module, optimizer=self.optimizer)
            dist.barrier(self.group)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            self.optimizer.load_state_dict(saved)
        for index in model.added:
            model.put(index, None)
        model.forget()
        model.last_norm, model.idle = None, set()


def through_bytes(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict after torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file)
    return found
