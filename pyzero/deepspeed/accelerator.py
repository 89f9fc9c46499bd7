"""deepspeed.accelerator: an object that forwards to torch.cuda if there is a GPU, and otherwise answers for the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Functions of torch.cuda with DeepSpeed's names. On a CPU, the counts are 0 and the actions do nothing.
_COUNTS = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "memory_cached",
    "max_memory_cached",
)
_ACTIONS = (
    "empty_cache",
    "synchronize",
    "reset_peak_memory_stats",
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
    "set_device",
    "current_stream",
    "default_stream",
)
_TENSORS = tuple(f"{kind}Tensor" for kind in ("BFloat16", "Byte", "Double", "Float", "Half", "Int", "Long"))
_OF_TORCH = ("get_rng_state", "set_rng_state", "initial_seed", *_TENSORS)  # torch.cuda has these too, for a GPU


class Accelerator:
    """The device that this process computes on."""

    def __init__(self) -> None:
        self._has_gpu = torch.cuda.is_available()
        self._name = "cuda" if self._has_gpu else "cpu"

    def __getattr__(self, name: str) -> Any:
        """Return a function of torch.cuda, such as `memory_allocated` or `empty_cache`, or its substitute on a CPU."""
        if self.__dict__.get("_has_gpu") and hasattr(torch.cuda, name):
            return getattr(torch.cuda, name)
        if name in _COUNTS:
            return lambda *args, **kwargs: 0
        if name in _ACTIONS:
            return lambda *args, **kwargs: None
        if name in _OF_TORCH:
            return getattr(torch, name)
        raise AttributeError(f"the accelerator {self.__dict__.get('_name')} has no {name!r}; use torch's own")

    def is_available(self) -> bool:
        """Return True: there is always a device."""
        return True

    def device_name(self, device_index: int | None = None) -> str:
        """Return the name of the device, such as "cuda", "cuda:1" or "cpu"."""
        return self._name if device_index is None or not self._has_gpu else f"cuda:{device_index}"

    def device(self, device_index: int | None = None) -> AbstractContextManager[Any]:
        """Return a context in which this GPU is the current one."""
        return torch.cuda.device(device_index) if self._has_gpu else nullcontext()

    def device_count(self) -> int:
        """Return the number of GPUs that this process sees; 1 on a CPU."""
        return torch.cuda.device_count() if self._has_gpu else 1

    def current_device(self) -> int | str:
        """Return the index of the current GPU, or "cpu"."""
        return torch.cuda.current_device() if self._has_gpu else "cpu"

    def current_device_name(self) -> str:
        """Return the name of the current device, such as "cuda:0" or "cpu"."""
        return f"cuda:{torch.cuda.current_device()}" if self._has_gpu else "cpu"

    def total_memory(self, device_index: int | None = None) -> int:
        """Return the size of the GPU's memory in bytes, or of the host's memory."""
        if self._has_gpu:
            return int(torch.cuda.mem_get_info(device_index)[1])
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def available_memory(self, device_index: int | None = None) -> int:
        """Return the free bytes of the GPU's memory, or of the host's memory."""
        if self._has_gpu:
            return int(torch.cuda.mem_get_info(device_index)[0])
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        """Return torch.cuda.memory_stats(); an empty dict on a CPU."""
        return torch.cuda.memory_stats(device_index) if self._has_gpu else {}

    def is_synchronized_device(self) -> bool:
        """Return whether an op has finished when its call returns."""
        return not self._has_gpu

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context in which work goes to this stream of the GPU; on a CPU it does nothing."""
        return torch.cuda.stream(stream) if self._has_gpu else nullcontext()

    def range_push(self, msg: str) -> None:
        """Begin an NVTX range; do nothing on a CPU."""
        if self._has_gpu:
            torch.cuda.nvtx.range_push(msg)

    def range_pop(self) -> None:
        """End the innermost NVTX range; do nothing on a CPU."""
        if self._has_gpu:
            torch.cuda.nvtx.range_pop()

    def communication_backend_name(self) -> str:
        """Return the backend of process groups for this device: "nccl" or "gloo"."""
        return "nccl" if self._has_gpu else "gloo"

    def manual_seed(self, seed: int) -> Any:
        """Call torch.manual_seed."""
        return torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> Any:
        """Call torch.cuda.manual_seed_all, or torch.manual_seed on a CPU."""
        return torch.cuda.manual_seed_all(seed) if self._has_gpu else torch.manual_seed(seed)

    def default_generator(self, device_index: int) -> torch.Generator:
        """Return the GPU's generator of random numbers, or the CPU's."""
        return torch.cuda.default_generators[device_index] if self._has_gpu else torch.default_generator

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        """Call a function that uses the device, which is ready then."""
        if self._has_gpu:
            torch.cuda.init()
        return callback()

    def random(self) -> Any:
        """Return the module torch.random."""
        return torch.random

    def is_bf16_supported(self) -> bool:
        """Return torch.cuda.is_bf16_supported(); True on a CPU."""
        return torch.cuda.is_bf16_supported() if self._has_gpu else True

    def is_fp16_supported(self) -> bool:
        """Return True."""
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        """Return fp32, fp16 and bf16."""
        return [torch.float32, torch.float16, torch.bfloat16]

    def pin_memory(self, tensor: Tensor, align_bytes: int = 1) -> Tensor:
        """Return a copy in pinned memory if there is a GPU; otherwise return the tensor itself."""
        return tensor.pin_memory() if self._has_gpu else tensor

    def on_accelerator(self, tensor: Tensor) -> bool:
        """Return whether the tensor is on this type of device."""
        return tensor.device.type == self._name


@functools.cache
def get_accelerator() -> Accelerator:
    """Return the accelerator of this process."""
    return Accelerator()
