"""A bucket's parameters as views of flat memory, and how others write or move them."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pyzero import memory
from pyzero.ops.rows import layouts_of
from pyzero.sharding.layout import ParamSlot
from pyzero.sharding.local_param import LocalParam, user_param


def flatten(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return a tensor's elements, (numel,), in the memory order of its slot's strides. A view if it has those."""
    if tensor.stride() != stride:
        tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def strides_in_slot(param: Tensor) -> tuple[int, ...]:
    """Return a parameter's strides in flat memory: its own if it is dense, otherwise contiguous ones."""
    return torch.empty_like(param.data, device="meta").stride()


def conversion_error(param: Tensor, dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> TypeError:
    """Make the error for a parameter that was converted or moved after the optimizer was built."""

    def spell(dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> str:
        return f"{str(dtype).removeprefix('torch.')} on {device} of shape {tuple(shape)}"

    return TypeError(
        f"expected a parameter in {spell(dtype, device, shape)}, as the optimizer was built with, got it in "
        f"{spell(param.dtype, param.device, param.shape)}; convert and move the model first (.to(), .half(), "
        f".bfloat16()), then build the optimizer"
    )


def _shared_error(shape: Sequence[int]) -> ValueError:
    return ValueError(
        f"expected the former memory of the parameter of shape {tuple(shape)} to be free, got another tensor assigned "
        f"to its .data while something still holds what was there, as a swap with an average does; copy the values "
        f"instead (p.data.copy_(other)), or swap back before the step"
    )


class FlatParams:
    """Parameters with `.data` in one flat tensor, and how the optimizer left each: versions, addresses, shapes.

    Args:
        params: Parameters of one dtype and device. Their values move in.
        slots: The place of each.
        flat: The flat tensor.
    """

    def __init__(self, params: list[Tensor], slots: Sequence[ParamSlot], flat: Tensor) -> None:
        self._params = params
        self._slots = slots
        self._flat = flat
        self._dtype, self._device = params[0].dtype, params[0].device
        self.shapes = [param.shape for param in params]
        # Callers may change a parameter's strides later (channels_last). In the flat tensor it keeps these.
        self.strides = [strides_in_slot(param) for param in params]
        self._layouts: object = None  # of all parameters when none had been moved
        self._versions = [0] * len(params)
        self._addresses = [0] * len(params)
        self._storages: list[StorageWeakRef | None] = [None] * len(params)
        self._has_locals = any(isinstance(param, LocalParam) for param in params)
        for position, param in enumerate(params):  # frees the old memory one parameter at a time
            self._take_in(position, param, param.data)

    def is_contiguous(self, position: int) -> bool:
        """Whether a parameter lies here in the order of its rows."""
        return torch.empty_strided(self.shapes[position], self.strides[position], device="meta").is_contiguous()

    # ---- what others write ------------------------------------------------------------------------------------------

    def foreign_writes(self, every: bool = False) -> list[int]:
        """Return the positions of parameters that others have written or moved. every: Return all.

        Raises:
            TypeError: One has another shape, dtype or device than when the optimizer was built.
            ValueError: One moved, and somebody holds the memory that it would go back to.
        """
        if not every and self._are_as_left():
            return []
        found = []
        for position, param in enumerate(self._params):
            shape = self.shapes[position]
            if param.shape != shape or param.dtype != self._dtype or param.device != self._device:
                raise conversion_error(param, self._dtype, self._device, shape)
            has_moved = self._has_moved(position, param)
            if has_moved and self._is_held(position, param):
                gc.collect()  # garbage holds nothing: torch 2.6 leaves tensors that it has loaded in a cycle
                if self._is_held(position, param):
                    raise _shared_error(param.shape)
            if every or has_moved or param._version != self._versions[position]:
                found.append(position)
        if not found:
            self._layouts = layouts_of(self._params)
        return found

    def _are_as_left(self) -> bool:
        """Whether all parameters are as the optimizer left them, by one quick look at all of them."""
        params = self._params
        return [param._version for param in params] == self._versions and layouts_of(params) == self._layouts

    def _has_moved(self, position: int, param: Tensor) -> bool:
        return param.data_ptr() != self._addresses[position] or param.stride() != self.strides[position]

    def _is_held(self, position: int, param: Tensor) -> bool:
        """Whether others hold the memory that a parameter has left, and that its values would go back to."""
        left = self._storages[position]
        return left is not None and not left.expired() and left != StorageWeakRef(param.untyped_storage())

    def copy_into_flat(self, position: int) -> None:
        """Make the flat tensor follow a parameter that `foreign_writes` returned."""
        param = self._params[position]
        if self._has_moved(position, param):
            self._take_in(position, param, param.data.clone())  # cloned: it may be a view of its target
        self._versions[position] = param._version

    def _take_in(self, position: int, param: Tensor, values: Tensor) -> None:
        param.data = self._view(position, param).copy_(values)
        self._addresses[position] = param.data_ptr()
        self._versions[position] = param._version
        if not isinstance(param, LocalParam):  # fully_shard's modules hold this memory too
            self._storages[position] = StorageWeakRef(param.untyped_storage())

    def _view(self, position: int, param: Tensor) -> Tensor:
        """Return a parameter's slot with its own storage, so that saving it saves nothing else of the bucket."""
        slot, shape, strides = self._slots[position], self.shapes[position], self.strides[position]
        if not slot.numel:
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        padded_numel = param.padded_numel if isinstance(param, LocalParam) else 0
        end = slot.offset + max(slot.numel, padded_numel)
        return memory.alias(self._flat[slot.offset : end]).as_strided(shape, strides)

    # ---- what the optimizer writes ----------------------------------------------------------------------------------

    def note_written(self, position: int) -> None:
        """Note that the optimizer has written one parameter."""
        self._versions[position] = self._params[position]._version

    def note_all_written(self) -> None:
        """Note that the optimizer has written all parameters, and nobody else has written one since."""
        self._versions = [param._version for param in self._params]

    def bump_versions(self, positions: Sequence[int] | None = None) -> None:
        """Bump the versions of parameters that ops have written, so that graphs that saved them notice."""
        written = self._params if positions is None else [self._params[position] for position in positions]
        if written and self._has_locals:
            written = [*map(user_param, written), *(param.data for param in written if isinstance(param, LocalParam))]
        if written:
            torch.autograd.graph.increment_version(written)
