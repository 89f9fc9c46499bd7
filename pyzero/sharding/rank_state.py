"""Make state dicts from buckets, and load them into buckets.

`state_dict()` has this rank's parts, and loads on as many ranks. Whole state, pyzero's or a torch optimizer's, loads on
any number.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyzero import memory
from pyzero.arguments.groups import RESERVED, refuse_unsupported
from pyzero.comm.group import Group
from pyzero.ops.loss_scale import SCALE
from pyzero.ops.rounding import ceil_div
from pyzero.sharding.buckets import MASTER, STEP, Bucket
from pyzero.sharding.gather import gather_parts, part_lengths
from pyzero.sharding.layout import BucketLayout, lay_out
from pyzero.sharding.local_param import LocalParam, box_of, local_of, user_param
from pyzero.sharding.param_buckets import ParamBuckets

log = logging.getLogger("pyzero")

# Keys in the first parameter group, because torch.distributed.checkpoint's helpers drop keys beside groups and state.
# STEPS is in a full state dict: the step count of each master. torch leaves masters and STEPS unchanged.
ZERO, SCALER, RULE, STEPS = RESERVED


def describe(
    rank: int, num_ranks: int, buckets: Sequence[Bucket], param_ids: dict[Tensor, int], has_learned: bool
) -> str:
    """Describe the rank of a state dict, and the buckets that its parts are cut from. A string: helpers keep it whole.

    param_ids: Numbers as in a state dict, which do not depend on when parameters were unfrozen.
    """
    cut = [[param_ids[user_param(param)] for param in bucket.params] for bucket in buckets]
    tensors = [[_tensor(bucket, at, num_ranks) for at in range(len(bucket.params))] for bucket in buckets]
    described = {"rank": rank, "num_ranks": num_ranks, "buckets": cut, "has_learned": has_learned, "tensors": tensors}
    return json.dumps(described)


def _tensor(bucket: Bucket, position: int, num_ranks: int) -> list[Any]:
    """Return [shape, stride] of the tensor that a parameter's parts are cut from, and its offsets in a DTensor."""
    param = bucket.params[position]
    is_part = isinstance(param, LocalParam) and num_ranks > 1  # one rank has no parts
    offsets = [[*box_of(user_param(param))[1]]] if is_part else []
    return [[*bucket.flat_params.shapes[position]], [*bucket.strides[position]], *offsets]


def note_master_steps(group: dict[str, Any], steps: list[float]) -> None:
    """Note in the first group of a full state dict the step count of each master, by param_id; -1: no state."""
    group[STEPS] = json.dumps(steps)


def _notes(group: dict[str, Any]) -> dict[str, Any]:
    """Return the notes in the first group. Empty for a torch optimizer's, where a caller may use these names."""
    is_ours = isinstance(group.get(SCALER), Tensor) or isinstance(group.get(ZERO), str)
    return {key: group[key] for key in RESERVED if is_ours and key in group}


def _master_steps(group: dict[str, Any]) -> list[float]:
    """Return what `note_master_steps` has noted; empty if there is none."""
    try:
        steps = json.loads(group.get(STEPS, "[]"))
        return [float(step) for step in steps]
    except (TypeError, ValueError):
        return []


def export_state(optimizer: Any, state_dict: dict[str, Any], param_buckets: ParamBuckets, group: Group) -> None:
    """Give the tensors of a torch state dict the parameters' shapes. With several ranks they become ShardedStates."""
    origin, same_params = state_dict["param_groups"][0][ZERO], optimizer.same_params
    locations = param_buckets.locations
    for live, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for param, number in zip(live["params"], packed["params"], strict=True):
            if param in locations:
                values = state_dict["state"][number].items()
                state_dict["state"][number] = {
                    n: _shaped(n, v, *locations[param], group, origin, same_params) for n, v in values
                }
    for bucket in param_buckets.buckets:
        bucket.note_masters_exported()


