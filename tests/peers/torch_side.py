"""pytest plugin in the process of torch's suites: this package's optimizers for torch's Adam, AdamW and SGD.

SGD stands for any optimizer in the suites of schedulers and of GradScaler, which look at groups and flags.
"""

from typing import Any

import torch

from pyzero import FusedZeroAdam, FusedZeroAdamW, FusedZeroLion, ZeroLamb

_REFUSED = ("amsgrad", "differentiable", "capturable")  # inputs left out; capturable has no meaning on a CPU


class Adam(FusedZeroAdam):
    """Of the name that the suites look for."""


class AdamW(FusedZeroAdamW):
    """The same."""


class AnyOptimizer(FusedZeroAdam):
    """Where a test takes SGD and means any optimizer."""

    def __init__(self, params: Any, lr: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(params, lr, foreach=kwargs.get("foreach"), fused=kwargs.get("fused"))


torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD = Adam, AdamW, AnyOptimizer  # type: ignore[misc]

from torch.testing._internal import common_cuda, common_mkldnn, common_optimizers  # noqa: E402  they take these names

for _module, _name in ((common_cuda, "tf32_is_not_fp32"), (common_mkldnn, "bf32_on_and_off")):
    if not hasattr(_module, _name):  # the suites of torch 2.6 on a newer torch; of other tests than those run here
        setattr(_module, _name, lambda *args: lambda test: test)


def _inputs(device: Any, dtype: Any = None) -> list[Any]:
    """What every rule takes."""
    sets = ({}, {"lr": 0.01}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "betas": (0.8, 0.9)})
    return [common_optimizers.OptimizerInput(params=None, kwargs=dict(kwargs), desc=str(kwargs)) for kwargs in sets]


def _without_refused(make_inputs: Any) -> Any:
    def inputs(device: Any, dtype: Any = None) -> list[Any]:
        return [item for item in make_inputs(device) if not any(item.kwargs.get(name) for name in _REFUSED)]

    return inputs


def _ours(info: Any) -> Any:
    info.optim_inputs_func = _without_refused(info.optim_inputs_func)
    info.supported_impls = ("foreach", "fused")
    info.supports_complex = False
    return info


def _new(optimizer: type) -> Any:
    return common_optimizers.OptimizerInfo(
        optimizer, optim_inputs_func=_inputs, supported_impls=(), supports_complex=False
    )


_db = common_optimizers.optim_db
_db[:] = [_ours(info) for info in _db if info.optim_cls in (Adam, AdamW)] + [_new(FusedZeroLion), _new(ZeroLamb)]
assert len(_db) == 4
