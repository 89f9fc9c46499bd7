"""Buckets: the flat memory that parameters, masters and moments live in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pyzero import memory
from pyzero.layout import GRANULE, BucketLayout

NO_SUSPECT = math.inf  # in place of the code of a bad parameter


class _Piece(NamedTuple):
    """A part of a bucket: elements [begin, end) of the parameter at `position`, or the gap behind it."""

    offset: int
    position: int
    begin: int
    end: int
    zeros: Tensor | None  # what a gap is filled with


def flatten_like(tensor: Tensor, param: Tensor) -> Tensor:
    """(numel,) elements of a tensor in the memory order of its parameter; a view where the strides agree."""
    if tensor.stride() != param.stride():
        tensor = torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def conversion_error(param: Tensor, dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> TypeError:
    """Of a parameter that is not what it was when the optimizer was built."""

    def spell(dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> str:
        return f"{str(dtype).removeprefix('torch.')} on {device} of shape {tuple(shape)}"

    return TypeError(
        f"expected a parameter in {spell(dtype, device, shape)}, as the optimizer was built with, got it in "
        f"{spell(param.dtype, param.device, param.shape)}; convert and move the model first (.to(), .half(), "
        f".bfloat16()), then build the optimizer"
    )


class Bucket:
    """The memory of one bucket on this rank.

    Args:
        layout: Its map.
        params: In the order of layout.slots.
        numbers: Of the parameters, among the optimizer's; the same whatever bucket they lie in.
        index: Of the bucket, among the optimizer's.
        rank: Whose shard this is.
    """

    def __init__(self, layout: BucketLayout, params: list[Tensor], numbers: list[int], index: int, rank: int) -> None:
        self.layout = layout
        self.index = index
        self.params = params
        self.numbers = numbers
        self.rank = rank
        self.dtype, self.device = params[0].dtype, params[0].device
        self.is_master = self.dtype == torch.float32  # fp32 weights are their own masters
        self.flat = memory.zeros(layout.numel, self.dtype, self.device)  # the weights of all ranks
        begin, end = layout.shard_bounds(rank)
        self.weight_shard = self.flat[begin:end]  # (shard_numel,) this rank's part of them
        self._strides = [torch.empty_like(param.data, device="meta").stride() for param in params]  # own where dense
        self._shapes = [param.shape for param in params]
        self._versions = [0] * len(params)
        self._addresses = [0] * len(params)
        for position, param in enumerate(params):  # its own memory is freed one parameter at a time
            self._take_in(position, param)

        self.master = self.weight_shard if self.is_master else self._shard_empty()  # (shard_numel,) fp32
        self.exp_avg = memory.zeros(layout.shard_numel, torch.float32, self.device)  # (shard_numel,)
        self.exp_avg_sq = memory.zeros(layout.shard_numel, torch.float32, self.device)  # (shard_numel,)
        self.steps = torch.zeros(len(params), device=self.device)  # (num_params,) applied steps of each parameter
        self.segment_ids = self._segment_ids(rank)  # (shard_numel / GRANULE,) int32, position of the parameter
        self._cuts: dict[tuple[int, int], list[_Piece]] = {}
        self._used: tuple[bool, ...] | None = None
        self._used_tensor = torch.empty(0)

    # ---- weights --------------------------------------------------------------------------------------------------

    def _take_in(self, position: int, param: Tensor) -> None:
        param.data = self._view(position).copy_(param.data)
        self._addresses[position] = param.data_ptr()
        self._versions[position] = param._version

    def _shard_empty(self) -> Tensor:
        return memory.empty(self.layout.shard_numel, torch.float32, self.device)

    def _view(self, position: int) -> Tensor:
        """A tensor with a storage of its own over a parameter's slot: whoever saves it saves nothing beside it."""
        slot, shape, strides = self.layout.slots[position], self._shapes[position], self._strides[position]
        if not slot.numel:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return from_dlpack(self.flat[slot.offset : slot.offset + slot.numel]).as_strided(shape, strides)

    def masters_from_weights(self) -> None:
        """The first masters."""
        if not self.is_master:
            self.master.copy_(self.weight_shard)

    def written(self, every: bool = False) -> list[int]:
        """Positions of parameters that someone else wrote, or moved elsewhere, or of all.

        Raises:
            TypeError: One has another shape, dtype or device than when the optimizer was built.
        """
        found = []
        for position, param in enumerate(self.params):
            same = param.shape == self._shapes[position] and param.dtype == self.dtype and param.device == self.device
            if not same:
                raise conversion_error(param, self.dtype, self.device, self._shapes[position])
            if every or param._version != self._versions[position] or self._has_moved(position, param):
                found.append(position)
        return found

    def _has_moved(self, position: int, param: Tensor) -> bool:
        return param.data_ptr() != self._addresses[position] or param.stride() != self._strides[position]

    def follow(self, positions: Sequence[int]) -> None:
        """Have flat memory and masters follow these parameters, which `written` gave."""
        for position in positions:
            param = self.params[position]
            if self._has_moved(position, param):
                param.data = param.data.clone()  # it may be another view of the memory that it goes to
                self._take_in(position, param)
            self._versions[position] = param._version
            if not self.is_master:
                here, _ = self.own_part(position)
                master, weights = self.master[here], self.weight_shard[here]
                # Nothing changes where the master rounds to the weight: a checkpoint's weights may follow its masters.
                master.copy_(torch.where(master.to(weights.dtype) == weights, master, weights.float()))

    def weight_was_written(self, position: int) -> None:
        """By the optimizer, its master with it."""
        self._versions[position] = self.params[position]._version

    def bump_versions(self, used: Sequence[bool] | None = None) -> None:
        """The optimizer has written weights, all or those of `used` by number: graphs that saved them know."""
        written = [p for p, number in zip(self.params, self.numbers, strict=True) if used is None or used[number]]
        if written:
            torch.autograd.graph.increment_version(written)

    def masters_are_in_sync(self) -> None:
        """What was written so far, the masters need not follow."""
        self._versions = [param._version for param in self.params]

    # ---- shards and whole tensors ---------------------------------------------------------------------------------

    def _segment_ids(self, rank: int) -> Tensor:
        runs = self.layout.granule_owners(rank)
        positions = torch.tensor([position for position, _ in runs], dtype=torch.int32)
        counts = torch.tensor([count for _, count in runs], dtype=torch.int64)
        return positions.repeat_interleave(counts).to(self.device)

    def own_part(self, position: int) -> tuple[slice, slice]:
        """Where one parameter's part on this rank lies: in the shard, and in the parameter."""
        slot = self.layout.slots[position]
        low, high = self.layout.overlap(slot, self.rank)
        at = slot.offset - self.rank * self.layout.shard_numel if high > low else -low
        return slice(at + low, at + high), slice(low, high)

    def shaped(self, flat: Tensor, position: int) -> Tensor:
        """(numel,) elements in a parameter's memory order as a tensor of its shape and strides; the same memory."""
        return flat.as_strided(self._shapes[position], self._strides[position])

    def flat_of(self, tensor: Tensor, position: int) -> Tensor:
        """(numel,) elements of a tensor of a parameter's shape, in the parameter's memory order."""
        return flatten_like(tensor, self.params[position])

    def state_views(self, position: int) -> dict[str, Tensor]:
        """This rank's part of one parameter's state, as flat views."""
        part, _ = self.own_part(position)
        return {
            "step": self.steps[position],
            "exp_avg": self.exp_avg[part],
            "exp_avg_sq": self.exp_avg_sq[part],
            "master": self.master[part],
        }

    def write_state(self, position: int, state: dict[str, Tensor]) -> None:
        """The step count, and (numel,) whole values of what else is given, in the parameter's memory order."""
        here, there = self.own_part(position)
        for name, value in state.items():
            if name == "step":
                self.steps[position] = value
            else:
                getattr(self, name)[here].copy_(value[there])

    def num_state_bytes(self) -> int:
        """Bytes of masters (none of their own for fp32 weights) and moments."""
        num_copies = 2 if self.is_master else 3
        return num_copies * self.layout.shard_numel * self.master.element_size()

    # ---- gradients ------------------------------------------------------------------------------------------------

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
                zeros = torch.zeros(end - begin, dtype=self.dtype, device=self.device)
                pieces.append(_Piece(begin - low, position, 0, 0, zeros))
        self._cuts[low, high] = pieces
        return pieces

    def pieces(self, grads: Sequence[Tensor | None], low: int, high: int) -> tuple[list[Tensor], list[int]]:
        """The pieces of `grads`, by position, in [low, high) of the bucket, zeros for the gaps; offsets from low.

        Where there is no gradient there is no piece: what lies there is not defined.
        """
        pieces: list[Tensor] = []
        offsets: list[int] = []
        for offset, position, begin, end, zeros in self._cut(low, high):
            piece = zeros
            if piece is None:
                grad, param = grads[position], self.params[position]
                if grad is None:
                    continue
                is_flat = grad.dim() == 1 or (grad.is_contiguous() and param.is_contiguous())
                piece = grad if is_flat and grad.is_contiguous() else flatten_like(grad, param)
                if end - begin != grad.numel():
                    piece = piece.view(-1)[begin:end]
            pieces.append(piece)
            offsets.append(offset)
        return pieces, offsets

    def used_tensor(self, used: Sequence[bool]) -> Tensor:
        """(num_params,) fp32 on the device: which parameters, of all by number, have a gradient."""
        mine = tuple(used[number] for number in self.numbers)
        if mine != self._used:
            self._used = mine
            self._used_tensor = torch.tensor(mine, dtype=torch.float32).to(self.device, non_blocking=True)
        return self._used_tensor

    def is_used(self, used: Sequence[bool]) -> bool:
        """Whether any of its parameters has a gradient."""
        return any(used[number] for number in self.numbers)

    def locate_nonfinite(self, slices: list[Tensor], num_ranks: int, by_rank: bool) -> Tensor:
        """(1,) fp64: the code of the first parameter in this shard of which a rank sent an inf or a NaN.

        A code is the parameter's number times (num_ranks + 1) plus the rank, which is num_ranks where it is not known.
        """
        numbers = torch.tensor(self.numbers, dtype=torch.float64).to(self.device)[self.segment_ids.long()]
        codes = []
        for rank, piece in enumerate(slices):
            bad = ~torch.isfinite(piece).view(-1, GRANULE).all(1)
            code = numbers * (num_ranks + 1) + (rank if by_rank else num_ranks)
            codes.append(code.masked_fill_(~bad, NO_SUSPECT).min())
        return torch.stack(codes).min().reshape(1)


def locate_nonfinite_grads(bucket: Bucket, grads: Sequence[Tensor | None], rank: int, num_ranks: int) -> Tensor:
    """0-D fp64: the same of this rank's own gradients, by position."""
    codes = torch.full((len(grads) + 1,), NO_SUSPECT, dtype=torch.float64, device=bucket.device)
    for position, grad in enumerate(grads):
        if grad is not None:
            code = float(bucket.numbers[position] * (num_ranks + 1) + rank)
            codes[position].masked_fill_(~torch.isfinite(grad).all(), code)
    return codes.min()
