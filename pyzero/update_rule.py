"""The interface of an update rule: its state, where its shards may be cut, and the update of one slice of a shard.

Buckets, whole-tensor access, checkpoints, the estimate and step() use a rule's slots, and know no rule by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyzero.sharding.layout import GRANULE, Cut

__all__ = ["Cut", "GradList", "Part", "RunShard", "StateSlot", "UpdateRule", "grad_and_offsets"]


class Values(Enum):
    """How many values a slot has."""

    PER_ELEMENT = auto()
    PER_GRANULE = auto()  # one per GRANULE elements, such as the scales of block-wise quantised moments


@dataclass(frozen=True)
class StateSlot:
    """A state tensor of each shard, zero at first. The optimizer itself keeps masters and step counts."""

    name: str  # in optimizer.state and in state dicts; torch's name if torch has the rule
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
        """View this parameter, in its shape, in a flat tensor of the RunShard. For rules with Cut.WHOLE."""
        return flat[self.begin : self.end].as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class RunShard:
    """Views of this rank's slice of neighbouring parameters in a bucket that share hyper-parameters."""

    group_index: int  # in optimizer.param_groups
    low: int  # elements of the rank's shard of the bucket
    high: int
    master: Tensor  # (high - low,) fp32
    weights: Tensor | None  # (high - low,) in the parameters' dtype, to write; None: the masters are the weights
    peer_weights: Sequence[Tensor]  # the same in other ranks' memory, if the rule `writes_peer_weights`
    state: dict[str, Tensor]  # by slot
    steps: Tensor  # (num_params,) fp32, of the bucket: steps applied, with this one
    segment_ids: Tensor  # ((high - low) / GRANULE,), rounded up, int32: the position of the parameter in the bucket
    parts: tuple[Part, ...]

    @property
    def weights_out(self) -> list[Tensor]:
        """The tensors that an update writes the weights to, beside the masters: `param_out` of an op."""
        return [*self.peer_weights] if self.weights is None else [self.weights, *self.peer_weights]

    def spread(self, values: Tensor) -> Tensor:
        """Give each element its parameter's value: (num_params,) of the bucket -> (high - low,)."""
        return values[self.segment_ids.long()].repeat_interleave(GRANULE)[: self.master.numel()]


class GradList(NamedTuple):
    """The gradients of a RunShard, each where it lies. An update leaves elements without a gradient alone."""

    tensors: Sequence[Tensor]  # contiguous, fp32 or in the parameters' dtype
    offsets: Sequence[int]  # where each begins, in elements of the RunShard: ascending multiples of GRANULE
    size: int  # elements of the RunShard

    def numel(self) -> int:
        """Return `size`, as a tensor over the whole RunShard would."""
        return self.size


def grad_and_offsets(grad: Tensor | GradList) -> tuple[Tensor | Sequence[Tensor], Sequence[int] | None]:
    """Return `grad` and `grad_offsets` of an op."""
    return (grad.tensors, grad.offsets) if isinstance(grad, GradList) else (grad, None)


class UpdateRule(Protocol):
    """A formula that updates weights from gradients."""

    name: str  # in state dicts, and of the range in a profile: pyzero::name
    slots: tuple[StateSlot, ...]
    cut: Cut
    reads_lists: bool  # `update` accepts a GradList. Otherwise gradients that lie apart are packed first
    writes_peer_weights: bool  # `update` writes `peer_weights` too. Otherwise the transport copies them afterwards

    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range, and TypeError if it is no number.

        Called before each step, so it must not read a GPU. The caller turns a KeyError into a ValueError.
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
            shard: The slice to update.
            grad: (high - low,) averaged over ranks, fp32 or in the parameters' dtype; or a GradList.
            group: The hyper-parameters.
            grad_scale: Factor for the gradient, from loss scale and clipping. A number or a 0-D fp32 tensor.
            found_inf: (1,) fp32. If it is not zero, write nothing.
            used: (num_params,) fp32. Parameters with 0 have no gradient: leave them alone.
            backend: Backend of the ops.
        """
