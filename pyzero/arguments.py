"""What FusedZeroAdam says to arguments that it cannot take."""

from typing import Any

import torch
from torch import Tensor

from pyzero.ops.checks import FLOAT_DTYPES

_REFUSED = {"amsgrad": (False,), "foreach": (None, False), "differentiable": (False,)}  # values that change nothing
_MOOT = ("capturable", "fused")  # always so here


def refuse_options(options: dict[str, Any]) -> None:
    """Options of torch.optim.Adam that would change the result, by name."""
    for name, value in options.items():
        if name in _MOOT or value in _REFUSED.get(name, ()):
            continue
        if name in _REFUSED:
            raise ValueError(f"got {name}={value!r}, which FusedZeroAdam does not support; leave it out")
        raise TypeError(f"FusedZeroAdam got an unexpected argument {name!r}; see help(pyzero.FusedZeroAdam)")


def check_group(group: dict[str, Any]) -> None:
    """Hyper-parameters in range, parameters in dtypes that the ops know."""
    lr, betas = group["lr"], group["betas"]
    wanted = {
        "lr >= 0": isinstance(lr, Tensor) or lr >= 0,
        "betas in [0, 1)": all(0 <= beta < 1 for beta in betas),
        "eps >= 0": group["eps"] >= 0,
        "weight_decay >= 0": group["weight_decay"] >= 0,
    }
    for rule, holds in wanted.items():
        if not holds:
            values = {key: value for key, value in group.items() if key != "params"}
            raise ValueError(f"expected {rule}, got {values}; correct it")
    for index, param in enumerate(group["params"]):
        if hasattr(param, "device_mesh"):
            raise TypeError(
                f"expected plain tensors, got parameter {index} of the group as a DTensor, which is not supported yet; "
                f"pass torch.optim.AdamW(fused=True) those"
            )
        if param.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"expected parameters in float32, bfloat16 or float16, got parameter {index} of the group in "
                f"{str(param.dtype).removeprefix('torch.')}; convert it or leave it out"
            )


def check_device(param: Tensor, device: torch.device) -> None:
    """All parameters of one rank lie on one device."""
    if param.device != device:
        raise ValueError(
            f"expected all parameters of a rank on one device, got {device} and {param.device}; move the model with "
            f".to(), or build one optimizer per device"
        )
