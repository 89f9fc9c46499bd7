"""A GPU that is not there: CPU tensors with real values, of which `device`, `is_cuda` and `is_cpu` tell otherwise.

pyzero's paths for GPUs run on it with the reference ops. It refuses what CUDA would refuse, an operation on tensors of
both devices, and notes what would make a host wait for a GPU. It has no streams and no kernels: all that runs on a
stream runs at once. It changes torch for good, so it is for processes of its own.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import math
import threading
import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_MOVES = ("aten::copy_", "aten::_to_copy")  # may read one device and write the other
_READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero")

waits: list[str] = []  # where the host would have waited for the GPU

_starts: list[int] = []  # addresses at which storages begin, ascending
_ends: dict[int, tuple[int, bool]] = {}  # by start: where the storage ends, and whether it lies on the GPU
_empty: dict[int, bool] = {}  # by storage, for those without memory
_lock = threading.RLock()
_cpu_device = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]


def install() -> None:
    """Make this process's torch have a GPU, on this thread and those it starts."""
    for name, value in _CUDA.items():
        setattr(torch.cuda, name, value)
    for name, value in _TENSOR.items():
        setattr(torch.Tensor, name, value)
    for name in ("empty", "zeros"):
        setattr(torch, name, _without_pinning(getattr(torch, name)))
    torch.tensor = _made_on_the_host(torch.tensor)
    torch.as_tensor = _of_cuda_memory(torch.as_tensor)
    _PretendedGpu().__enter__()
    run = threading.Thread.run

    def run_with_gpu(thread: threading.Thread) -> None:
        with _PretendedGpu():
            run(thread)

    threading.Thread.run = run_with_gpu  # type: ignore[method-assign]


def is_on_gpu(tensor: torch.Tensor) -> bool:
    if "_is_pretended" in getattr(tensor, "__dict__", ()):  # a subclass without memory
        return True
    try:
        start, end, storage = _span(tensor)
    except (RuntimeError, NotImplementedError):  # sparse, or a subclass without memory
        return False
    with _lock:
        if start == end:
            return _empty.get(storage, False)
        index = bisect.bisect_right(_starts, start) - 1
        if index < 0:
            return False
        end_of_it, on_gpu = _ends[_starts[index]]
        return on_gpu and start < end_of_it


def _place(tensor: torch.Tensor, on_gpu: bool) -> None:
    start, end, storage = _span(tensor)
    with _lock:
        if start == end:
            _empty[storage] = on_gpu
            return
        index = max(bisect.bisect_right(_starts, start) - 1, 0)
        while index < len(_starts) and _starts[index] < end:  # storages that lay here, and are gone
            if _ends[_starts[index]][0] > start:
                del _ends[_starts.pop(index)]
            else:
                index += 1
        bisect.insort(_starts, start)
        _ends[start] = end, on_gpu


def _span(tensor: torch.Tensor) -> tuple[int, int, int]:
    with torch._C.DisableTorchFunctionSubclass():
        storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes(), storage._cdata


def _wait(what: str) -> None:
    frames = [frame for frame in traceback.extract_stack() if "/pyzero/" in frame.filename]
    waits.append(f"{what} in {frames[-1].filename}:{frames[-1].lineno}" if frames else what)


