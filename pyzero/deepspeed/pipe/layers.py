"""LayerSpec and TiedLayerSpec, and which layers go to which stage."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn


class LayerSpec:
    """A layer that is built on its stage alone.

    Args:
        typename: A class of modules.
        *module_args: Of its constructor.
        **module_kwargs: Of its constructor.
    """

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        if not (isinstance(typename, type) and issubclass(typename, nn.Module)):
            raise TypeError(f"expected a class of torch.nn.Module, got {typename!r}; pass functions as they are")
        self.typename, self.module_args, self.module_kwargs = typename, module_args, module_kwargs

    def __repr__(self) -> str:
        args = [repr(arg) for arg in self.module_args] + [f"{key}={arg!r}" for key, arg in self.module_kwargs.items()]
        return f"{self.typename.__name__}({', '.join(args)})"

    def build(self, log: bool = False) -> nn.Module:
        """The module. log: ignored."""
        return self.typename(*self.module_args, **self.module_kwargs)


class TiedLayerSpec(LayerSpec):
    """A layer that comes more than once: one module where that is on one stage, copies kept equal where it is not.

    Args:
        key: The same for all that are one layer.
        typename: As LayerSpec's.
        *module_args: As LayerSpec's.
        forward_fn: Called with (module, inputs) in place of the module.
        tied_weight_attr: Read by DeepSpeed alone: here all parameters of the module are tied.
        **module_kwargs: As LayerSpec's.
    """

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *module_args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = ("weight",),
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key, self.forward_fn = key, forward_fn
        self.tied_weight_attr = [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)


def partition(layers: Sequence[Any], num_stages: int, method: str) -> list[int]:
    """num_stages + 1 bounds: stage s has layers[bounds[s]:bounds[s + 1]].

    Args:
        layers: Specs, modules and functions.
        num_stages: How many.
        method: "uniform" by layers, "parameters" by trained elements, "type:regex" by layers whose class matches.

    Raises:
        ValueError: Another method, or nothing to go by.
    """
    kind, _, pattern = method.partition(":")
    if kind.lower() == "uniform":
        each, more = divmod(len(layers), num_stages)
        return [stage * each + min(stage, more) for stage in range(num_stages + 1)]
    if kind.lower() == "parameters":
        return balance([_num_trained(layer) for layer in layers], num_stages)
    if kind.lower() == "type" and pattern:
        matches = [int(re.search(pattern, _class_name(layer), re.IGNORECASE) is not None) for layer in layers]
        if not any(matches):
            raise ValueError(f"expected a layer whose class matches {pattern!r}, got none; correct partition_method")
        return balance(matches, num_stages)
    raise ValueError(
        f"expected partition_method as 'parameters', 'uniform' or 'type:' and a regular expression, got {method!r}; "
        f"choose one of them"
    )


def balance(weights: Sequence[int], num_parts: int) -> list[int]:
    """Bounds of consecutive parts, none empty, the heaviest as light as it can be."""
    num, sums = len(weights), [0, *accumulate(weights)]
    best = {end: (sums[end], [0, end]) for end in range(1, num + 1)}  # of one part, by where it ends
    for part in range(2, num_parts + 1):
        best = {
            end: min((max(best[at][0], sums[end] - sums[at]), [*best[at][1], end]) for at in range(part - 1, end))
            for end in range(part, num + 1)
        }
    return best[num][1]


def _num_trained(layer: Any) -> int:
    if isinstance(layer, LayerSpec):
        try:
            with torch.device("meta"):
                layer = layer.build()
        except RuntimeError:  # its constructor reads values
            with torch.random.fork_rng(devices=[]):
                layer = layer.build()
    return sum(p.numel() for p in layer.parameters() if p.requires_grad) if isinstance(layer, nn.Module) else 0


def _class_name(layer: Any) -> str:
    if isinstance(layer, LayerSpec):
        return layer.typename.__name__
    return type(layer).__name__ if isinstance(layer, nn.Module) else getattr(layer, "__name__", "")
