"""An all-gather of small rows of host memory through one rank, for many ranks.

gloo's all-gather is a ring: W - 1 hops, one after another. Here the first rank receives W - 1 rows side by side, and
gloo's broadcast takes log2 W hops.
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor


class RootGather:
    """A Handle of `pyzero.comm.work`: begins when it is made, and is done when this rank has all rows.

    Args:
        flat: (size * k,) host memory, written.
        row: (k,) host memory, this rank's row.
        process_group: The ranks.
    """

    def __init__(self, flat: Tensor, row: Tensor, process_group: Any) -> None:
        root, is_root = dist.get_global_rank(process_group, 0), dist.get_rank(process_group) == 0
        rows = [*flat.view(-1, row.numel()).unbind()] if is_root else None
        self._broadcast = partial(dist.broadcast, flat, src=root, group=process_group, async_op=True)
        self._gathered: Any = dist.gather(row, rows, dst=root, group=process_group, async_op=True)
        self._told: Any = None if is_root else self._broadcast()  # None: the root has not got all rows
        self._has_failed = False

    def is_completed(self) -> bool:
        """See Handle."""
        return self._has_failed if self._told is None else bool(self._told.is_completed())

    def wait(self, *timeout: timedelta) -> object:
        """See Handle."""
        if self._told is None:
            try:
                self._gathered.wait(*timeout)
            except RuntimeError:
                self._has_failed = self._gathered.is_completed()
                raise
            self._told = self._broadcast()
        return self._told.wait(*timeout)
