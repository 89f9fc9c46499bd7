"""How the parts in the state dicts of all ranks are cut from whole tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.optim import Optimizer

from pyzero.sharding.buckets import Bucket
from pyzero.sharding.layout import BucketLayout, lay_out
from pyzero.sharding.local_param import LocalParam, box_of, user_param
from pyzero.sharding.param_buckets import ParamBuckets


class SavedCut(NamedTuple):
    """The buckets that the parts of all ranks were cut from."""

    buckets: list[list[int]]  # param_ids: positions in all groups, one after the other
    has_learned: bool  # the buckets are in the order of arrival
    tensors: list[list[list[Any]]] | None  # see describe_tensor(); None: saved by a version without it

    def layouts(self, optimizer: Optimizer, param_buckets: ParamBuckets, num_ranks: int) -> list[BucketLayout]:
        """Return the buckets' layouts on `num_ranks` ranks.

        Raises:
            ValueError: Other parameters are trained now, or in other dtypes.
        """
        numbers, specs = numbers_of(optimizer, param_buckets), param_buckets.specs
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
                mine = describe_tensor(*param_buckets.locations[params[param_id]], num_ranks)
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


def describe_tensor(bucket: Bucket, position: int, num_ranks: int) -> list[Any]:
    """Return [shape, stride] of the tensor that a parameter's parts are cut from, and its offsets in a DTensor."""
    param = bucket.params[position]
    is_part = isinstance(param, LocalParam) and num_ranks > 1  # one rank has no parts
    offsets = [[*box_of(user_param(param))[1]]] if is_part else []
    return [[*bucket.flat_params.shapes[position]], [*bucket.strides[position]], *offsets]


def numbers_of(optimizer: Optimizer, param_buckets: ParamBuckets) -> dict[int, int]:
    """Return the number of each trained parameter, by param_id."""
    numbers = {user_param(param): number for number, param in enumerate(param_buckets.params)}
    params = (param for group in optimizer.param_groups for param in group["params"])
    return {param_id: numbers[param] for param_id, param in enumerate(params) if param in numbers}


def _order(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Return the strides that determine the memory order. They are equal for equal orders."""
    return [step for size, step in zip(shape, stride, strict=True) if size != 1] if 0 not in shape else []


def _spell_box(shape: Sequence[int], offsets: Sequence[Sequence[int]]) -> str:
    return f"{tuple(shape)}" + "".join(f" at {tuple(of_dtensor)} of its DTensor" for of_dtensor in offsets)