def _shaped(
    name: str, local: Tensor, bucket: Bucket, position: int, group: Group, origin: str, same_params: bool
) -> Tensor:
    """Return this rank's part of a parameter's state as a part of the whole tensor, over the same memory."""
    if name == STEP:
        return local
    shape, param = bucket.whole_shape(name, position), bucket.params[position]
    is_part = isinstance(param, LocalParam) and not bucket.is_flat(name)
    if group.size == 1 or not shape.numel():
        own = local.view(shape) if bucket.is_flat(name) else bucket.shaped(local, position)
        if not is_part:
            return own
        # In its own storage: data_ptr() of a DTensor is its offset there, which torch's staging takes for an address.
        own = memory.alias(own) if own.storage_offset() else own
        return param.wrap(own)  # type: ignore[attr-defined,no-any-return]
    from pyzero.sharding.sharded_state import DTensorPart, Fragment, ShardedState  # half a second

    lengths = part_lengths(group.size, bucket, position, bucket.elements_per_value(name))
    low = sum(lengths[: group.rank])
    gather = partial(gather_parts, group, lengths=lengths)
    stride = bucket.whole_stride(name, position)
    is_copy = same_params and not bucket.layout.in_norm(position)
    fragment = Fragment(shape, stride, low, low + lengths[group.rank], origin, gather, is_copy=is_copy)
    if is_part:
        of = user_param(param)
        part = DTensorPart(of.shape, of.stride(), box_of(of)[1], param.wrap)  # type: ignore[attr-defined]
        fragment = replace(fragment, part=part)
    return ShardedState.wrap(local, fragment, group.mesh(local.device.type))


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


class SavedCut(NamedTuple):
    """The buckets that the parts of all ranks were cut from."""

    buckets: list[list[int]]  # param_ids: positions in all groups, one after the other
    has_learned: bool  # the buckets are in the order of arrival
    tensors: list[list[list[Any]]] | None  # see _tensor(); None: saved by a version without it

    def layouts(self, optimizer: Optimizer, param_buckets: ParamBuckets, num_ranks: int) -> list[BucketLayout]:
        """Return the buckets' layouts on `num_ranks` ranks.

        Raises:
            ValueError: Other parameters are trained now, or in other dtypes.
        """
        numbers, specs = _numbers(optimizer, param_buckets), param_buckets.specs
        found = [param_id for bucket in self.buckets for param_id in bucket]
        if sorted(found) != sorted(numbers):
            raise ValueError(
                f"expected the state of {len(specs)} trained parameters, got that of {len(found)}; freeze the same "
                f"ones as when it was saved"
            )
        members = [[specs[numbers[param_id]] for param_id in bucket] for bucket in self.buckets]
        if any(len({spec.key for spec in bucket}) != 1 for bucket in members):
            raise ValueError(
                "expected parameters in the dtypes in which they were saved, got others; convert the model before the "
                "optimizer is built"
            )
        return [lay_out(bucket, num_ranks) for bucket in members]

    def strides(self, optimizer: Optimizer, param_buckets: ParamBuckets, num_ranks: int) -> dict[int, tuple[int, ...]]:
        """Return the saved strides of parameters that have another memory order now, by param_id.

        Raises:
            ValueError: A parameter has another shape now, or is another part of a DTensor.
        """
        params = [param for group in optimizer.param_groups for param in group["params"]]
        found = {}
        for param_ids, tensors in zip(self.buckets, self.tensors or (), strict=self.tensors is not None):
            for param_id, saved in zip(param_ids, tensors, strict=True):
                mine = _tensor(*param_buckets.locations[params[param_id]], num_ranks)
                (shape, stride, *offsets), (my_shape, my_stride, *my_offsets) = saved, mine
                if (shape, offsets) != (my_shape, my_offsets):
                    raise ValueError(
                        f"expected the state of parameter {param_id} of shape {_spell_box(my_shape, my_offsets)}, "
                        f"got it of shape {_spell_box(shape, offsets)}; build the model and its groups as they were "
                        f"when saved"
                    )
                if _order(shape, stride) != _order(shape, my_stride):
                    found[param_id] = tuple(stride)
        return found


