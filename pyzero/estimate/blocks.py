"""Bytes of stage 3: what fully_shard gathers at the worst moment of a backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pyzero.estimate.buckets import FP32
from pyzero.ops.rounding import ceil_div
from pyzero.sharding.blocks import blocks_of


def shard_numel(param: Tensor, num_ranks: int) -> int:
    """Return the elements of a rank's shard of a parameter, which is cut by rows, with padding."""
    num_rows = param.shape[0] if param.dim() else 1
    return ceil_div(num_rows, num_ranks) * (param.numel() // max(num_rows, 1))


@dataclass(frozen=True)
class _Gathered:
    """Bytes of what fully_shard gathers at once."""

    weights: int  # whole
    grads: int  # whole, in the same dtype
    sent: int  # the same in fp32, padded
    shards: int  # of gradients

    @staticmethod
    def of(params: Iterable[Tensor], num_ranks: int) -> _Gathered:
        held = list(params)
        trained = [param for param in held if param.requires_grad]
        return _Gathered(
            weights=sum(param.numel() * param.element_size() for param in held),
            grads=sum(param.numel() * param.element_size() for param in trained),
            sent=FP32 * num_ranks * sum(shard_numel(param, num_ranks) for param in trained),
            shards=FP32 * sum(shard_numel(param, num_ranks) for param in trained),
        )


def gathered_at_most(model: nn.Module, num_ranks: int) -> int:
    """Return the most bytes in a backward, with gradients. Parameters outside of blocks stay whole from forward on."""
    blocks = blocks_of(model)
    in_blocks = {param for block in blocks for param in block.parameters()}
    params = list(model.parameters())
    first = next((place for place, param in enumerate(params) if param in in_blocks), len(params))
    rest = _Gathered.of((param for param in params if param not in in_blocks), num_ranks)
    after_blocks = _Gathered.of((param for param in params[first:] if param not in in_blocks), num_ranks)
    return _walk([_Gathered.of(block.parameters(), num_ranks) for block in reversed(blocks)], rest, after_blocks.grads)


def _walk(blocks: Sequence[_Gathered], rest: _Gathered, early: int) -> int:
    """Return the most bytes in a backward, block by block from the last one.

    Either a block computes with its gradient, while the next is gathered ahead. Or its gradient lies beside the fp32
    copy that is sent, while fully_shard still keeps the copy of the block before.

    Args:
        blocks: The blocks in the order of backward.
        rest: The parameters that the root gathers.
        early: Bytes of the rest's gradients that come before those of the blocks.
    """
    worst = shards = sent = 0
    for place, block in enumerate(blocks):
        ahead = blocks[place + 1].weights if place + 1 < len(blocks) else 0
        always = rest.weights + early + shards + block.grads + ahead
        worst = max(worst, always + sent + max(block.weights, block.sent), always + block.sent + block.shards)
        shards, sent = shards + block.shards, block.sent
    sending = rest.grads + rest.sent + max(sent, rest.shards)
    return max(worst, shards + max(rest.weights + rest.grads + sent, sending))


def equal_blocks_at_most(numel: int, element_bytes: int, num_blocks: int, num_ranks: int) -> int:
    """Return the same as `gathered_at_most` for equal blocks with nothing around them.

    Args:
        numel: Elements of a block.
        element_bytes: Bytes per gathered element.
        num_blocks: Number of blocks.
        num_ranks: Ranks that the blocks are sharded over.
    """
    whole = numel * element_bytes
    block = _Gathered(whole, whole, numel * FP32, ceil_div(numel, num_ranks) * FP32)
    return _walk([block] * num_blocks, _Gathered(0, 0, 0, 0), 0)
