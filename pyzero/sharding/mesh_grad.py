"""Make the norms of DTensors in `.grad` plain tensors, if parameters lie on several meshes, or some on none.

torch.nn.utils.clip_grad_norm_ stacks the norms of all gradients. torch cannot stack DTensors on two meshes (stage 3
with tensor parallelism), nor DTensors and plain tensors (tensor parallelism alone).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyzero.sharding.local_param import is_dtensor, local_of, user_param, whole_of
from pyzero.sharding.sharded_grad import NORMS, read_norm


def are_on_one_mesh(params: Sequence[Tensor]) -> bool:
    """Whether all are DTensors on one mesh, or none is a DTensor."""
    meshes = [getattr(user_param(param), "device_mesh", None) for param in params]
    return all(mesh == meshes[0] for mesh in meshes)


def make_norms_plain(grad: Any) -> None:
    """Make a DTensor's norms those of the whole gradient, as plain tensors. They are collective over its mesh."""
    if is_dtensor(grad) and type(grad).__name__ == "DTensor":
        kind: Any = type(grad)
        grad.__class__ = _normed(kind)


@cache
def _normed(kind: Any) -> Any:
    def act(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func not in NORMS:
                return func(*args, **(kwargs or {}))
            call = read_norm(func, args, kwargs or {})
            if call.is_plain and call.norm_type == math.inf:
                return call.cast(_largest(args[0]))
            return whole_of(func(*args, **(kwargs or {})))

    def copied(self: Any, memo: dict[int, Any]) -> Any:
        return memo.setdefault(id(self), self.clone())

    def reduced(self: Any, protocol: Any) -> Any:
        own, self.__class__ = type(self), kind
        try:
            return self.__reduce_ex__(protocol)
        finally:
            self.__class__ = own

    members = {"__torch_function__": classmethod(act), "__deepcopy__": copied, "__reduce_ex__": reduced}
    return type("MeshGrad", (kind,), {"__slots__": (), **members})  # clone() gives a DTensor


def _largest(grad: Any) -> Tensor:
    """Return the largest magnitude, 0-D. torch has none for an empty part, which a rank may have of few rows."""
    from torch.distributed.tensor import DTensor, Partial

    if any(placement.is_partial() for placement in grad.placements):
        return whole_of(grad).abs().amax()  # type: ignore[no-any-return]
    local = local_of(grad)
    own = local.abs().amax() if local.numel() else local.new_zeros(())
    largest: Tensor = DTensor.from_local(own, grad.device_mesh, [Partial("max")] * grad.device_mesh.ndim).full_tensor()
    return largest