class Summary(NamedTuple):
    """What one rank's state dict must have in common with the others'."""

    steps: list[float]  # of each parameter
    cut: SavedCut | None  # None: only whole tensors; a part with all of its tensor counts as whole
    loss_scale: float | None
    reordered: list[int]  # param_ids of parts in another memory order


def agreed_cut(summaries: Sequence[Summary]) -> SavedCut | None:
    """Return the cut that all ranks' state dicts have in common; None if they hold only whole tensors.

    Raises:
        ValueError: They were saved at different times, were cut in different ways, or have different loss scales.
    """
    cuts = [summary.cut for summary in summaries]
    first = next((rank for rank, cut in enumerate(cuts) if cut is not None), 0)
    for rank, (steps, cut, loss_scale, reordered) in enumerate(summaries):
        differs = {
            "other steps": steps != summaries[0].steps,
            "other buckets": cut is not None and cut != cuts[first],
            "another loss scale": loss_scale != summaries[0].loss_scale,
            "other memory formats": reordered != summaries[0].reordered,
        }
        what = next((what for what, is_so in differs.items() if is_so), None)
        if what is not None:
            raise ValueError(
                f"expected state dicts that all ranks saved at once, got one of {what} on rank {rank}; load files of "
                f"one save"
            )
    return cuts[first]


