"""ZeRO in PyTorch on fused kernels: FusedZeroAdam, -AdamW and -Lion, and initialize() for DeepSpeed's scripts."""

from __future__ import annotations

import importlib
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adam import FusedZeroAdam as FusedZeroAdam
    from .adam import FusedZeroAdamW as FusedZeroAdamW
    from .comm import CollectiveError as CollectiveError
    from .deepspeed.entry import initialize as initialize
    from .lamb import ZeroLamb as ZeroLamb
    from .lion import FusedZeroLion as FusedZeroLion
    from .scaler import LossScale as LossScale
    from .sharded_grad import ShardedGrad as ShardedGrad

__version__ = "0.1.0"
__all__ = [
    "CollectiveError",
    "FusedZeroAdam",
    "FusedZeroAdamW",
    "FusedZeroLion",
    "LossScale",
    "ShardedGrad",
    "ZeroLamb",
    "initialize",
]

# In a checkout pyzero.ops is the folder ops/ beside this one.
_root = pathlib.Path(__file__).resolve().parent.parent
if not pathlib.Path(__file__).with_name("ops").is_dir() and (_root / "ops" / "build_spec.py").is_file():
    __path__.append(str(_root))

# Imported on first use: `import pyzero` costs next to nothing.
_MODULES = {
    "CollectiveError": "comm",
    "FusedZeroAdam": "adam",
    "FusedZeroAdamW": "adam",
    "FusedZeroLion": "lion",
    "LossScale": "scaler",
    "ShardedGrad": "sharded_grad",
    "ZeroLamb": "lamb",
    "initialize": "deepspeed.entry",
}


def __getattr__(name: str) -> Any:
    if name in ("compat", "deepspeed", "ops"):
        return importlib.import_module(f"pyzero.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
