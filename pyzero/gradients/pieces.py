"""The pieces of gradients in a part of a bucket, in order, with zeros for the gaps between parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyzero.ops.rows import ALIGNED, ONE_DTYPE, addresses, native_rows
from pyzero.sharding.buckets import Bucket
from pyzero.sharding.local_param import awaited

_MOST_ZEROS = 2**18  # elements; several pieces fill a longer gap, which rules for whole matrices leave


class _Piece(NamedTuple):
    """Elements [begin, end) of the parameter at `position`, or of the gap behind it."""

    offset: int
    position: int
    begin: int
    end: int
    zeros: Tensor | None  # zeros for a gap, a view of one tensor for all gaps; None: not a gap


class GradPieces(NamedTuple):
    """The pieces of some gradients."""

    tensors: list[Tensor]  # contiguous
    offsets: list[int]  # where each begins
    addresses: list[int]  # the same list object again if all lie as before
    is_list: bool  # an op can read each in place: they are aligned, and in the weights' dtype


class Pieces:
    """The map of elements [low, high) of a bucket to pieces, with or without its gaps."""

    def __init__(self, bucket: Bucket, low: int, high: int, fills_gaps: bool = True) -> None:
        self._bucket = bucket
        self._are_contiguous = [bucket.flat_params.is_contiguous(position) for position in range(len(bucket.params))]
        self._pieces = _cut(bucket, low, high, fills_gaps)
        self._positions = [piece.position for piece in self._pieces if piece.zeros is None]
        self._offsets = [piece.offset for piece in self._pieces]
        self._gaps = [piece.zeros for piece in self._pieces if piece.zeros is not None]
        after_grads = count(len(bucket.params))
        self._sources = [piece.position if piece.zeros is None else next(after_grads) for piece in self._pieces]
        self._are_plain = all(  # each is a whole, contiguous parameter
            self._are_contiguous[piece.position] and piece.end - piece.begin == bucket.params[piece.position].numel()
            for piece in self._pieces
            if piece.zeros is None
        )
        self._last: tuple[bytes, list[int]] = b"", []  # as_they_lie()'s rows and addresses

    @property
    def num_pieces(self) -> int:
        """The number of pieces if every parameter has a gradient."""
        return len(self._pieces)

    def has_any(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether some parameter in this part has a gradient."""
        return any(grads[position] is not None for position in self._positions)

    def as_they_lie(self, grads: Sequence[Tensor | None]) -> GradPieces | None:
        """Return pieces of `grads`, by position, in the usual case: all are there, and an op can read them in place.

        None in any other case, and without a native module to check it.
        """
        if not self._are_plain or not self._pieces:
            return None
        found = [*grads, *self._gaps] if self._gaps else grads
        tensors: list[Any] = [found[place] for place in self._sources]
        rows = native_rows(tensors, ALIGNED | ONE_DTYPE)
        dtype = self._bucket.dtype
        if rows is None or tensors[0].dtype is not dtype or tensors[-1].dtype is not dtype:
            return None
        if rows != self._last[0]:
            self._last = rows, addresses(rows)
        return GradPieces(tensors, self._offsets, self._last[1], is_list=True)

    def of(self, grads: Sequence[Tensor | None]) -> GradPieces:
        """Return pieces of `grads`, by position, and zeros for the gaps. Offsets count from `low`.

        A parameter without a gradient has no piece. The values there are not defined.
        """
        pieces: list[Tensor] = []
        offsets: list[int] = []
        for offset, position, begin, end, zeros in self._pieces:
            piece = zeros
            if piece is None:
                grad = grads[position]
                if grad is None:
                    continue
                grad = awaited(grad)
                # A conjugate's imaginary part holds negated values. It is unaligned: as_they_lie() returns None for it.
                grad = grad.resolve_neg() if grad.is_neg() else grad
                is_flat = grad.dim() == 1 or self._are_contiguous[position]
                piece = grad if is_flat and grad.is_contiguous() else self._bucket.flat_of(grad, position)
                if end - begin != grad.numel():
                    piece = piece.view(-1)[begin:end]
            pieces.append(piece)
            offsets.append(offset)
        return GradPieces(pieces, offsets, [piece.data_ptr() for piece in pieces], is_list=False)


def _cut(bucket: Bucket, low: int, high: int, fills_gaps: bool) -> list[_Piece]:
    pieces = []
    slots = bucket.layout.param_slots
    stops = [slot.offset for slot in slots[1:]] + [bucket.layout.numel]
    longest = max((stop - slot.offset - slot.numel for slot, stop in zip(slots, stops, strict=True)), default=0)
    zeros = torch.zeros(min(longest, _MOST_ZEROS) if fills_gaps else 0, dtype=bucket.dtype, device=bucket.device)
    for position, (slot, stop) in enumerate(zip(slots, stops, strict=True)):
        gap_at = slot.offset + slot.numel
        begin, end = max(low, slot.offset), min(high, gap_at)
        if begin < end:
            pieces.append(_Piece(begin - low, position, begin - slot.offset, end - slot.offset, None))
        begin, end = max(low, gap_at), min(high, stop)
        for at in range(begin, end, _MOST_ZEROS) if fills_gaps else ():
            pieces.append(_Piece(at - low, position, 0, 0, zeros[: end - at]))
    return pieces
