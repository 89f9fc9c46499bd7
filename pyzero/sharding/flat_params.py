"""A bucket's parameters as views of flat memory, and what others do to them."""

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
    """(numel,) elements of a tensor in the memory order of its slot's strides; a view where it has them."""
    if tensor.stride() != stride:
        tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def strides_in_slot(param: Tensor) -> tuple[int, ...]:
    """The strides that a parameter has in flat memory: its own where it is dense, contiguous ones otherwise."""
    return torch.empty_like(param.data, device="meta").stride()


def conversion_error(param: Tensor, dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> TypeError:
    """The error for a parameter that was converted or moved after the optimizer was built."""

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
    """Parameters whose `.data` lies in one flat tensor, and how the optimizer left each: versions, addresses, shapes.

    Args:
        params: Of one dtype and device; their values move in.
        slots: Where each goes.
        flat: The flat tensor.
    """

    def __init__(self, params: list[Tensor], slots: Sequence[ParamSlot], flat: Tensor) -> None:
        self._params = params
        self._slots = slots
        self._flat = flat
        self._dtype, self._device = params[0].dtype, params[0].device
        self.shapes = [param.shape for param in params]
        # Others may give a parameter other ones later on (channels_last); in here it keeps these.
        self.strides = [strides_in_slot(param) for param in params]
        self._layouts: object = None  # of all parameters when none had been moved
        self._versions = [0] * len(params)
        self._addresses = [0] * len(params)
        self._storages: list[StorageWeakRef | None] = [None] * len(params)
        self._has_locals = any(isinstance(param, LocalParam) for param in params)
        for position, param in enumerate(params):  # its own memory is freed one parameter at a time
            self._take_in(position, param, param.data)

    def is_contiguous(self, position: int) -> bool:
        """Whether a parameter lies here in the order of its rows."""
        return torch.empty_strided(self.shapes[position], self.strides[position], device="meta").is_contiguous()

    # ---- what others write ------------------------------------------------------------------------------------------

    def foreign_writes(self, every: bool = False) -> list[int]:
        """Positions of parameters that others have written, or moved elsewhere; every: of all.

        Raises:
            TypeError: One has another shape, dtype or device than when the optimizer was built.
            ValueError: One moved, and somebody holds its memory, to which it would go back.
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
        """Whether all parameters are as the optimizer left them, as far as a look at all of them tells."""
        params = self._params
        return [param._version for param in params] == self._versions and layouts_of(params) == self._layouts

    def _has_moved(self, position: int, param: Tensor) -> bool:
        return param.data_ptr() != self._addresses[position] or param.stride() != self.strides[position]

    def _is_held(self, position: int, param: Tensor) -> bool:
        """Whether others hold the memory that a parameter has left, and that its values are to go back to."""
        left = self._storages[position]
        return left is not None and not left.expired() and left != StorageWeakRef(param.untyped_storage())

    def copy_into_flat(self, position: int) -> None:
        """Have the flat tensor follow one that `foreign_writes` returned."""
        param = self._params[position]
        if self._has_moved(position, param):
            self._take_in(position, param, param.data.clone())  # it may be a view of the memory that it goes to
        self._versions[position] = param._version

    def _take_in(self, position: int, param: Tensor, values: Tensor) -> None:
        param.data = self._view(position, param).copy_(values)
        self._addresses[position] = param.data_ptr()
        self._versions[position] = param._version
        if not isinstance(param, LocalParam):  # fully_shard's modules hold theirs too
            self._storages[position] = StorageWeakRef(param.untyped_storage())

    def _view(self, position: int, param: Tensor) -> Tensor:
        """A parameter's slot as a tensor with a storage of its own: saving it saves nothing else of the bucket."""
        slot, shape, strides = self._slots[position], self.shapes[position], self.strides[position]
        if not slot.numel:
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        padded_numel = param.padded_numel if isinstance(param, LocalParam) else 0
        end = slot.offset + max(slot.numel, padded_numel)
        return memory.alias(self._flat[slot.offset : end]).as_strided(shape, strides)

    # ---- what the optimizer writes ----------------------------------------------------------------------------------

    def note_written(self, position: int) -> None:
        """Called when the optimizer has written one."""
        self._versions[position] = self._params[position]._version

    def note_all_written(self) -> None:
        """Called when the optimizer has written them; none has been written since by anybody else."""
        self._versions = [param._version for param in self._params]

    def bump_versions(self, positions: Sequence[int] | None = None) -> None:
        """Called when ops have written them, or those at `positions`: graphs that saved them notice."""
        written = self._params if positions is None else [self._params[position] for position in positions]
        if written and self._has_locals:
            written = [*map(user_param, written), *(param.data for param in written if isinstance(param, LocalParam))]
        if written:
            torch.autograd.graph.increment_version(written)
