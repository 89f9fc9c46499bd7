"""Make gathered stage-3 weights that a script keeps safe: a later read finds memory of its own, or is an error.

fully_shard frees a gathered weight by resizing its storage to zero. A view of it does not notice, and reading the view
ends the process. So this module changes fully_shard's record of a weight that a script has seen. The views keep the
memory, and fully_shard gathers into new memory. fully_shard reuses its own parameter, so while nothing is gathered that
parameter has a class that refuses reads.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch

from pyzero.sharding.fsdp import fsdp_records
from pyzero.sharding.local_param import is_dtensor

_VIEWS = ("data", "T", "H", "mT", "mH", "real", "imag")  # attributes that are tensors over the same memory
_HARMLESS = {"requires_grad_", "__hash__", "size", "dim", "numel", "register_hook", "is_floating_point"}


def is_gathered(owner: Any) -> bool:
    """Return whether zero.GatheredParameters shows the weights that this module of fully_shard gathers."""
    return any(hasattr(record.sharded_param, "gathered_in") for record in fsdp_records(owner))


def keep_views(owner: Any) -> None:
    """Let views of this module's gathered weights survive its next reshard."""
    for record in fsdp_records(owner):
        if not record._unsharded_inner_tensors:  # set for weights with their own all-gather, such as float8
            record.free_unsharded_param = partial(_leave_to_views, record)


def _leave_to_views(record: Any) -> None:
    """Replace free_unsharded_param for one call: leave the memory to the views."""
    param, (old,) = record._unsharded_param, record.all_gather_outputs
    fresh = torch.empty_like(old)
    view = fresh.as_strided(record._orig_size, record._contiguous_orig_stride)
    if is_dtensor(param):
        param._local_tensor = view
    else:
        param.data = view
    record.all_gather_outputs = [fresh]
    _free(record)


def _free(record: Any) -> None:
    """Replace free_unsharded_param from the second call on."""
    type(record).free_unsharded_param(record)
    param = record._unsharded_param
    if not hasattr(type(param), "kind"):
        kind: Any = type(param)
        param.__class__ = _freed(kind)
    record.to_unsharded = partial(_restore, record)


def _restore(record: Any) -> None:
    """Replace to_unsharded for one call: restore the parameter's class."""
    param = record._unsharded_param
    param.__class__ = type(param).kind
    record.free_unsharded_param = partial(_free, record)
    del record.to_unsharded
    record.to_unsharded()


@cache
def _freed(kind: type) -> type:
    """Return a subclass of a parameter's class, for the time when it has no memory."""

    def refuse(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        attribute = getattr(func.__self__, "__name__", "") if name in ("__get__", "__set__") else ""
        if name in _HARMLESS or (attribute and attribute not in _VIEWS):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(
            f"got {attribute or name} of a weight of stage 3 that was kept after zero.GatheredParameters, wanted it "
            f"within; clone it there, or gather it again"
        )

    def show(self: Any) -> str:
        return f"{kind.__name__}(shape={tuple(self.shape)}, freed)"

    members = {"__slots__": (), "kind": kind, "__torch_function__": classmethod(refuse), "__repr__": show}
    return type(f"Freed{kind.__name__}", (kind,), members)
