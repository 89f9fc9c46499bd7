"""The interface of an update rule: its state, where its shards may be cut, and the update of one slice of a shard.

Buckets, whole-tensor access, checkpoints, the estimate and step() go by a rule's slots, and know no rule by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyzero.sharding.layout import GRANULE, Cut

__all__ = ["Cut", "GradList", "Part", "RunShard", "StateSlot", "UpdateRule"]


class Values(Enum):
    """How many values a slot has."""

    PER_ELEMENT = auto()
    PER_GRANULE = auto()  # one for each GRANULE elements, as block-wise quantised moments keep their scales


@dataclass(frozen=True)
class StateSlot:
    """A tensor of state for each shard, zero at first. The optimizer itself keeps masters and step counts."""

    name: str  # in optimizer.state and in state dicts; torch's name where torch has the rule
    dtype: torch.dtype = torch.float32
    values: Values = Values.PER_ELEMENT

    @property
    def elements_per_value(self) -> int:
        """1, or GRANULE."""
        return GRANULE if self.values is Values.PER_GRANULE else 1


@dataclass(frozen=True)
class Part:
    """The part of one parameter that a RunShard holds."""

    position: int  # of the parameter in its bucket
    begin: int  # elements of the RunShard
    end: int
    shape: torch.Size  # of the whole parameter
    strides: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        """The parameter, in its shape, of a tensor over the RunShard: for rules with Cut.WHOLE."""
        return flat[self.begin : self.end].as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class RunShard:
    """Views of this rank's slice of neighbouring parameters in a bucket that share hyper-parameters."""

    group_index: int  # in optimizer.param_groups
    low: int  # elements of the rank's shard of the bucket
    high: int
    master: Tensor  # (high - low,) fp32
    weights: Tensor | None  # (high - low,) in the parameters' dtype, to be written; None: the masters are the weights
    peer_weights: Sequence[Tensor]  # the same in other ranks' memory, for a rule that `writes_peer_weights`
    state: dict[str, Tensor]  # by slot
    steps: Tensor  # (num_params,) fp32, of the bucket: steps applied, this one counted
    segment_ids: Tensor  # ((high - low) / GRANULE,), rounded up, int32: the position of the parameter in the bucket
    parts: tuple[Part, ...]

    @property
    def weights_out(self) -> list[Tensor]:
        """All that is to hold the updated weights, beside the masters: `param_out` of an op."""
        return [*self.peer_weights] if self.weights is None else [self.weights, *self.peer_weights]

    def spread(self, values: Tensor) -> Tensor:
        """(num_params,) of the bucket -> (high - low,): each element its parameter's."""
        return values[self.segment_ids.long()].repeat_interleave(GRANULE)[: self.master.numel()]


class GradList(NamedTuple):
    """The gradients of a RunShard, each where it is; what none of them covers is to be left alone."""

    tensors: Sequence[Tensor]  # contiguous, fp32 or in the parameters' dtype
    offsets: Sequence[int]  # where each begins, in elements of the RunShard: ascending multiples of GRANULE
    size: int  # elements of the RunShard

    def numel(self) -> int:
        """As a tensor's over all of it."""
        return self.size


class UpdateRule(Protocol):
    """One way of updating weights from gradients."""

    name: str  # of the range in a profile: pyzero::name
    slots: tuple[StateSlot, ...]
    cut: Cut
    reads_lists: bool  # `update` takes a GradList too. Otherwise gradients are packed for it, where they lie apart
    writes_peer_weights: bool  # `update` writes `peer_weights` too. Otherwise weights are copied there after it

    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError where a group's hyper-parameters are out of range, TypeError where they are no numbers.

        Called before each step: reads no GPU. A KeyError where the group lacks one becomes a ValueError that names it.
        """

    def update(
        self,
        shard: RunShard,
        grad: Any,
        group: dict[str, Any],
        *,
        grad_scale: float | Tensor,
        found_inf: Tensor,
        used: Tensor,
        backend: str,
    ) -> None:
        """Write masters, weights and state of one slice.

        Args:
            shard: What to update.
            grad: (high - low,) averaged over ranks, fp32 or in the parameters' dtype; or a GradList.
            group: The hyper-parameters.
            grad_scale: Multiplies the gradient: loss scale and clipping. A number or a 0-D fp32 tensor.
            found_inf: (1,) fp32; where it is not zero nothing may be written.
            used: (num_params,) fp32; parameters with 0 have no gradient and stay as they are.
            backend: Of the ops.
        """