@dataclass
class RankState:
    """A state dict that fits the optimizer."""

    cut: SavedCut | None  # the cut of its parts; None: whole tensors
    is_ours: bool
    params: list[SavedParam]
    param_ids: list[int]  # of these
    groups: list[dict[str, Any]]
    scaler: Tensor | None

    @staticmethod
    def parse(
        optimizer: Optimizer, state_dict: dict[str, Any], param_buckets: ParamBuckets, rank: int, num_ranks: int
    ) -> RankState:
        """Check a state dict against the optimizer, and change nothing.

        Raises:
            ValueError: It does not fit.
        """
        groups, saved_groups = optimizer.param_groups, _checked_groups(optimizer, state_dict)
        saved_ids = [saved_id for group in saved_groups for saved_id in group["params"]]
        params = [param for group in groups for param in group["params"]]
        numbers = _numbers(optimizer, param_buckets)
        notes = _notes(saved_groups[0])
        origin: str | None = notes.get(ZERO)
        found, param_ids, lengths = [], [], {}
        for param_id, (saved_id, param) in enumerate(zip(saved_ids, params, strict=True)):
            if param_id in numbers:
                saved, its_origin = _sort(param, state_dict["state"].get(saved_id, {}), param_buckets.shapes_of(param))
                origin = its_origin or origin
                found.append(saved)
                param_ids.append(param_id)
        cut = None
        described = {} if origin is None else json.loads(origin)
        if described and any(saved.parts for saved in found):
            _check_origin(described, rank, num_ranks)
            cut = SavedCut(described["buckets"], described["has_learned"], described.get("tensors"))
            lengths = _lengths(cut.layouts(optimizer, param_buckets, num_ranks), rank)
            strides = cut.strides(optimizer, param_buckets, num_ranks)
            for param_id, saved in zip(param_ids, found, strict=True):
                saved.stride = strides.get(param_id)
        for param_id, saved in zip(param_ids, found, strict=True):
            _check(saved, param_buckets, lengths.get(numbers[param_id]), param_id)
        steps = _master_steps(notes)
        pairs = zip(param_ids, found, strict=True) if len(steps) == len(params) else ()
        forgotten = [saved.forget_old_master(steps[at], optimizer.state[saved.param][MASTER]) for at, saved in pairs]
        if any(forgotten) and rank == 0:
            log.warning(
                "%d of the masters that were loaded are of an earlier step than their state, as torch's optimizers "
                "leave them; they follow the model's weights instead",
                sum(forgotten),
            )
        return RankState(cut, ZERO in notes, found, param_ids, saved_groups, notes.get(SCALER))

    def summary(self) -> Summary:
        """Return this rank's summary, for agreed_cut()."""
        steps = [float(saved.whole.get(STEP, 0.0)) for saved in self.params]
        scale = None if self.scaler is None else float(self.scaler[SCALE])
        reordered = [at for at, saved in zip(self.param_ids, self.params, strict=True) if saved.stride is not None]
        return Summary(steps, self.cut, scale, reordered)

    def forget_unloaded_masters(self, optimizer: Optimizer, param_buckets: ParamBuckets) -> None:
        """Drop masters that no checkpoint was read into, so that they follow the weights.

        These are the optimizer's own memory, as `state_dict()` returned it, and nothing was written into it since.
        """
        for saved in self.params:
            view, values = optimizer.state[saved.param][MASTER], {**saved.whole, **saved.parts}
            if MASTER in values and local_of(values[MASTER]).data_ptr() == view.data_ptr() and view.numel():
                bucket, _ = param_buckets.locations[saved.param]
                if not bucket.masters_were_written():
                    saved.whole.pop(MASTER, None)
                    saved.parts.pop(MASTER, None)

    def reorder(self, param_buckets: ParamBuckets, group: Group) -> None:
        """Cut parts again in the parameters' own memory order, one whole tensor at a time. Collective if any differ.

        The optimizer's buckets must be those of the saved state.
        """
        for saved in self.params:
            if saved.stride is None:
                continue
            bucket, position = param_buckets.locations[saved.param]
            lengths, (_, in_param) = part_lengths(group.size, bucket, position), bucket.shard_part(position)
            for name in bucket.state_names:
                own = saved.parts[name].to(bucket.device, bucket.sharded(name).dtype)
                flat = gather_parts(group, own, lengths)
                whole = flat.as_strided(bucket.flat_params.shapes[position], saved.stride)
                saved.parts[name] = bucket.flat_of(whole, position)[in_param].clone()

    def copy_into(self, optimizer: Any) -> None:
        """Write it to the optimizer's state and groups. The buckets must be those of the saved state."""
        for saved in self.params:
            views = optimizer.state[saved.param]
            for name, part in saved.parts.items():
                views[name].as_strided(part.shape, (1,)).copy_(part)  # flat, where the view has the parameter's shape
            if saved.whole:
                optimizer.set_full_state(saved.param, {n: saved.whole[n] for n in views if n in saved.whole})
            elif not saved.parts:
                for name, view in views.items():
                    if name != MASTER:
                        view.zero_()
        for group, saved_group in zip(optimizer.param_groups, self.groups, strict=True):
            for key, value in saved_group.items():
                is_foreign = key == "decoupled_weight_decay" and not self.is_ours
                if key not in ("params", *RESERVED) and not is_foreign:
                    group[key] = value.clone() if isinstance(value, Tensor) else value


