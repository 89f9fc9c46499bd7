"""A DTensor parameter as this rank's plain tensor, with the memory, gradient and hooks of its local part.

Buckets and gradients know only plain tensors. A LocalParam stands for a DTensor there. Reading it reads the DTensor's
local tensor, which FSDP or the caller may replace. Writing its `.grad` writes the DTensor's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyzero.sharding.sharded_grad import LocalGrad, ShardedGrad

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Does not import DTensor, because that takes half a second."""
    return hasattr(tensor, "device_mesh")


def user_param(param: Tensor) -> Tensor:
    """Return the caller's parameter: the DTensor of a LocalParam, or the parameter itself."""
    return param.dtensor if isinstance(param, LocalParam) else param


def local_of(tensor: Any) -> Tensor:
    """Return a DTensor's local tensor, after pending collectives. Return any other tensor as it is."""
    local: Tensor = awaited(tensor._local_tensor if is_dtensor(tensor) else tensor)
    return local


def box_of(dtensor: Any) -> tuple[torch.Size, torch.Size]:
    """Return (shape, offsets) of this rank's part of a DTensor.

    Raises:
        ValueError: Its part is several boxes, as of a fused weight.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if is_interleaved(dtensor):
        raise ValueError(
            f"expected DTensors of which each rank has one box, got one of shape {tuple(dtensor.shape)} and placements "
            f"{dtensor.placements}, of which each has several, as of a fused weight; save "
            f"optimizer.full_state_dict() and whole weights (full_tensor()), or split that weight by Shard()"
        )
    shape, offsets = compute_local_shape_and_global_offset(dtensor.shape, dtensor.device_mesh, dtensor.placements)
    return torch.Size(shape), torch.Size(offsets)


def is_interleaved(dtensor: Any) -> bool:
    """Whether a rank's part of a DTensor is several boxes, which other ranks' parts lie between.

    fully_shard strides its cut over one of tensor parallelism, so that both cuts together give one box.
    """
    mesh, placements = dtensor.device_mesh, dtensor.placements
    for index, placement in enumerate(placements):
        if type(placement).__name__ == "_StridedShard":
            inner = (i for i in range(index + 1, mesh.ndim) if getattr(placements[i], "dim", None) == placement.dim)
            if placement.split_factor != math.prod(mesh.size(i) for i in inner):
                return True
    return False


def is_same_part(tensor: Any, ranks: Sequence[int]) -> bool:
    """Whether these ranks hold the same local tensor, as far as a DTensor's mesh tells. This rank is one of them."""
    if not is_dtensor(tensor):
        return True
    mesh = tensor.device_mesh.mesh
    places = [(mesh == rank).nonzero().flatten().tolist() for rank in ranks]
    split = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return not split or (all(places) and len({tuple(place[dim] for dim in split) for place in places}) == 1)


def whole_of(value: Any) -> Any:
    """Return the whole tensor of a DTensor; collective over its mesh. Return anything else as it is."""
    is_part = torch.is_tensor(value) and is_dtensor(value)
    return value.full_tensor() if is_part else value


def awaited(tensor: Any) -> Any:
    """Wait for the result of a functional collective, which a backward may give. Return other tensors as they are."""
    return tensor.wait() if type(tensor).__name__ == "AsyncCollectiveTensor" else tensor


def empty_on_host(tensor: Any) -> Tensor:
    """Return torch.empty_like in host memory. For a DTensor it is a DTensor with the same part on this rank."""
    if type(tensor).__name__ != "DTensor":
        return tensor.new_empty(tensor.shape, device="cpu")  # type: ignore[no-any-return]
    return _wrap(torch.empty_like(local_of(tensor), device="cpu"), tensor)


def _wrap(local: Tensor, like: Any) -> DTensor:
    """Wrap a tensor of the local shape as this rank's part of a DTensor with another's placement."""
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def part_of(value: Any, param: Any) -> Tensor:
    """Return this rank's part of a whole tensor (plain or a DTensor) for a parameter. A view if possible."""
    if is_dtensor(value):
        if is_dtensor(param) and value.device_mesh == param.device_mesh:
            return local_of(value.redistribute(placements=param.placements))
        value = value.full_tensor()
    if not is_dtensor(param):
        return value  # type: ignore[no-any-return]
    if is_interleaved(param):
        from torch.distributed.tensor import distribute_tensor

        # Without a source rank each rank cuts its own values, and nothing is sent.
        return local_of(distribute_tensor(value.detach(), param.device_mesh, param.placements, src_data_rank=None))
    shape, offsets = box_of(param)
    part: Tensor = value[tuple(slice(low, low + size) for low, size in zip(offsets, shape, strict=True))]
    return part


