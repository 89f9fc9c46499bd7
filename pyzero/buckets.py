"""Buckets: the flat memory that parameters, masters, moments and gradient shards live in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyzero import ops
from pyzero.comm import Group
from pyzero.layout import BucketLayout, Slot


class _Piece(NamedTuple):
    """A part of a bucket: elements [begin, end) of the parameter at `position`, or the gap behind it."""

    offset: int
    position: int
    begin: int
    end: int
    zeros: Tensor | None  # what a gap is filled with


def flat_gradient(grad: Tensor, param: Tensor) -> Tensor:
    """(numel,) elements of a gradient in the memory order of its parameter; a view where the strides agree."""
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

    def __init__(self, layout: BucketLayout, params: list[Tensor], group: Group, group_index: int) -> None:
        self.layout = layout
        self.group_index = group_index  # of the optimizer's param_groups
        self.params = params  # in the order of layout.slots
        begin, end = layout.shard_bounds(group.rank)
        dtype, self.device = params[0].dtype, params[0].device
        self.flat = torch.zeros(layout.numel, dtype=dtype, device=self.device)  # what the parameters are views of
        self._move_in()
        group.broadcast(self.flat)

        self.own = self.flat[begin:end]  # (shard_numel,) this rank's part of the weights
        self.is_master = dtype == torch.float32  # fp32 weights are their own masters
        self.master = self.own if self.is_master else self.own.float()  # (shard_numel,) fp32
        self.exp_avg = torch.zeros_like(self.master)  # (shard_numel,) fp32
        self.exp_avg_sq = torch.zeros_like(self.master)  # (shard_numel,) fp32
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

    def adopt_writes(self, rank: int) -> int:
        """Follow parameters that someone else wrote, or moved elsewhere; returns how many."""
        num_written = 0
        for position, param in enumerate(self.params):
            moved = param.data_ptr() != self._addresses[position]
            if param._version == self.versions[position] and not moved:
                continue
            slot = self.layout.slots[position]
            if moved:
                param.data = self._view(slot, param).copy_(param.data)
            self.versions[position] = param._version
            low, high = self.layout.overlap(slot, rank)
            at = slot.offset - rank * self.layout.shard_numel
            if not self.is_master:
                self.master[at + low : at + high].copy_(self.own[at + low : at + high])
            num_written += 1
        return num_written

    def state_views(self, position: int, rank: int) -> dict[str, Tensor]:
        """This rank's part of one parameter's state, as flat views."""
        slot = self.layout.slots[position]
        low, high = self.layout.overlap(slot, rank)
        at = slot.offset - rank * self.layout.shard_numel if high > low else 0
        part = slice(at + low, at + high)
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
                piece = grad if is_flat and grad.is_contiguous() else flat_gradient(grad, param)
                if end - begin != grad.numel():
                    piece = piece.view(-1)[begin:end]
            pieces.append(piece)
            offsets.append(offset)
        return pieces, offsets

    def carry(self, position: int) -> None:
        """Move a 16-bit `.grad` into the fp32 sum, before the next backward would round its own to it."""
        param = self.params[position]
        if param.grad is None:
            return
        if self.partial is None:
            self.partial = torch.zeros(self.layout.numel, device=self.device)
        self._carried.add(position)
        self._partial_view(position).add_(flat_gradient(param.grad, param))
        param.grad = None

    def _partial_view(self, position: int) -> Tensor:
        assert self.partial is not None
        slot = self.layout.slots[position]
        return self.partial[slot.offset : slot.offset + slot.numel]

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
        out = torch.empty(high - low, dtype=dtype, device=self.device)
        for position, slot in enumerate(self.layout.slots):
            if self.params[position].grad is None and position not in self._carried:
                out[max(slot.offset - low, 0) : max(slot.offset + slot.numel - low, 0)].zero_()
        pieces, offsets = self.gradients(low, high)
        ops.pack_(out, pieces, offsets=offsets, backend=backend)
        return out

    def forget_gradients(self) -> None:
        """Free the gradient shard."""
        self.shard = None
        self.used = [False] * len(self.params)
        self.sumsq.zero_()

    def num_state_bytes(self) -> int:
        """Bytes of masters (none of their own for fp32 weights) and moments."""
        num_copies = 2 if self.is_master else 3
        return num_copies * self.layout.shard_numel * self.master.element_size()
