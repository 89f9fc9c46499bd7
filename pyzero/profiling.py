"""Ranges of a profile, which cost nothing where no profiler runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import profiler
from torch.optim import Optimizer, optimizer
from torch.profiler import record_function

_P = ParamSpec("_P")
_R = TypeVar("_R")
_NONE = nullcontext()


def profile_range(name: str) -> AbstractContextManager[object]:
    """`record_function(name)` where a profiler runs: without one it would cost 7 us all the same, as a small pack_."""
    return record_function(name) if _is_profiled() else _NONE


def hook_step(step: Callable[_P, _R]) -> Callable[_P, _R]:
    """torch's wrapper around step(), its range and hooks, where a profiler runs, or there are hooks or a closure.

    Without them it would cost 30 us all the same, a quarter of a step of few parameters (docs/experiments.md).
    torch.compile leaves step() alone: there is nothing in it to compile, and attributes that it sets can be lost there.
    """
    hooked = Optimizer.profile_hook_step(step)
    untraced = torch._disable_dynamo(hooked)  # type: ignore[attr-defined]

    @functools.wraps(step)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            return untraced(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # what a step keeps is written outside it too
            with torch.inference_mode(False), torch.no_grad():
                return wrapper(*args, **kwargs)
        self: Any = args[0]
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        everyones = optimizer._global_optimizer_pre_hooks or optimizer._global_optimizer_post_hooks
        has_closure = len(args) > 1 or kwargs
        return (hooked if own or everyones or has_closure or _is_profiled() else step)(*args, **kwargs)

    return wrapper


def _is_profiled() -> bool:
    """In this thread or, as torch.profiler may, in another one for all."""
    return profiler._is_profiler_enabled or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