def _checked_groups(optimizer: Any, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the saved groups. Raise ValueError if they do not fit the optimizer."""
    if not state_dict.keys() >= {"state", "param_groups"}:
        raise ValueError(
            f"expected an optimizer's state dict, of keys 'state' and 'param_groups', got keys "
            f"{[*state_dict][:3]}; pass what state_dict() or full_state_dict() gave, whole on every rank"
        )
    saved: list[dict[str, Any]] = state_dict["param_groups"]
    rule = _notes(saved[0]).get(RULE) if saved else None  # none in a torch optimizer's
    if not optimizer.takes_rule(rule):
        raise ValueError(
            f"expected the state of the update rule {optimizer.rule_name}, got that of {rule}; load it into an "
            f"optimizer of the same kind"
        )
    wanted_sizes = [len(group["params"]) for group in optimizer.param_groups]
    sizes = [len(group["params"]) for group in saved]
    if sizes != wanted_sizes:
        raise ValueError(
            f"expected groups of {wanted_sizes} parameters, got {sizes}; build the optimizer as it was when saved"
        )
    for index, group in enumerate(saved):
        refuse_unsupported(group)
        if not optimizer.is_of_rule(index, group):
            raise ValueError(
                f"expected options of the update rule that group {index} was built with, got another's; build the "
                f"groups as they were when saved"
            )
    return saved


def _sort(param: Tensor, values: dict[str, Any], shapes: dict[str, torch.Size]) -> tuple[SavedParam, Any]:
    """Sort one parameter's values into whole ones and parts. Return these, and the parts' origin if they have one."""
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


def _order(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Return the strides that determine the memory order. They are equal for equal orders."""
    return [step for size, step in zip(shape, stride, strict=True) if size != 1] if 0 not in shape else []


def _spell_box(shape: Sequence[int], offsets: Sequence[Sequence[int]]) -> str:
    return f"{tuple(shape)}" + "".join(f" at {tuple(of_dtensor)} of its DTensor" for of_dtensor in offsets)


def _check_origin(origin: dict[str, Any], rank: int, num_ranks: int) -> None:
    if (origin["rank"], origin["num_ranks"]) != (rank, num_ranks):
        raise ValueError(
            f"expected the state of rank {rank} of {num_ranks}, got that of rank {origin['rank']} of "
            f"{origin['num_ranks']}; have every rank save state_dict() to a file of its own, and load that one "
            f"on as many ranks, or use pyzero.save_checkpoint(), which loads on any number"
        )


def _numbers(optimizer: Optimizer, param_buckets: ParamBuckets) -> dict[int, int]:
    """Return the number of each trained parameter, by param_id."""
    numbers = {user_param(param): number for number, param in enumerate(param_buckets.params)}
    params = (param for group in optimizer.param_groups for param in group["params"])
    return {param_id: numbers[param] for param_id, param in enumerate(params) if param in numbers}


def _lengths(layouts: list[BucketLayout], rank: int) -> dict[int, int]:
    bounds = {slot.number: layout.overlap(slot, rank) for layout in layouts for slot in layout.param_slots}
    return {index: high - low for index, (low, high) in bounds.items()}


def _check(saved: SavedParam, param_buckets: ParamBuckets, length: int | None, param_id: int) -> None:
    """Raise ValueError if a value is missing or has another shape. length: Elements of this rank's part."""
    if not saved.whole and not saved.parts:
        return  # never updated, as in a torch optimizer
    shapes, rule = param_buckets.shapes_of(saved.param), param_buckets.rule_of(saved.param)
    for slot in rule.slots:
        if not saved.has(slot.name):
            raise ValueError(
                f"expected {slot.name} of parameter {param_id}, got none; load the state of an optimizer of the same "
                f"kind"
            )
    unknown = {*saved.whole, *saved.parts} - {MASTER, STEP, *(slot.name for slot in rule.slots)}
    if unknown:
        raise ValueError(
            f"got {', '.join(sorted(unknown))} of parameter {param_id}, which the rule {rule.name} has not; "
            f"load the state of an optimizer of the same kind"
        )
    for name in shapes:
        if saved.has(name) and not isinstance({**saved.whole, **saved.parts}[name], Tensor):
            raise ValueError(f"expected {name} of parameter {param_id} as a tensor, got {saved.whole[name]!r:.80}")
    per_value = {slot.name: slot.elements_per_value for slot in rule.slots}
    if saved.stride is not None and ({*shapes} - {*saved.parts} or any(each > 1 for each in per_value.values())):
        raise ValueError(
            f"expected parameter {param_id} with strides {saved.stride}, in whose order its state was saved, got it "
            f"with {tuple(saved.param.stride())}; build the model in the memory format in which it was saved"
        )
    for name, part in saved.parts.items():
        wanted = None if length is None or name not in shapes else ceil_div(length, per_value.get(name, 1))
        if tuple(part.shape) != (wanted,):
            also = "" if wanted is None else f", or ({wanted},) of this rank"
            raise ValueError(
                f"expected {name} of parameter {param_id} with shape {tuple(shapes.get(name, ()))}{also}, got "
                f"{tuple(part.shape)}; load a state of the same parameters"
            )
    if not saved.has(STEP):
        raise ValueError(f"expected a step count of parameter {param_id}, got none; load a whole state dict")
