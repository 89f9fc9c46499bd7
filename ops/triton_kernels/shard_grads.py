"""An update of a shard launched over its gradient, or over gradients that lie apart."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels: their arguments are pointers and blocks, which Python types do not name)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..backend import AdamArgs, LionArgs
from ..rows import addresses, numels
from .address_table import AddressTable, Upload, address_tables, kept
from .common import ELEMENT_TYPES, launch


@triton.jit
def read_row(table, GRAD: tl.constexpr, ALIGNED: tl.constexpr, SEGMENT: tl.constexpr):
    """This program's row: where its gradient lies, its first element in the shard, numel."""
    row = table + tl.program_id(0).to(tl.int64) * 3
    address = tl.load(row)
    grad = address.to(tl.pointer_type(GRAD))
    if ALIGNED:
        grad = tl.multiple_of(grad, 16)
    return grad, tl.multiple_of(tl.load(row + 1), SEGMENT), tl.load(row + 2)


def launch_over_grads(
    flat_kernel: Any,
    list_kernel: Any,
    args: AdamArgs | LionArgs,
    shard: Sequence[Tensor | None],
    *others: Any,
    BLOCK: int,
    **constants: Any,
) -> None:
    """`flat_kernel(*shard, grad, n, *others)` over the one gradient, or `list_kernel(*shard, table, *others)`."""
    master, grads = args.master, args.grads
    if len(grads) == 1 and grads[0].numel() == master.numel():
        n = master.numel()
        launch(flat_kernel, -(-n // BLOCK), master, *shard, grads[0], n, *others, BLOCK=BLOCK, **constants)
        return
    for table in _tables(args):
        launch(
            list_kernel, table.num_rows, master, *shard, table.rows, *others,
            GRAD=ELEMENT_TYPES[grads[0].dtype], ALIGNED=table.aligned, BLOCK=BLOCK, **constants,
        )  # fmt: skip


def _tables(args: AdamArgs | LionArgs) -> list[AddressTable]:
    def build(upload: Upload) -> list[AddressTable]:
        first = -len(args.grads)
        spans = list(zip(addresses(args.rows)[first:], args.offsets, numels(args.rows)[first:], strict=True))
        return address_tables(spans, args.grads[0].dtype.itemsize, 1, upload)

    return kept(("shard_grads", args.rows, tuple(args.offsets)), build, args.master.device)
