"""A state dict that fits the optimizer, and its way into the buckets.

`state_dict()` has this rank's parts, and loads on as many ranks. Whole state, pyzero's or a torch optimizer's, loads on
any number.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from pyzero.arguments.groups import RESERVED, refuse_unsupported
from pyzero.comm.group import Group
from pyzero.ops.loss_scale import SCALE
from pyzero.rank_state.notes import RULE, SCALER, ZERO, master_steps, notes_of
from pyzero.rank_state.saved_cut import SavedCut, Summary, numbers_of
from pyzero.rank_state.saved_param import SavedParam
from pyzero.sharding.buckets import MASTER, STEP
from pyzero.sharding.gather import gather_parts, part_lengths
from pyzero.sharding.layout import BucketLayout
from pyzero.sharding.local_param import local_of
from pyzero.sharding.param_buckets import ParamBuckets

log = logging.getLogger("pyzero")


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
        numbers = numbers_of(optimizer, param_buckets)
        notes = notes_of(saved_groups[0])
        origin: str | None = notes.get(ZERO)
        found, param_ids, lengths = [], [], {}
        for param_id, (saved_id, param) in enumerate(zip(saved_ids, params, strict=True)):
            if param_id in numbers:
                values = state_dict["state"].get(saved_id, {})
                saved, its_origin = SavedParam.of(param, values, param_buckets.shapes_of(param))
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
            saved.check(param_buckets, lengths.get(numbers[param_id]), param_id)
        result = RankState(cut, ZERO in notes, found, param_ids, saved_groups, notes.get(SCALER))
        steps = master_steps(notes)
        if len(steps) == len(params):
            result._forget_old_masters(optimizer, steps, warns=rank == 0)
        return result

    def _forget_old_masters(self, optimizer: Optimizer, steps: list[float], warns: bool) -> None:
        """Drop stale masters. steps: The step counts at which all parameters' masters were saved, by param_id."""
        pairs = zip(self.param_ids, self.params, strict=True)
        forgotten = [saved.forget_old_master(steps[at], optimizer.state[saved.param][MASTER]) for at, saved in pairs]
        if any(forgotten) and warns:
            log.warning(
                "%d of the masters that were loaded are of an earlier step than their state, as torch's optimizers "
                "leave them; they follow the model's weights instead",
                sum(forgotten),
            )

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
                    group[key] = _copy_to(group.get(key), value) if isinstance(value, Tensor) else copy.deepcopy(value)


def _copy_to(present: Any, value: Tensor) -> Tensor:
    """Copy a tensor to the device of the present value, if that is a tensor too."""
    return value.to(present.device if isinstance(present, Tensor) else value.device, copy=True)


def check_form(state_dict: Any) -> None:
    """Raise ValueError unless it has the form of an optimizer's state dict."""
    got = f"keys {[*state_dict][:3]}" if isinstance(state_dict, dict) else f"{state_dict!r:.80}"
    if not isinstance(state_dict, dict) or not state_dict.keys() >= {"state", "param_groups"}:
        raise ValueError(
            f"expected an optimizer's state dict, of keys 'state' and 'param_groups', got {got}; "
            f"pass what state_dict() or full_state_dict() gave, whole on every rank"
        )
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, dict) or not all(isinstance(values, dict) for values in state.values()):
        raise ValueError(
            f"expected a dict of dicts at 'state' of a state dict, got {state!r:.80}; pass what state_dict() gave"
        )
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, dict) for group in groups):
        raise ValueError(
            f"expected a list of dicts at 'param_groups' of a state dict, got {groups!r:.80}; pass what state_dict() "
            f"gave"
        )


def _checked_groups(optimizer: Any, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the saved groups. Raise ValueError if they do not fit the optimizer."""
    saved: list[dict[str, Any]] = state_dict["param_groups"]
    rule = notes_of(saved[0]).get(RULE) if saved else None  # none in a torch optimizer's
    if not optimizer._takes_rule(rule):
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
        if not optimizer._is_of_rule(index, group):
            raise ValueError(
                f"expected options of the update rule that group {index} was built with, got another's; build the "
                f"groups as they were when saved"
            )
    return saved


def _check_origin(origin: dict[str, Any], rank: int, num_ranks: int) -> None:
    if (origin["rank"], origin["num_ranks"]) != (rank, num_ranks):
        raise ValueError(
            f"expected the state of rank {rank} of {num_ranks}, got that of rank {origin['rank']} of "
            f"{origin['num_ranks']}; have every rank save state_dict() to a file of its own, and load that one "
            f"on as many ranks, or use pyzero.save_checkpoint(), which loads on any number"
        )


def _lengths(layouts: list[BucketLayout], rank: int) -> dict[int, int]:
    bounds = {slot.number: layout.overlap(slot, rank) for layout in layouts for slot in layout.param_slots}
    return {index: high - low for index, (low, high) in bounds.items()}
