"""ZeRO optimizers for PyTorch on fused kernels, and a DeepSpeed-compatible initialize().

Adam, AdamW, Lion, SGD, LAMB and Muon; the latter two update in plain PyTorch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.files import CheckpointError as CheckpointError
    from .checkpoint.loading import latest_checkpoint as latest_checkpoint
    from .checkpoint.loading import load_checkpoint as load_checkpoint
    from .checkpoint.saving import async_save_checkpoint as async_save_checkpoint
    from .checkpoint.saving import save_checkpoint as save_checkpoint
    from .comm.work import CollectiveError as CollectiveError
    from .deepspeed.entry import initialize as initialize
    from .loss_scale.scaler import LossScale as LossScale
    from .optimizer import ZeroOptimizer as ZeroOptimizer
    from .optimizers.adam import FusedZeroAdam as FusedZeroAdam
    from .optimizers.adam import FusedZeroAdamW as FusedZeroAdamW
    from .optimizers.lamb import ZeroLamb as ZeroLamb
    from .optimizers.lion import FusedZeroLion as FusedZeroLion
    from .optimizers.muon import ZeroMuon as ZeroMuon
    from .optimizers.sgd import FusedZeroSGD as FusedZeroSGD
    from .sharding.sharded_grad import ShardedGrad as ShardedGrad

__version__ = "0.1.0"

# Imported on first use: `import pyzero` costs next to nothing.
_MODULES = {
    "CheckpointError": "checkpoint.files",
    "CollectiveError": "comm.work",
    "FusedZeroAdam": "optimizers.adam",
    "FusedZeroAdamW": "optimizers.adam",
    "FusedZeroLion": "optimizers.lion",
    "FusedZeroSGD": "optimizers.sgd",
    "LossScale": "loss_scale.scaler",
    "ShardedGrad": "sharding.sharded_grad",
    "ZeroLamb": "optimizers.lamb",
    "ZeroMuon": "optimizers.muon",
    "ZeroOptimizer": "optimizer",
    "async_save_checkpoint": "checkpoint.saving",
    "initialize": "deepspeed.entry",
    "latest_checkpoint": "checkpoint.loading",
    "load_checkpoint": "checkpoint.loading",
    "save_checkpoint": "checkpoint.saving",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in ("compat", "deepspeed", "ops"):
        return importlib.import_module(f"pyzero.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next access does not call this function
    return value


def lazy_getattr(module: str, *names: str) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module of this package. It imports these of pyzero's names on first use."""

    def getattr_of_module(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return __getattr__(name)

    return getattr_of_module


def __dir__() -> list[str]:
    return sorted({"__version__", "compat", "deepspeed", "ops", *_MODULES})
