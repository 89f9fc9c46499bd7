"""Profiler ranges that cost nothing while no profiler runs."""

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
    """`record_function(name)` while a profiler runs: without one it would still take 7 us, as a small pack_ does."""
    return record_function(name) if _is_profiled() else _NONE


def hook_step(step: Callable[_P, _R]) -> Callable[_P, _R]:
    """torch's wrapper around step(), with its range and hooks, only where a profiler, hooks or a closure need it.

    It takes 30 us, a quarter of a step of few parameters (docs/experiments.md). torch.compile is kept out of step():
    there is nothing in it to compile, and attributes that it sets can be lost there.
    """
    hooked = Optimizer.profile_hook_step(step)
    untraced = torch._disable_dynamo(hooked)  # type: ignore[attr-defined]

    @functools.wraps(step)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            return untraced(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # tensors that a step keeps are written outside it too
            with torch.inference_mode(False), torch.no_grad():
                return wrapper(*args, **kwargs)
        self: Any = args[0]
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        everyones = optimizer._global_optimizer_pre_hooks or optimizer._global_optimizer_post_hooks
        has_closure = len(args) > 1 or kwargs
        return (hooked if own or everyones or has_closure or _is_profiled() else step)(*args, **kwargs)

    return wrapper


def _is_profiled() -> bool:
    """Whether a profiler runs: in this thread, or for all threads, as torch.profiler can."""
    return profiler._is_profiler_enabled or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
