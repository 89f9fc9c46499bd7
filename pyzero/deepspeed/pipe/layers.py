"""LayerSpec and TiedLayerSpec, and the assignment of layers to stages."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn


class LayerSpec:
    """A layer that only its own stage builds.

    Args:
        typename: A subclass of nn.Module.
        *module_args: Arguments of its constructor.
        **module_kwargs: Keyword arguments of its constructor.
    """

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        if not (isinstance(typename, type) and issubclass(typename, nn.Module)):
            raise TypeError(f"expected a class of torch.nn.Module, got {typename!r}; pass functions as they are")
        self.typename, self.module_args, self.module_kwargs = typename, module_args, module_kwargs

    def __repr__(self) -> str:
        args = [repr(arg) for arg in self.module_args] + [f"{key}={arg!r}" for key, arg in self.module_kwargs.items()]
        return f"{self.typename.__name__}({', '.join(args)})"

    def build(self, log: bool = False) -> nn.Module:
        """Build the module. log: Ignored."""
        return self.typename(*self.module_args, **self.module_kwargs)


class TiedLayerSpec(LayerSpec):
    """A layer that occurs more than once.

    On one stage it is one module. On several stages it is copies that are kept equal.

    Args:
        key: The same for all occurrences of one layer.
        typename: As for LayerSpec.
        *module_args: As for LayerSpec.
        forward_fn: Called with (module, inputs) instead of the module.
        tied_weight_attr: Ignored; all parameters of the module are tied.
        **module_kwargs: As for LayerSpec.
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
    """Return num_stages + 1 bounds: stage s has layers[bounds[s]:bounds[s + 1]].

    Args:
        layers: Specs, modules and functions.
        num_stages: Number of stages.
        method: What to balance: "uniform" the number of layers, "parameters" their trained elements, "type:regex" the
            number of layers whose class matches.

    Raises:
        ValueError: The method is unknown, or no layer matches.
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
    """Return the bounds of consecutive non-empty parts, so that the heaviest is as light as possible."""
    num, sums = len(weights), [0, *accumulate(weights)]
    best = {end: (sums[end], [0, end]) for end in range(1, num + 1)}  # end -> (heaviest part, bounds)
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
        except RuntimeError:  # the constructor reads values, which meta tensors lack
            with torch.random.fork_rng(devices=[]):
                layer = layer.build()
    return sum(p.numel() for p in layer.parameters() if p.requires_grad) if isinstance(layer, nn.Module) else 0


def _class_name(layer: Any) -> str:
    if isinstance(layer, LayerSpec):
        return layer.typename.__name__
    return type(layer).__name__ if isinstance(layer, nn.Module) else getattr(layer, "__name__", "")
