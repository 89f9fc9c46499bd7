"""deepspeed.utils: access to whole tensors of a parameter, the log, and small helpers that scripts import."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pyzero.deepspeed import comm
from pyzero.deepspeed.comm import init_distributed as init_distributed  # its older place
from pyzero.deepspeed.engine.param_owners import owner_of
from pyzero.deepspeed.parallel import groups as groups
from pyzero.optimizer import ZeroOptimizer
from pyzero.sharding.buckets import MASTER
from pyzero.sharding.local_param import is_dtensor

logger = logging.getLogger("pyzero")

_MASTER = "fp32_param"  # DeepSpeed's name of the master among the states


def safe_get_full_fp32_param(param: Tensor) -> Tensor:
    """Return the whole fp32 master of a parameter. Collective, as are all safe_get_full and safe_set_full functions."""
    owner, param = owner_of(param)
    return owner.full_master(param)


def safe_get_full_grad(param: Tensor) -> Tensor | None:
    """Return the whole gradient that the next step takes, averaged and unscaled; None without one."""
    owner, param = owner_of(param)
    return owner.full_grad(param)


def safe_get_full_optimizer_state(param: Tensor, optim_state_key: str) -> Tensor | None:
    """Return a whole state of a parameter, such as "exp_avg"; None if there is no state of this name."""
    if optim_state_key == _MASTER:
        return safe_get_full_fp32_param(param)
    owner, param = owner_of(param)
    return owner.full_state(param).get(optim_state_key)


def safe_set_full_fp32_param(param: Tensor, value: Tensor) -> None:
    """Write a master, and the weights with it. value: The same on every rank."""
    owner, param = owner_of(param)
    owner.set_full_master(param, value)


def safe_set_full_grad(param: Tensor, value: Tensor) -> None:
    """Write the gradient that the next step takes. value: The same on every rank."""
    owner, param = owner_of(param)
    owner.set_full_grad(param, value)


def safe_set_full_optimizer_state(param: Tensor, value: Tensor, optim_state_key: str) -> None:
    """Write a state of a parameter. value: The same on every rank."""
    if optim_state_key == _MASTER:
        safe_set_full_fp32_param(param, value)
        return
    owner, param = owner_of(param)
    owner.set_full_state(param, {optim_state_key: value})


# ---- this rank's part, in stage 3 -----------------------------------------------------------------------------------


def _owner_of_shard(param: Tensor) -> tuple[ZeroOptimizer, Tensor]:
    owner, param = owner_of(param)
    if not is_dtensor(param):
        raise ValueError(
            f"expected a parameter of stage 3 on several ranks, of which this rank holds a part, got a whole one of "
            f"shape {tuple(param.shape)}; call the function with safe_get_full or safe_set_full in its name"
        )
    return owner, param


def safe_get_local_fp32_param(param: Tensor) -> Tensor:
    """Return the fp32 master of this rank's part of a stage-3 parameter, in the shape of `param.to_local()`.

    As with the other safe_get_local and safe_set_local functions, call it on all ranks. Below stage 3 it raises
    ValueError.
    """
    owner, param = _owner_of_shard(param)
    return owner.local_state(param)[MASTER]


def safe_get_local_grad(param: Tensor) -> Tensor | None:
    """Return this rank's part of the gradient that the next step takes, averaged and unscaled; None without one."""
    owner, param = _owner_of_shard(param)
    return owner.local_grad(param)


def safe_get_local_optimizer_state(param: Tensor, optim_state_key: str) -> Tensor | None:
    """Return this rank's part of a state, such as "exp_avg"; None if there is no state of this name."""
    name = MASTER if optim_state_key == _MASTER else optim_state_key
    owner, param = _owner_of_shard(param)
    return owner.local_state(param).get(name)


def safe_set_local_fp32_param(param: Tensor, value: Tensor) -> None:
    """Write this rank's part of a master, and the weights with it. value: In the shape of `param.to_local()`."""
    owner, param = _owner_of_shard(param)
    owner.set_local_state(param, {MASTER: value})


def safe_set_local_grad(param: Tensor, value: Tensor) -> None:
    """Write this rank's part of the gradient that the next step takes."""
    owner, param = _owner_of_shard(param)
    owner.set_local_grad(param, value)


def safe_set_local_optimizer_state(param: Tensor, value: Tensor, optim_state_key: str) -> None:
    """Write this rank's part of a state."""
    name = MASTER if optim_state_key == _MASTER else optim_state_key
    owner, param = _owner_of_shard(param)
    owner.set_local_state(param, {name: value})


# ---- helpers ---------------------------------------------------------------------------------------------------------


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """Return a copy of dicts, lists and tuples in which each tensor has its own storage.

    torch.save writes whole storages, even for small views of them.
    """
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to(device, copy=True), item)


def log_dist(message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO) -> None:
    """Log a message on these ranks. None, or -1 among them, means all ranks."""
    chosen = [-1] if ranks is None else list(ranks)
    if -1 in chosen or comm.get_rank() in chosen:
        logger.log(level, "[rank %d] %s", comm.get_rank(), message)


def see_memory_usage(message: str, force: bool = False, ranks: Iterable[int] | None = None) -> None:
    """If `force` is set, log the message and the GPU memory that torch has allocated."""
    if force:
        from pyzero.deepspeed.accelerator import get_accelerator

        log_dist(f"{message}: {get_accelerator().memory_allocated() / 2**20:.1f} MiB allocated", ranks)


def set_random_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's random numbers of this rank."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def required_torch_version(min_version: float | None = None, max_version: float | None = None) -> bool:
    """Return whether torch's version, major.minor, lies between these. The number 2.13 means minor version 13."""
    mine = _major_minor(torch.__version__)
    return (min_version is None or mine >= _major_minor(str(min_version))) and (
        max_version is None or mine <= _major_minor(str(max_version))
    )


def _major_minor(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


def set_z3_leaf_modules(model: nn.Module, leaf_module_classes: Iterable[Any]) -> list[nn.Module]:
    """Do nothing, because stage 3 has no leaf modules here. Return an empty list."""
    return []


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Do nothing, because stage 3 has no leaf modules here."""


class RepeatingLoader:
    """A data loader that restarts whenever it ends."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self._batches = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except StopIteration:
            self._batches = iter(self.loader)
            return next(self._batches)
