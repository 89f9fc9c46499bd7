"""Finds modules that hold an optimizer's parameters among all living objects, because a parameter does not know them.

A search looks at every object of the process, some 0.1 s for a million. It runs at construction, never in a step.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.spectral_norm import SpectralNorm


def living(kind: type) -> list[Any]:
    """Return every living object of this class or a subclass."""
    of_kind: dict[int, bool] = {}  # by id of the class, because a class with its own metaclass may not be hashable
    found = []
    for candidate in gc.get_objects():
        cls = type(candidate)  # not isinstance(): it would run properties of proxies
        matches = of_kind.get(id(cls))
        if matches is None:
            matches = of_kind[id(cls)] = any(base is kind for base in cls.__mro__)
        if matches:
            found.append(candidate)
    return found


def _living_modules(kind: type) -> list[Any]:
    """Return every living module of this class or a subclass whose constructor has run."""
    return [module for module in living(kind) if "_parameters" in module.__dict__ and "_modules" in module.__dict__]


def _submodules(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the module and all below it. Calls no method, because a subclass may have overridden it."""
    waiting, seen = [root], set[int]()
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        below = module.__dict__.get("_modules") or {}
        waiting += [child for child in reversed(list(below.values())) if child is not None]


def find_ddp_wrapper(params: Collection[Tensor]) -> str | None:
    """Return the class name of the module in a DistributedDataParallel that holds one of these parameters, or None."""
    for wrapper in _living_modules(DistributedDataParallel):
        if any(_holds_directly(part, params) for part in _submodules(wrapper)):
            return type(wrapper.__dict__["_modules"].get("module")).__name__
    return None


def find_roots(params: Collection[Tensor]) -> list[nn.Module]:
    """Return the outermost modules that hold one of these parameters, in no particular order."""
    everyone = _living_modules(nn.Module)
    holders = [module for module in everyone if _holds_directly(module, params)]
    parents: dict[int, list[nn.Module]] = {}
    for module in everyone:
        for child in (module.__dict__.get("_modules") or {}).values():
            parents.setdefault(id(child), []).append(module)
    roots: dict[int, nn.Module] = {}
    seen: set[int] = set()
    while holders:
        module = holders.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        above = parents.get(id(module), [])
        holders += above
        if not above:
            roots[id(module)] = module
    return list(roots.values())


def _holds_directly(module: nn.Module, params: Collection[Tensor]) -> bool:
    own = module.__dict__.get("_parameters") or {}
    return any(param is not None and param in params for param in own.values())


def replaced_in_forward() -> set[int]:
    """Return the ids of the tensors that torch.nn.utils.spectral_norm uses as weights until the next forward."""
    return {
        id(module.__dict__.get(hook.name))
        for module in _living_modules(nn.Module)
        for hook in list((module.__dict__.get("_forward_pre_hooks") or {}).values())
        if isinstance(hook, SpectralNorm)
    }


def named_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters, then its buffers, by name in the order of registration, each once."""
    return {**dict(root.named_parameters()), **dict(root.named_buffers())}


def names_of(roots: Iterable[nn.Module]) -> dict[Tensor, list[str]]:
    """Return the parameters of these modules, each with its name in each module."""
    names: dict[Tensor, list[str]] = {}
    for root in roots:
        for name, param in root.named_parameters():
            names.setdefault(param, []).append(name)
    return names


def order_of(positions: dict[Tensor, int], roots: Iterable[nn.Module]) -> list[int] | None:
    """Return the positions in the order in which one module registers all parameters; None if no module has all."""
    for root in roots:
        order = [positions[param] for param in root.parameters() if param in positions]
        if len(order) == len(positions):
            return order
    return None
