"""Buckets: the flat memory that parameters, masters, moments and gradient shards live in."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyzero import memory, ops
from pyzero.comm import Group
from pyzero.layout import GRANULE, BucketLayout, Slot

NO_SUSPECT = math.inf  # in place of the code of a bad parameter


class _Piece(NamedTuple):
    """A part of a bucket: elements [begin, end) of the parameter at `position`, or the gap behind it."""

    offset: int
    position: int
    begin: int
    end: int
    zeros: Tensor | None  # what a gap is filled with


def in_memory_order(grad: Tensor, param: Tensor) -> Tensor:
    """(numel,) elements of a tensor in the memory order of its parameter; a view where the strides agree."""
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return grad.as_strided((grad.numel(),), (1,))


def _sparse_error(param: Tensor) -> TypeError:
    return TypeError(
        f"expected dense gradients, got a sparse one for the parameter of shape {tuple(param.shape)}; "
        f"build its embedding with sparse=False"
    )


class Bucket:
    """The memory of one bucket on this rank."""

    def __init__(self, layout: BucketLayout, params: list[Tensor], group: Group, index: int, first_param: int) -> None:
        self.layout = layout
        self.index = index  # among the optimizer's buckets
        self.first_param = first_param  # parameters in the buckets before this one
        self.group_index: int = layout.key.group_index  # of the optimizer's param_groups
        self.counts: bool = layout.key.counts  # for the norm; not where another model-parallel rank has the same
        self.params = params  # in the order of layout.slots
        self._rank = group.rank
        begin, end = layout.shard_bounds(group.rank)
        dtype, self.device = params[0].dtype, params[0].device
        self.flat = memory.zeros(layout.numel, dtype, self.device)  # what the parameters are views of
        self._move_in()
        group.broadcast(self.flat)

        self.own = self.flat[begin:end]  # (shard_numel,) this rank's part of the weights
        self.is_master = dtype == torch.float32  # fp32 weights are their own masters
        self.master = self.own if self.is_master else self._shard_empty().copy_(self.own)  # (shard_numel,) fp32
        self.exp_avg = memory.zeros(layout.shard_numel, torch.float32, self.device)  # (shard_numel,)
        self.exp_avg_sq = memory.zeros(layout.shard_numel, torch.float32, self.device)  # (shard_numel,)
        self.steps = torch.zeros(len(params), device=self.device)  # (num_params,) applied steps of each parameter
        self.segment_ids = self._segment_ids(group.rank)  # (shard_numel / GRANULE,) int32, position of the parameter

        self.shard: Tensor | None = None  # (shard_numel,) fp32 gradient, averaged over ranks, unscaled
        self.sumsq = torch.zeros(1, dtype=torch.float64, device=self.device)  # of the shard
        self.used = [False] * len(params)  # which had a gradient on this rank
        self.partial: Tensor | None = None  # (numel,) fp32 sum of earlier backwards that were not sent
        self._carried: set[int] = set()  # positions of the parameters in it
        self._cuts: dict[tuple[int, int], list[_Piece]] = {}

    def _move_in(self) -> None:
        """Make each parameter a view of the flat buffer; its own memory is freed one parameter at a time."""
        self.versions: list[int] = []
        self._addresses: list[int] = []
        for slot, param in zip(self.layout.slots, self.params, strict=True):
            param.data = self._view(slot, param).copy_(param.data)
            self.versions.append(param._version)
            self._addresses.append(param.data_ptr())

    def _shard_empty(self) -> Tensor:
        return memory.empty(self.layout.shard_numel, torch.float32, self.device)

    def _view(self, slot: Slot, param: Tensor) -> Tensor:
        strides = torch.empty_like(param.data, device="meta").stride()  # param's own where it is dense
        return self.flat[slot.offset : slot.offset + slot.numel].as_strided(
            param.shape, strides, self.flat.storage_offset() + slot.offset
        )

    def _segment_ids(self, rank: int) -> Tensor:
        runs = self.layout.granule_owners(rank)
        positions = torch.tensor([position for position, _ in runs], dtype=torch.int32)
        counts = torch.tensor([count for _, count in runs], dtype=torch.int64)
        return positions.repeat_interleave(counts).to(self.device)

    def _cut(self, low: int, high: int) -> list[_Piece]:
        """What lies in [low, high) of the bucket, in order: parts of parameters, and the gaps behind them."""
        if (low, high) in self._cuts:
            return self._cuts[low, high]
        pieces = []
        stops = [slot.offset for slot in self.layout.slots[1:]] + [self.layout.numel]
        for position, (slot, stop) in enumerate(zip(self.layout.slots, stops, strict=True)):
            gap_at = slot.offset + slot.numel
            begin, end = max(low, slot.offset), min(high, gap_at)
            if begin < end:
                pieces.append(_Piece(begin - low, position, begin - slot.offset, end - slot.offset, None))
            begin, end = max(low, gap_at), min(high, stop)
            if begin < end:
                zeros = torch.zeros(end - begin, dtype=self.flat.dtype, device=self.device)
                pieces.append(_Piece(begin - low, position, 0, 0, zeros))
        self._cuts[low, high] = pieces
        return pieces

    def adopt_writes(self, every: bool = False) -> int:
        """Follow parameters that someone else wrote, or moved elsewhere, or all; returns how many."""
        num_written = 0
        for position, param in enumerate(self.params):
            moved = param.data_ptr() != self._addresses[position]
            if param._version == self.versions[position] and not moved and not every:
                continue
            if moved:
                param.data = self._view(self.layout.slots[position], param).copy_(param.data)
            self.versions[position] = param._version
            if not self.is_master:
                here, _ = self.own_part(position)
                master, weights = self.master[here], self.own[here]
                # What the master rounds to is no news: a checkpoint's weights may be loaded behind its masters.
                master.copy_(torch.where(master.to(weights.dtype) == weights, master, weights.float()))
            num_written += 1
        return num_written

    def know_all_writes(self) -> None:
        """The weights are what the masters say: whatever was written before is no news."""
        self.versions = [param._version for param in self.params]

    def own_part(self, position: int) -> tuple[slice, slice]:
        """Where one parameter's part on this rank lies: in the shard, and in the parameter."""
        slot = self.layout.slots[position]
        low, high = self.layout.overlap(slot, self._rank)
        at = slot.offset - self._rank * self.layout.shard_numel if high > low else -low
        return slice(at + low, at + high), slice(low, high)

    def shaped(self, flat: Tensor, position: int) -> Tensor:
        """A parameter of its own shape and strides out of (numel,) `flat`, laid out as the bucket is."""
        slot, param = self.layout.slots[position], self.params[position]
        return flat.as_strided(param.shape, param.stride(), flat.storage_offset() + slot.offset).clone()

    def as_flat(self, tensor: Tensor, position: int) -> Tensor:
        """(numel,) elements of a tensor of a parameter's shape, in the parameter's memory order."""
        return in_memory_order(tensor, self.params[position])

    def state_views(self, position: int) -> dict[str, Tensor]:
        """This rank's part of one parameter's state, as flat views."""
        part, _ = self.own_part(position)
        return {
            "step": self.steps[position],
            "exp_avg": self.exp_avg[part],
            "exp_avg_sq": self.exp_avg_sq[part],
            "master": self.master[part],
        }

    def gradients(self, low: int, high: int) -> tuple[list[Tensor], list[int]]:
        """The pieces of `.grad` in [low, high) of the bucket, zeros for the gaps, and their offsets from low.

        A parameter without a gradient is left out: what lies there is not defined.
        """
        grads = [self._gradient(position) for position in range(len(self.params))]
        self.used = [used or grad is not None for used, grad in zip(self.used, grads, strict=True)]
        pieces: list[Tensor] = []
        offsets: list[int] = []
        for offset, position, begin, end, zeros in self._cut(low, high):
            piece = zeros
            if piece is None:
                grad, param = grads[position], self.params[position]
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    raise _sparse_error(param)
                is_flat = grad.dim() == 1 or (grad.is_contiguous() and param.is_contiguous())
                piece = grad if is_flat and grad.is_contiguous() else in_memory_order(grad, param)
                if end - begin != grad.numel():
                    piece = piece.view(-1)[begin:end]
            pieces.append(piece)
            offsets.append(offset)
        return pieces, offsets

    def suspect(self, slices: list[Tensor], num_ranks: int, by_rank: bool) -> Tensor:
        """(1,) fp64: the code of the first parameter in this shard of which a rank sent an inf or a NaN.

        A code is the parameter's number times (num_ranks + 1) plus the rank, which is num_ranks where it is not known.
        """
        codes = []
        for rank, piece in enumerate(slices):
            bad = ~torch.isfinite(piece).view(-1, GRANULE).all(1)
            code = (self.segment_ids.double() + self.first_param) * (num_ranks + 1)
            codes.append((code + (rank if by_rank else num_ranks)).masked_fill_(~bad, NO_SUSPECT).min())
        return torch.stack(codes).min().reshape(1)

    def suspect_in_grads(self, rank: int, num_ranks: int) -> Tensor:
        """0-D fp64: the same of this rank's `.grad`."""
        codes = torch.full((len(self.params) + 1,), NO_SUSPECT, dtype=torch.float64, device=self.device)
        for position in range(len(self.params)):
            grad = self._gradient(position)
            if grad is not None:
                code = float((self.first_param + position) * (num_ranks + 1) + rank)
                codes[position].masked_fill_(~torch.isfinite(grad).all(), code)
        return codes.min()

    def carry(self, position: int) -> None:
        """Move a 16-bit `.grad` into the fp32 sum, before the next backward would round its own to it."""
        param = self.params[position]
        if param.grad is None:
            return
        if self.partial is None:
            self.partial = memory.zeros(self.layout.numel, torch.float32, self.device)
        self._carried.add(position)
        self._partial_view(position).add_(in_memory_order(param.grad, param))
        param.grad = None

    def _partial_view(self, position: int) -> Tensor:
        assert self.partial is not None
        slot = self.layout.slots[position]
        return self.partial[slot.offset : slot.offset + slot.numel]

    def flat_grad(self, position: int) -> Tensor | None:
        """(numel,) all that this rank has of a parameter's gradient, in memory order, or None."""
        grad = self._gradient(position)
        return None if grad is None else in_memory_order(grad, self.params[position]).view(-1)

    def _gradient(self, position: int) -> Tensor | None:
        """All that this rank has of a parameter's gradient: `.grad`, or the fp32 sum with it."""
        if position not in self._carried:
            return self.params[position].grad
        self.carry(position)
        return self._partial_view(position)

    def forget_partial(self) -> None:
        """Free the fp32 sum: it was sent, or zeroed."""
        self.partial = None
        self._carried.clear()

    def pack(self, low: int, high: int, dtype: torch.dtype, backend: str) -> Tensor:
        """(high - low,) gradients of [low, high), zero where a parameter has none."""
        out = memory.empty(high - low, dtype, self.device)
        for position, slot in enumerate(self.layout.slots):
            if self.params[position].grad is None and position not in self._carried:
                out[max(slot.offset - low, 0) : max(slot.offset + slot.numel - low, 0)].zero_()
        pieces, offsets = self.gradients(low, high)
        ops.pack_(out, pieces, offsets=offsets, backend=backend)
        return out

    def ensure_shard(self) -> Tensor:
        """The gradient shard, of any contents where it is new."""
        if self.shard is None:
            self.shard = self._shard_empty()
        return self.shard

    def forget_gradients(self) -> None:
        """Free the gradient shard."""
        self.shard = None
        self.used = [False] * len(self.params)
        self.sumsq.zero_()

    def num_state_bytes(self) -> int:
        """Bytes of masters (none of their own for fp32 weights) and moments."""
        num_copies = 2 if self.is_master else 3
        return num_copies * self.layout.shard_numel * self.master.element_size()
