"""Loading: this rank's state on as many ranks; whole state, ours or a torch optimizer's, on any number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyzero.buckets import MASTER, STEP
from pyzero.layout import BucketLayout, Cut, ParamSpec, lay_out
from pyzero.placement import Placement

ZERO = "zero"  # in the first group, which is what torch.distributed.checkpoint's helpers pass on


def describe(rank: int, num_ranks: int, buckets: list[list[int]], has_learned: bool) -> dict[str, Any]:
    """Whose a state dict is, and where its fragments are cut. Plain data."""
    return {"rank": rank, "num_ranks": num_ranks, "buckets": buckets, "has_learned": has_learned}


@dataclass
class RankState:
    """A state dict that has been found to fit."""

    layouts: list[BucketLayout] | None  # that its fragments are of; None: whole tensors
    has_learned: bool  # the buckets are in the order of arrival
    values: list[tuple[Tensor, dict[str, Any]]]  # (parameter, its saved state)
    groups: list[dict[str, Any]]
    scaler: Tensor | None

    @staticmethod
    def parse(
        optimizer: Optimizer, state_dict: dict[str, Any], placement: Placement, rank: int, num_ranks: int
    ) -> RankState:
        """Hold a state dict against the optimizer, and change nothing.

        Raises:
            ValueError: It does not fit.
        """
        groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
        wanted_sizes = [len(group["params"]) for group in groups]
        sizes = [len(group["params"]) for group in saved_groups]
        if sizes != wanted_sizes:
            raise ValueError(
                f"expected groups of {wanted_sizes} parameters, got {sizes}; build the optimizer as it was when saved"
            )
        zero = saved_groups[0].get(ZERO)
        layouts = None
        if zero is not None:
            if (zero["rank"], zero["num_ranks"]) != (rank, num_ranks):
                raise ValueError(
                    f"expected the state of rank {rank} of {num_ranks}, got that of rank {zero['rank']} of "
                    f"{zero['num_ranks']}; have every rank save state_dict() to a file of its own, and load that one "
                    f"on as many ranks, or save full_state_dict(), which loads on any number"
                )
            layouts = _layouts(zero["buckets"], placement.specs, num_ranks, placement.rule.cut)
        ids = [i for group in saved_groups for i in group["params"]]
        params = [param for group in groups for param in group["params"]]
        lengths = {} if layouts is None else _lengths(layouts, rank)
        per_value = {slot.name: slot.elements_per_value for slot in placement.rule.slots}
        numbers = {param: number for number, param in enumerate(placement.params)}
        values = []
        for place, (i, param) in enumerate(zip(ids, params, strict=True)):
            if param not in numbers:
                continue
            saved = state_dict["state"].get(i, {})
            if layouts is not None:
                length = lengths[numbers[param]]
                _check(saved, {MASTER: (length,), **{n: (-(-length // per),) for n, per in per_value.items()}}, place)
            elif saved:
                names = {**per_value, **({MASTER: 1} if MASTER in saved else {})}
                flat = {n: (-(-param.numel() // per),) for n, per in names.items()}
                _check(saved, {n: tuple(param.shape) if names[n] == 1 else flat[n] for n in names}, place)
            values.append((param, saved))
        return RankState(layouts, bool(zero and zero["has_learned"]), values, saved_groups, state_dict.get("scaler"))

    def copy_into(self, optimizer: Any) -> None:
        """Into the optimizer's state and groups, whose layout is that of the saved one by now."""
        for param, saved in self.values:
            views = optimizer.state[param]
            if self.layouts is not None:
                for name, view in views.items():
                    view.copy_(torch.as_tensor(saved[name], device=view.device))
            elif saved:
                optimizer.set_full_state(param, {name: saved[name] for name in views if name in saved})
            else:
                for name, view in views.items():
                    if name != MASTER:
                        view.zero_()
        for group, saved_group in zip(optimizer.param_groups, self.groups, strict=True):
            for key, value in saved_group.items():
                if key not in ("params", ZERO) and (key != "decoupled_weight_decay" or self.layouts is not None):
                    group[key] = value.clone() if isinstance(value, Tensor) else value


def _layouts(buckets: list[list[int]], specs: Sequence[ParamSpec], num_ranks: int, cut: Cut) -> list[BucketLayout]:
    found = [number for bucket in buckets for number in bucket]
    if sorted(found) != list(range(len(specs))):
        raise ValueError(
            f"expected the state of {len(specs)} trained parameters, got that of {len(found)}; freeze the same ones as "
            f"when it was saved"
        )
    mixed = [bucket for bucket in buckets if len({specs[number].key for number in bucket}) != 1]
    if mixed:
        raise ValueError(
            "expected parameters in the dtypes in which they were saved, got others; convert the model before the "
            "optimizer is built"
        )
    return [lay_out([specs[number] for number in bucket], num_ranks, cut) for bucket in buckets]


def _lengths(layouts: list[BucketLayout], rank: int) -> dict[int, int]:
    bounds = {slot.index: layout.overlap(slot, rank) for layout in layouts for slot in layout.slots}
    return {index: high - low for index, (low, high) in bounds.items()}


def _check(saved: dict[str, Any], shapes: dict[str, tuple[int, ...]], place: int) -> None:
    for name, shape in shapes.items():
        got = tuple(saved[name].shape) if name in saved else None
        if got != shape:
            raise ValueError(
                f"expected {name} of parameter {place} with shape {shape}, got {got}; "
                f"load the file of the same rank, saved by as many ranks, into an optimizer of the same parameters"
            )
    if STEP not in saved:
        raise ValueError(f"expected a step count of parameter {place}, got none; load a whole state dict")