class _PretendedGpu(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = [is_on_gpu(tensor) for tensor in tensors]
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = CPU
            if any(on_gpu) and asked == CPU and torch._C._current_graph_task_id() != -1:
                asked = None  # autograd's nodes know only the CPU
        is_async = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
        _check(name, tensors, on_gpu, asked, is_async)
        args = tree_map(lambda leaf: CPU if isinstance(leaf, torch.device) else leaf, args)
        made = func(*args, **kwargs)
        goes_to_gpu = asked.type == "cuda" if asked is not None else on_gpu[0] if name in _MOVES else any(on_gpu)
        known = {_span(tensor)[2] for tensor in tensors if tensor.layout == torch.strided and _has_memory(tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and _has_memory(leaf) and _span(leaf)[2] not in known:
                _place(leaf, goes_to_gpu)
        return made


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        return bool(_span(tensor))
    except (RuntimeError, NotImplementedError):
        return False


def _check(name: str, tensors: list[torch.Tensor], on_gpu: list[bool], asked: Any, is_async: bool) -> None:
    if name in _MOVES:
        to_gpu = on_gpu[0] if name == "aten::copy_" else asked is not None and asked.type == "cuda"
        from_gpu = on_gpu[1] if name == "aten::copy_" else on_gpu[0]
        moves = to_gpu != from_gpu and (name == "aten::copy_" or asked is not None)
        if moves and not is_async and (from_gpu or tensors[-1].dim()):
            _wait(name)
    elif name in _READS and any(on_gpu):
        _wait(name)
    elif not name.startswith("c10d::"):
        kinds = {kind for tensor, kind in zip(tensors, on_gpu, strict=True) if tensor.dim() or kind}
        if len(kinds) > 1:
            shapes = [(*tensor.shape, "cuda" if kind else "cpu") for tensor, kind in zip(tensors, on_gpu, strict=True)]
            raise RuntimeError(f"expected all tensors of {name} on one device, got {shapes}")


def _without_pinning(make: Any) -> Any:
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        return make(*args, **kwargs)

    return made


def _made_on_the_host(make: Any) -> Any:
    """torch.tensor, whose own copy to a device no mode sees."""

    def made(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Any:
        tensor = make(*args, device=CPU, **kwargs)
        _place(tensor, False)
        return tensor if device is None else tensor.to(device)

    return made


def _of_cuda_memory(make: Any) -> Any:
    """torch.as_tensor, of what has __cuda_array_interface__ too."""
    from_host = _made_on_the_host(make)

    def made(value: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return make(value, *args, device=device, **kwargs)
        array = getattr(value, "__cuda_array_interface__", None)
        if array is None:
            return from_host(value, *args, device=device, **kwargs)
        memory = (ctypes.c_uint8 * math.prod(array["shape"])).from_address(array["data"][0])
        memory.owner = value  # type: ignore[attr-defined]  # keeps it alive
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        _place(tensor, True)
        return tensor

    return made


def _make_wrapper(cls: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
    made = _MAKE_WRAPPER(cls, *args, **kwargs, **({} if device is None else {"device": CPU}))
    if device is not None and device.type == "cuda":
        made.__dict__["_is_pretended"] = True
    return made


_MAKE_WRAPPER = torch.Tensor._make_wrapper_subclass


def _device(tensor: torch.Tensor) -> torch.device:
    found: torch.device = _cpu_device(tensor)
    return GPU if found == CPU and is_on_gpu(tensor) else found


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    asked = kwargs.get("device", next(iter(args), None))
    if not isinstance(asked, str | torch.device) or torch.device(asked) != CPU or not is_on_gpu(tensor):
        return _TO(tensor, *args, **kwargs)
    if not kwargs.get("non_blocking"):
        _wait("Tensor.to")
    made = _TO(tensor.clone(), *args, **kwargs)  # torch would return the tensor itself
    _place(made, False)
    return made


def _tolist(tensor: torch.Tensor) -> Any:
    return _TOLIST(_to(tensor, "cpu"))


def _numpy(tensor: torch.Tensor, **kwargs: Any) -> Any:
    if is_on_gpu(tensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return _NUMPY(tensor, **kwargs)


_TO, _TOLIST, _NUMPY = torch.Tensor.to, torch.Tensor.tolist, torch.Tensor.numpy
_TENSOR: dict[str, Any] = {
    "to": _to,
    "cpu": lambda tensor: _to(tensor, "cpu"),
    "tolist": _tolist,
    "numpy": _numpy,
    "device": property(_device),
    "is_cuda": property(is_on_gpu),
    "is_cpu": property(lambda tensor: _device(tensor) == CPU),
    "is_pinned": lambda tensor, *args: not is_on_gpu(tensor),
    "record_stream": lambda tensor, stream: None,
    "_make_wrapper_subclass": staticmethod(_make_wrapper),
}


class _Stream:
    device, cuda_stream = GPU, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: _Stream) -> None:
        pass

    def wait_event(self, event: _Event) -> None:
        pass

    def synchronize(self) -> None:
        _wait("Stream.synchronize")


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait("Event.synchronize")


class _Runtime:
    def cudaHostRegister(self, *args: Any) -> int:
        return 0

    cudaHostUnregister = cudaHostRegister


_CURRENT = _Stream()
_CUDA: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "Stream": _Stream,
    "Event": _Event,
    "current_stream": lambda device=None: _CURRENT,
    "default_stream": lambda device=None: _CURRENT,
    "stream": lambda stream: contextlib.nullcontext(),
    "device": lambda device: contextlib.nullcontext(),
    "current_device": lambda: 0,
    "is_available": lambda: True,
    "get_device_capability": lambda device=None: (9, 0),
    "device_count": lambda: 1,
    "is_current_stream_capturing": lambda: False,
    "synchronize": lambda device=None: _wait("torch.cuda.synchronize"),
    "cudart": _Runtime,
    "check_error": lambda error: None,
}
