"""zero.Init: a context in which each module keeps only a shard of its weights, as soon as it is built."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyzero.comm import process
from pyzero.comm.group import Group
from pyzero.deepspeed import launcher
from pyzero.deepspeed.config.reader import load
from pyzero.deepspeed.stage_3.sharded_param import ShardedParam, gathered, shard_
from pyzero.sharding.local_param import is_dtensor

log = logging.getLogger("pyzero")

_active: list[Init] = []  # contexts that shard, the innermost last
_unfinished: list[nn.Module] = []  # modules inside their __init__, the innermost last
_originals: list[tuple[type, str, Any]] = []  # (class, attribute, original value)


class Init:
    """A context in which to build a model that no rank could hold whole.

    On several ranks and in stage 3, a module's parameters take rank 0's values when its __init__ ends, and each rank
    keeps only its rows. The parameters stay the same objects and have the whole shape. Writes to them
    (`nn.init.normal_`, `copy_`, load_state_dict) act on whole weights, one at a time. Writes, GatheredParameters, and
    reads of `w.data` or under no_grad() are collective. Other reads are an error until initialize(). Buffers stay
    whole. On one rank, below stage 3, or with enabled=False, the model is built as without the context.

    Args:
        module: A module that is built already; it is sharded at once.
        data_parallel_group: Group whose ranks share the weights; default: that of mpu, or all ranks.
        mem_efficient_linear: Ignored.
        remote_device: "cpu", or "nvme", which means the same: shards stay in host memory until initialize().
        pin_memory: Ignored.
        config_dict_or_path: A config, of which the stage counts; None: stage 3.
        config: The older name of config_dict_or_path.
        enabled: False does nothing.
        dtype: Dtype to which parameters are converted; None: they stay.
        mpu: An object with get_data_parallel_group().
        **kwargs: Other arguments of DeepSpeed, ignored.

    Raises:
        ValueError: The config has errors, or a PipelineModule, whose ranks build different layers, is built in the
            context.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        **kwargs: Any,
    ) -> None:
        self._group = Group(is_alone=True)
        self._dtype = dtype
        self._device = torch.device("cpu") if remote_device in ("cpu", "nvme") else None
        given = config if config_dict_or_path is None else config_dict_or_path
        if not enabled:
            return
        zero = None if given is None else load(given).zero_optimization
        launcher.join_early(launcher.backend_to_join(from_host=zero is not None and zero.offloads_params()))
        rank, num_ranks = process.rank_and_size()
        if zero is not None and zero.stage < 3:
            if rank == 0:
                log.info("zero.Init: the model is built whole, as without it, for the config's stage is below 3")
        elif num_ranks == 1:
            log.info("zero.Init: the model is built whole, as without it, for there is one rank")
        else:
            handle = data_parallel_group if mpu is None else mpu.get_data_parallel_group()
            self._group = Group(handle)
        if module is not None:
            for part in module.modules():
                self.shard(part)

    def __enter__(self) -> Init:
        if self._group.size > 1:
            if not _active:
                _wrap_all()
            _active.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self._group.size > 1:
            _active.remove(self)
            if not _active:
                _unwrap_all()

    def shard(self, module: nn.Module) -> None:
        """Shard the parameters that a module holds itself, except those that fully_shard leaves whole."""
        if self._group.size == 1:
            return
        for param in module._parameters.values():
            if param is not None and _can_be_sharded(param):
                shard_(param, self._group, self._dtype, self._device)


def _can_be_sharded(param: Tensor) -> bool:
    if isinstance(param, (ShardedParam, nn.parameter.UninitializedParameter)) or is_dtensor(param) or param.is_meta:
        return False
    return param.is_floating_point() and param.dim() > 0 and param.numel() > 0


# ---- patches of nn.Module in the context -----------------------------------------------------------------------------


def _wrap_all() -> None:
    for cls in dict.fromkeys(_subclasses(nn.Module)):
        _wrap(cls)
    _replace(nn.Module, "__init_subclass__", classmethod(_init_subclass))
    _replace(nn.Module, "apply", _apply)


def _unwrap_all() -> None:
    while _originals:
        cls, name, value = _originals.pop()
        if value is None:
            delattr(cls, name)
        else:
            setattr(cls, name, value)


def _subclasses(cls: type) -> Iterator[type]:
    children: list[type] = type.__subclasses__(cls)
    for child in children:
        yield child
        yield from _subclasses(child)


def _replace(cls: type, name: str, value: Any) -> None:
    _originals.append((cls, name, cls.__dict__.get(name)))
    setattr(cls, name, value)


def _wrap(cls: type) -> None:
    """Patch the __init__ that a class defines. When the outermost __init__ of a module ends, the module is sharded."""
    original: Callable[..., None] | None = cls.__dict__.get("__init__")
    if original is None:
        return

    @functools.wraps(original)
    def init(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if any(module is other for other in _unfinished) or not _active:
            return original(module, *args, **kwargs)
        if getattr(module, "builds_own_layers", False):
            raise ValueError(
                f"got a {type(module).__name__} in zero.Init, wanted modules that all ranks build alike; build it "
                f"outside, or pass enabled=False"
            )
        _unfinished.append(module)
        try:
            original(module, *args, **kwargs)
        finally:
            _unfinished.pop()
        if "_parameters" in module.__dict__:
            _active[-1].shard(module)
        return None

    _replace(cls, "__init__", init)


def _init_subclass(cls: Any, /, **kwargs: Any) -> None:
    """Patch a class that is defined in the context."""
    super(nn.Module, cls).__init_subclass__(**kwargs)
    _wrap(cls)


def _apply(module: nn.Module, fn: Callable[[nn.Module], None]) -> nn.Module:
    """Replace nn.Module.apply: `fn` sees each module's weights whole, and all ranks take rank 0's result."""
    for child in module.children():
        child.apply(fn)
    with gathered((p for p in module._parameters.values() if isinstance(p, ShardedParam)), source=0):
        fn(module)
    return module
