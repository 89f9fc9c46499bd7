"""Profiler ranges that cost almost nothing while no profiler runs."""

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
    """Return `record_function(name)` if a profiler runs, else an empty context: record_function always takes 7 us."""
    return record_function(name) if _is_profiled() else _NONE


def hook_step(step: Callable[_P, _R]) -> Callable[_P, _R]:
    """Wrap step(): call it through torch's wrapper only if a profiler, hooks or a closure need that.

    torch's wrapper takes 30 us, a quarter of a step of few parameters (docs/experiments.md). torch.compile does not
    trace step(): there is nothing in it to compile, and attributes that it sets could be lost.
    """
    hooked = Optimizer.profile_hook_step(step)
    untraced = torch._disable_dynamo(hooked)  # type: ignore[attr-defined]

    @functools.wraps(step)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            return untraced(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # a step's tensors are later written outside inference mode
            with torch.inference_mode(False), torch.no_grad():
                return wrapper(*args, **kwargs)
        self: Any = args[0]
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        everyones = optimizer._global_optimizer_pre_hooks or optimizer._global_optimizer_post_hooks
        has_closure = len(args) > 1 or kwargs
        return (hooked if own or everyones or has_closure or _is_profiled() else step)(*args, **kwargs)

    return wrapper


def _is_profiled() -> bool:
    """Whether a profiler runs, in this thread or for all threads."""
    return profiler._is_profiler_enabled or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
