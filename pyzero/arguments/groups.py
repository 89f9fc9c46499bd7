"""Checks of parameter groups: the names of their options, and whether buckets can hold their parameters."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from pyzero.arguments.options import ZeroOptions
from pyzero.arguments.params import check_trained

UNSUPPORTED = ("amsgrad", "differentiable")
IGNORED = ("foreach", "capturable", "fused")  # any value gives the same result
RESERVED = ("zero", "scaler", "rule", "master_steps")  # keys of a saved group in which pyzero keeps notes
_SCHEDULERS_KEYS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
_MISSPELT = 0.8  # difflib's ratio from which on an unknown key of a group counts as a misspelt option
_SIMILAR = 0.5  # difflib's ratio for the option that the error about an unknown argument suggests
# Names in other libraries and papers, each with torch's name of the option.
OTHER_NAMES = {
    "LR": "lr",
    "learning_rate": "lr",
    "wd": "weight_decay",
    "epsilon": "eps",
    "beta1": "betas",
    "beta2": "betas",
    "beta_1": "betas",
    "beta_2": "betas",
}
# How scripts and libraries call max_grad_norm, where no part of the name says so to difflib.
_CLIPPING_NAMES = ("clip", "clip_grad", "clip_grad_norm", "grad_clip", "gradient_clip_val", "gradient_clipping")


def refuse_unsupported(options: dict[str, Any]) -> None:
    """Raise ValueError if an option of torch.optim.Adam is set that pyzero lacks. Called in each step."""
    for name in UNSUPPORTED:
        if options.get(name):
            raise ValueError(f"got {name}={options[name]!r}, which is not supported; leave it out")


def refuse_unknown(unknown: Iterable[str], optimizer: type) -> None:
    """Raise TypeError if there is an argument that the optimizer does not have. The error suggests one that it has."""
    for name in unknown:
        known = _arguments_of(optimizer)
        other = "max_grad_norm" if name in _CLIPPING_NAMES else OTHER_NAMES.get(name)
        close = [other] if other in known else None
        close = close or difflib.get_close_matches(name, known, 1, _SIMILAR) or [f"one of {', '.join(known)}"]
        raise TypeError(f"got {name!r} as an argument of {optimizer.__name__}, expected {close[0]}; correct the name")


def _arguments_of(optimizer: type) -> list[str]:
    """Return the names of an optimizer's keyword arguments, without `params`."""
    own = inspect.signature(optimizer).parameters.values()
    named = [each.name for each in own if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    return [name for name in dict.fromkeys((*named, *ZeroOptions.__annotations__)) if name != "params"]


def check_group(group: dict[str, Any], given: Iterable[str], options: Iterable[str]) -> None:
    """Check the names of a group's options, and that buckets can hold its parameters.

    Args:
        group: The group, with the defaults.
        given: The names that the caller gave.
        options: The names of the options that a group may have.

    Raises:
        ValueError: A name is misspelt, reserved, unsupported, or an option of all groups; or as `check_members`.
        TypeError: As `check_members`.
    """
    known = {*options, *UNSUPPORTED, *IGNORED}
    given = {*given}
    for name in RESERVED:
        if name in given:
            raise ValueError(
                f"expected other names than {', '.join(RESERVED)} in a parameter group, which state dicts use for "
                f"notes of pyzero's, got {name!r}; give yours another name"
            )
    for name in given - known - {"params", "param_names"}:  # a training loop may keep its own values in a group
        if name in ZeroOptions.__annotations__:
            raise ValueError(f"got {name} in a parameter group, which all groups share; pass it to the optimizer")
        meant = _meant_option(name, known, given)
        if meant is not None:
            raise ValueError(f"got {name!r} in a parameter group, expected {meant!r}; correct the name")
    refuse_unsupported(group)
    check_members(group["params"])


def check_members(params: Iterable[Any]) -> None:
    """Check that torch would optimize a group's parameters, and that buckets can hold them.

    Raises:
        TypeError: No bucket can hold one.
        ValueError: One is no leaf of autograd's graph.
    """
    for index, param in enumerate(params):
        if not (param.is_leaf or param.retains_grad):
            raise ValueError(f"can't optimize a non-leaf Tensor, parameter {index} of the group; take its leaf")
        if any(placement.is_partial() for placement in getattr(param, "placements", ())):
            raise TypeError(
                f"expected DTensors that are sharded or replicated, got parameter {index} of the group as partial "
                f"sums; redistribute it first"
            )
        if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
            raise TypeError(
                f"expected whole parameters, alike on every rank, got parameter {index} of the group as this rank's "
                f"part of one, of FullyShardedDataParallel; pass torch.optim.AdamW(fused=True) those, or build the "
                f"optimizer over the bare model, which it shards by itself"
            )
        if param.requires_grad:
            check_trained(param, f"parameter {index} of the group")


def _meant_option(name: str, known: set[str], given: set[str]) -> str | None:
    """Return the option that a name misspells; None if it is the caller's own name, such as weight_decay_mult."""
    other = OTHER_NAMES.get(name)
    if other in known:
        return other
    close = next(iter(difflib.get_close_matches(name, known, 1, _MISSPELT)), None)
    if close is None or close in given or name in _SCHEDULERS_KEYS:
        return None
    is_longer = len(name) > len(close) + 1 and (name.startswith(f"{close}_") or name.endswith(f"_{close}"))
    return None if is_longer else close


def have_grads_error(name: str) -> ValueError:
    """Make the error for a gradient of a parameter that joins an optimizer with a loss scale."""
    return ValueError(
        f"expected no gradients of parameters that join an optimizer with a loss scale, for nobody knows whether they "
        f"carry it, got .grad of {name}; set p.grad = None, and run optimizer.backward(loss) after you add them"
    )
