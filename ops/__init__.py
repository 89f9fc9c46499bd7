"""The fused ops. Importing this compiles nothing. The first call of an op loads its backend."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ == "ops":
    raise ImportError("expected `import pyzero.ops`, got `import ops`; run from the folder above, or install")

if TYPE_CHECKING:
    from .adam import adam_ as adam_
    from .lion import lion_ as lion_
    from .loss_scale import loss_scale_state as loss_scale_state
    from .loss_scale import loss_scale_update_ as loss_scale_update_
    from .pack import pack_ as pack_
    from .reduce_scatter import reduce_scatter_ as reduce_scatter_
    from .sgd import sgd_ as sgd_
    from .step_scalars import step_scalars_ as step_scalars_
    from .unscale import unscale_ as unscale_

_MODULES = {
    "adam_": "adam",
    "lion_": "lion",
    "loss_scale_state": "loss_scale",
    "loss_scale_update_": "loss_scale",
    "pack_": "pack",
    "reduce_scatter_": "reduce_scatter",
    "sgd_": "sgd",
    "step_scalars_": "step_scalars",
    "unscale_": "unscale",
}
__all__ = list(_MODULES)


if not TYPE_CHECKING:  # a type checker that sees it takes every name for an op

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value  # the next access does not come here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
