"""deepspeed.checkpointing: activation checkpoints, which are torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint as torch_checkpoint


def configure(*args: Any, **kwargs: Any) -> None:
    """Nothing: activations are neither partitioned nor moved."""


def is_configured() -> bool:
    """Always."""
    return True


def reset() -> None:
    """Nothing: there are no buffers."""


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), computed again in backward: torch.utils.checkpoint without a reentrant backward."""
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=False)


non_reentrant_checkpoint = checkpoint
