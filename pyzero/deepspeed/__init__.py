"""DeepSpeed's names for DeepSpeed scripts: `import pyzero.deepspeed as deepspeed`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .accelerator import get_accelerator as get_accelerator
    from .arguments import add_config_arguments as add_config_arguments
    from .arguments import add_tuning_arguments as add_tuning_arguments
    from .comm import init_distributed as init_distributed
    from .config.deepspeed_config import DeepSpeedConfig as DeepSpeedConfig
    from .engine.engine import Engine
    from .entry import initialize as initialize
    from .parallel.tensor_parallel import tp_model_init as tp_model_init
    from .pipe.engine import PipelineEngine as PipelineEngine
    from .pipe.module import PipelineModule as PipelineModule
    from .utils import log_dist as log_dist
    from .utils import logger as logger

    DeepSpeedEngine = Engine

__version__ = version = "0.19.8"  # the DeepSpeed whose names these are

# Imported at first use: for each name, its module and its name in that module.
_NAMES = {
    "DeepSpeedConfig": ("config.deepspeed_config", "DeepSpeedConfig"),
    "DeepSpeedEngine": ("engine.engine", "Engine"),
    "PipelineEngine": ("pipe.engine", "PipelineEngine"),
    "PipelineModule": ("pipe.module", "PipelineModule"),
    "add_config_arguments": ("arguments", "add_config_arguments"),
    "add_tuning_arguments": ("arguments", "add_tuning_arguments"),
    "get_accelerator": ("accelerator", "get_accelerator"),
    "init_distributed": ("comm", "init_distributed"),
    "initialize": ("entry", "initialize"),
    "log_dist": ("utils", "log_dist"),
    "logger": ("utils", "logger"),
    "tp_model_init": ("parallel.tensor_parallel", "tp_model_init"),
}
__all__ = [*_NAMES, "init_inference"]
_MODULES = ("accelerator", "checkpointing", "comm", "ops", "pipe", "profiling", "utils", "zero")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; docs/deepspeed.md lists what it has")
    module, attribute = _NAMES[name]
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value  # an import would bind a submodule of the same name here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


def init_inference(*args: Any, **kwargs: Any) -> NoReturn:
    """Refuse, because inference is not supported.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError("pyzero trains; run inference with the module itself, or with DeepSpeed")
