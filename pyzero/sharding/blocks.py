"""The modules of a model that stage 3 gathers one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the repeated modules of the largest lists, which fully_shard gathers one at a time.

    Of lists inside each other, the outer one counts. A container in a list is never called, so the modules in it count
    instead. A block is left to the root if it shares a parameter with a module outside, or has a parameter of
    register_external_parameter().
    """
    found: list[tuple[int, str, list[nn.Module]]] = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            kinds = Counter(type(child) for child in module)
            called = (block for child in module if kinds[type(child)] > 1 for block in _called(child))
            repeated = [block for block in called if any(True for _ in block.parameters())]
            found.append((sum(p.numel() for child in repeated for p in child.parameters()), path, repeated))
    chosen: list[str] = []
    blocks: list[nn.Module] = []
    for _, path, repeated in sorted(found, key=lambda row: -row[0]):
        if not any(_is_inside(path, other) or _is_inside(other, path) for other in chosen):
            chosen.append(path)
            blocks += repeated
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return [block for block in dict.fromkeys(blocks) if not _shares(block, users)]


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module, or, if it has no forward and so its hooks never run, the modules in it that have one."""
    if type(module).forward is not nn.Module.forward:
        yield module
    else:
        for child in module.children():
            yield from _called(child)


def _is_inside(path: str, other: str) -> bool:
    return other == "" or path.startswith(f"{other}.")


def _shares(block: nn.Module, users: Counter[int]) -> bool:
    own = Counter(id(p) for module in block.modules() for p in module._parameters.values() if p is not None)
    is_external = any(getattr(param, "is_external", False) for param in block.parameters())
    return is_external or any(users[key] > num for key, num in own.items())
