"""Gather the root's weights, which no block gathers, for a module that is called outside the root's forward.

`generate()` of a model with an encoder, `get_image_features()` and a critic's `forward_value()` call modules without
the root's forward, which alone gathers the root's weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyzero.sharding import fsdp


def gather_for_parts(root: nn.Module) -> None:
    """Make each module that holds weights of the root gather them if it is called by itself."""
    weights = {id(record.sharded_param) for record in fsdp.fsdp_records(root)}
    for module in root.modules():
        if module is not root and any(id(param) in weights for param in module._parameters.values()):
            part = _Part(root)
            module.register_forward_pre_hook(part.before, prepend=True)
            module.register_forward_hook(part.after, always_call=True)


class _Part:
    """Hooks of one module."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._num_calls = 0  # depth of nested calls of the module
        self._has_begun = False  # whether the outermost call gathered

    def before(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._num_calls += 1
        if self._num_calls == 1:
            self._has_begun = fsdp.begin_forward(self._root)

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        self._num_calls -= 1
        if self._num_calls > 0 or not self._has_begun:
            return None
        self._has_begun = False
        return fsdp.end_forward(self._root, output)
