"""Make a state dict of this rank's shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from pyzero import memory
from pyzero.comm.group import Group
from pyzero.rank_state.notes import ZERO
from pyzero.rank_state.saved_cut import describe_tensor
from pyzero.sharding.buckets import STEP, Bucket
from pyzero.sharding.gather import gather_parts, part_lengths
from pyzero.sharding.local_param import LocalParam, box_of, user_param
from pyzero.sharding.param_buckets import ParamBuckets


def describe(
    rank: int, num_ranks: int, buckets: Sequence[Bucket], param_ids: dict[Tensor, int], has_learned: bool
) -> str:
    """Describe the rank of a state dict, and the buckets that its parts are cut from. A string: helpers keep it whole.

    param_ids: Numbers as in a state dict, which do not depend on when parameters were unfrozen.
    """
    cut = [[param_ids[user_param(param)] for param in bucket.params] for bucket in buckets]
    tensors = [[describe_tensor(bucket, at, num_ranks) for at in range(len(bucket.params))] for bucket in buckets]
    described = {"rank": rank, "num_ranks": num_ranks, "buckets": cut, "has_learned": has_learned, "tensors": tensors}
    return json.dumps(described)


def export_state(optimizer: Any, state_dict: dict[str, Any], param_buckets: ParamBuckets, group: Group) -> None:
    """Give the tensors of a torch state dict the parameters' shapes. With several ranks they become ShardedStates."""
    origin, same_params = state_dict["param_groups"][0][ZERO], optimizer._topology.same_params
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
    from pyzero.rank_state.sharded_state import DTensorPart, Fragment, ShardedState  # the import takes half a second

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