def shard_of(value: Any, param: Any) -> Any:
    """Return a whole tensor as a DTensor that is cut as a parameter's; sends nothing. Return anything else as it is."""
    if not is_dtensor(param) or is_dtensor(value) or value.shape != param.shape:
        return value
    return _wrap(part_of(value, param), param)


class LocalParam(torch.Tensor):
    """Stands for a DTensor parameter.

    Attributes:
        dtensor: The DTensor.
        padded_numel: Elements that its memory must hold, because FSDP sends shards padded to equal size.
    """

    dtensor: DTensor
    padded_numel: int
    _fsdp: Any  # torch's record of a parameter that fully_shard has sharded
    _shown: Tensor | None  # a stand-in that was put in the DTensor's `.grad`
    _inner: Tensor | None  # the gradient that `_shown` stands for
    _parked: Tensor | None  # the sum so far, while backward adds to it

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(dtensor: Any, use: Any = None) -> LocalParam:
        """Make one for a DTensor. use: The DTensor's entry in fsdp.find_fsdp_params(), if it has one."""
        fsdp = None if use is None else use.record
        made: LocalParam = torch.Tensor._make_subclass(LocalParam, local_of(dtensor).detach())
        made.dtensor, made._fsdp = dtensor, fsdp
        made.padded_numel = 0 if fsdp is None else fsdp._sharded_param_data.numel()
        made._shown = made._inner = made._parked = None
        return made

    @property
    def is_fsdp(self) -> bool:
        """Whether fully_shard moves its weights, and reduces its gradients."""
        return self._fsdp is not None

    # ---- memory ----------------------------------------------------------------------------------------------------

    @property
    def data(self) -> Tensor:
        """The local tensor."""
        return local_of(self.dtensor)

    @data.setter
    def data(self, value: Tensor) -> None:
        """Replace the local tensor by one over `padded_numel` elements. FSDP reads weights there from now on."""
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.dtensor._local_tensor = value
        if self._fsdp is not None and value.numel():
            self._fsdp._sharded_param_data = value.as_strided((self.padded_numel,), (1,))

    # torch's own attributes would describe the memory at construction.
    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    device = property(lambda self: self.data.device)
    _version = property(lambda self: self.data._version + self.dtensor._version)  # ops on it count there
    requires_grad = property(lambda self: self.dtensor.requires_grad)

    def stride(self, *args: Any) -> Any:
        """Strides of the local tensor."""
        return self.data.stride(*args)

    def data_ptr(self) -> int:
        """Address of the local tensor."""
        return self.data.data_ptr()

    # ---- gradient --------------------------------------------------------------------------------------------------

    @property
    def grad(self) -> Tensor | None:
        """This rank's part of the DTensor's gradient, in the parameter's placement, or the tensor put there."""
        shown: Any = self.dtensor.grad
        if shown is None:
            self._shown = self._inner = None
        elif isinstance(shown, ShardedGrad) or not is_dtensor(shown):
            if shown is not self._shown:
                self._shown = self._inner = shown
        else:
            if shown.placements != self.dtensor.placements:
                shown = self.dtensor.grad = shown.redistribute(placements=self.dtensor.placements)
            self._shown = self._inner = None  # kept here, it would outlive zero_grad()
            return local_of(shown)
        return self._inner

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        shown: Any = value
        if isinstance(value, (LocalGrad, ShardedGrad)):
            shown = ShardedGrad.placeholder(self.dtensor, value.record, value.owner)
            shown.stands_for = value
            self._shown, self._inner = shown, value
        else:
            shown = None if value is None else self.wrap(value)
            self._shown = self._inner = None
        self.dtensor.grad = shown

    def wrap(self, local: Tensor) -> DTensor:
        """Wrap a tensor of the local shape as this rank's part of a DTensor with the parameter's placement."""
        return _wrap(local, self.dtensor)

    def park(self) -> None:
        """Called before backward adds to `.grad`. Move a ShardedGrad aside, because nothing can be added to it."""
        self._parked = None
        if isinstance(self.dtensor.grad, ShardedGrad):
            self._parked, self.grad = self.grad, None

    def unpark(self) -> None:
        """Called after backward has added. Put the gradient back, and add the new one to it."""
        parked, self._parked = self._parked, None
        arrived = self.grad
        if parked is not None and arrived is not None:  # None: a backward broke off, and `.grad` was cleared
            parked.as_subclass(torch.Tensor).add_(arrived)
            self.grad = parked
