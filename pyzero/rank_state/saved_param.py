"""One parameter's values in a state dict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyzero.ops.rounding import ceil_div
from pyzero.sharding.buckets import MASTER, STEP
from pyzero.sharding.local_param import local_of
from pyzero.sharding.param_buckets import ParamBuckets
from pyzero.sharding.state_checks import check_step, check_values


@dataclass
class SavedParam:
    """One parameter's values in a state dict: each whole, or this rank's part of it."""

    param: Tensor
    whole: dict[str, Any] = field(default_factory=dict)  # with the step
    parts: dict[str, Tensor] = field(default_factory=dict)  # flat
    stride: tuple[int, ...] | None = None  # strides for the parts' memory order; None: the parameter's

    def forget_old_master(self, step: float, view: Tensor) -> bool:
        """Drop a stale master. torch's optimizers keep it unchanged while the state's step count grows.

        Args:
            step: The step count at which the master was saved; negative: unknown.
            view: The optimizer's own master. If the value is this memory, keep it: a checkpoint was read into it.

        Returns:
            Whether it was dropped.
        """
        master = self.whole.get(MASTER)
        if master is None or not 0 <= step < float(self.whole[STEP]) or local_of(master).data_ptr() == view.data_ptr():
            return False
        del self.whole[MASTER]
        return True

    def has(self, name: str) -> bool:
        """Whether it holds a value of that name."""
        return name in self.whole or name in self.parts

    @staticmethod
    def of(param: Tensor, values: dict[str, Any], shapes: dict[str, torch.Size]) -> tuple[SavedParam, str | None]:
        """Sort a parameter's values into whole ones and parts. Return these, and the parts' origin if they have one."""
        saved, origin = SavedParam(param), None
        for name, value in values.items():
            fragment = getattr(value, "fragment", None)
            if fragment is not None:
                saved.parts[name], origin = value._local_tensor, fragment.origin
            elif name in shapes and torch.is_tensor(value) and value.shape != shapes[name]:
                saved.parts[name] = value
            else:
                saved.whole[name] = value
        return saved, origin

    def check(self, param_buckets: ParamBuckets, length: int | None, param_id: int) -> None:
        """Raise ValueError if a value is missing or has another shape. length: Elements of this rank's part."""
        if not self.whole and not self.parts:
            return  # never updated, as in a torch optimizer
        shapes, rule = param_buckets.shapes_of(self.param), param_buckets.rule_of(self.param)
        for slot in rule.slots:
            if not self.has(slot.name):
                raise ValueError(
                    f"expected {slot.name} of parameter {param_id}, got none; load the state of an optimizer of the "
                    f"same kind"
                )
        unknown = {*self.whole, *self.parts} - {MASTER, STEP, *(slot.name for slot in rule.slots)}
        if unknown:
            raise ValueError(
                f"got {', '.join(sorted(unknown))} of parameter {param_id}, which the rule {rule.name} has not; "
                f"load the state of an optimizer of the same kind"
            )
        for name in shapes:
            if self.has(name):
                value = {**self.whole, **self.parts}[name]
                if not isinstance(value, Tensor):
                    raise ValueError(f"expected {name} of parameter {param_id} as a tensor, got {value!r:.80}")
                check_values(f"{name} of parameter {param_id}", value)
        per_value = {slot.name: slot.elements_per_value for slot in rule.slots}
        if self.stride is not None and ({*shapes} - {*self.parts} or any(each > 1 for each in per_value.values())):
            raise ValueError(
                f"expected parameter {param_id} with strides {self.stride}, in whose order its state was saved, got it "
                f"with {tuple(self.param.stride())}; build the model in the memory format in which it was saved"
            )
        for name, part in self.parts.items():
            wanted = None if length is None or name not in shapes else ceil_div(length, per_value.get(name, 1))
            if tuple(part.shape) != (wanted,):
                also = "" if wanted is None else f", or ({wanted},) of this rank"
                raise ValueError(
                    f"expected {name} of parameter {param_id} with shape {tuple(shapes.get(name, ()))}{also}, got "
                    f"{tuple(part.shape)}; load a state of the same parameters"
                )
        if not self.has(STEP):
            raise ValueError(f"expected a step count of parameter {param_id}, got none; load a whole state dict")
        check_step(f"the step count of parameter {param_id}", self.whole.get(STEP, 0))
