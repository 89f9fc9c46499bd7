"""An update of a shard: launched over its gradient, or gradients that lie apart; its weights to several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pyzero.ops.rounding import ceil_div

from ..backend import SEGMENT_GRANULE, AdamArgs, LionArgs, SgdArgs
from ..rows import addresses, numels
from .address_table import COLUMNS, AddressTable, Upload, address_tables, cached, pointer_table
from .common import ELEMENT_TYPES, is_aligned, launch, round_to, store_rounded


@triton.jit
def read_row(table, GRAD: tl.constexpr, ALIGNED: tl.constexpr, SEGMENT: tl.constexpr):
    """This program's row: where its gradient lies, its first element in the shard, numel."""
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    address = tl.load(row)
    grad = address.to(tl.pointer_type(GRAD))
    if ALIGNED:
        grad = tl.multiple_of(grad, 16)
    return grad, tl.multiple_of(tl.load(row + 1), SEGMENT), tl.load(row + 2)


@triton.jit
def store_weights(param_out, peers, base, offsets, p, mask, NUM_PEERS: tl.constexpr, PEERS_ALIGNED: tl.constexpr):
    """Round p and store it at `offsets` from element `base`, which param_out is advanced to, here and at each peer's.

    peers: int64 (NUM_PEERS,), addresses of their first elements, or None.
    """
    stored = round_to(p, param_out.dtype.element_ty)
    store_rounded(param_out + offsets, stored, mask)
    for peer in tl.static_range(NUM_PEERS):
        weights = tl.load(peers + peer).to(param_out.dtype)
        if PEERS_ALIGNED:
            weights = tl.multiple_of(weights, 16)
        store_rounded(weights + base + offsets, stored, mask)


def launch_over_grads(
    flat_kernel: Any,
    list_kernel: Any,
    args: AdamArgs | LionArgs | SgdArgs,
    states: Sequence[Tensor | None],
    *numbers: Any,
    BLOCK: int,
    **constants: Any,
) -> None:
    """`flat_kernel(*shard, grad, n, *others)` over the one gradient, or `list_kernel(*shard, table, *others)`.

    The shard: its states, the first tensor that receives weights, and a table of the others. `others` are found_inf,
    grad_scale and its sign, the rule's own numbers, segment_ids and active.
    """
    master, grads, grad_scale = args.master, args.grads, args.grad_scale
    if master.numel() == 0 or not grads:
        return
    param_out, peers = (args.param_outs[0], args.param_outs[1:]) if args.param_outs else (None, ())
    peer_addresses = tuple(tensor.data_ptr() for tensor in peers)
    shard = (*states, param_out, pointer_table(peer_addresses, master.device) if peers else None)
    negate = -1.0 if args.hyper.maximize else 1.0
    others = (args.found_inf, grad_scale, negate, *numbers, args.segment_ids, args.active)
    constants |= {
        "SCALE_IS_TENSOR": isinstance(grad_scale, Tensor), "BLOCK": BLOCK, "SEGMENT": SEGMENT_GRANULE,
        "NUM_PEERS": len(peers), "PEERS_ALIGNED": is_aligned(*peer_addresses),
    }  # fmt: skip
    if len(grads) == 1 and grads[0].numel() == master.numel():
        n = master.numel()
        launch(flat_kernel, ceil_div(n, BLOCK), master, *shard, grads[0], n, *others, **constants)
        return
    for table in _tables(args):
        launch(
            list_kernel, table.num_rows, master, *shard, table.rows, *others,
            GRAD=ELEMENT_TYPES[grads[0].dtype], ALIGNED=table.aligned, **constants,
        )  # fmt: skip


def _tables(args: AdamArgs | LionArgs | SgdArgs) -> list[AddressTable]:
    def build(upload: Upload) -> list[AddressTable]:
        first = -len(args.grads)
        spans = list(zip(addresses(args.rows)[first:], args.offsets, numels(args.rows)[first:], strict=True))
        return address_tables(spans, args.grads[0].dtype.itemsize, 1, upload)

    return cached(("shard_grads", args.rows, tuple(args.offsets)), build, args.master.device)
