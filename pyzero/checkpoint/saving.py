"""save_checkpoint and async_save_checkpoint."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pyzero.checkpoint.agreement import gather_from_all_ranks
from pyzero.checkpoint.content import Content, collect
from pyzero.checkpoint.writer import Writer
from pyzero.comm.group import Group
from pyzero.comm.work import CollectiveError
from pyzero.optimizer import ZeroOptimizer
from pyzero.sharding.agreement import Unfrozen, check_unfrozen
from pyzero.state_dict import SAVE_OR_LOAD
from pyzero.streams import on_device

log = logging.getLogger("pyzero")


def save_checkpoint(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: ZeroOptimizer,
    step: int,
    keep: int | None = None,
    exclude_frozen_parameters: bool = False,
    exclude_gradients: bool = False,
    **extra: Any,
) -> Path:
    """Save a model and its optimizer. Each rank saves what it holds. Every rank of the process group calls it.

    With a model_parallel_group every rank of both groups calls it, with its part of the model under the whole model's
    names. Each rank saves its part of a weight marked `tensor_model_parallel`, as in Megatron's layers. Such a
    checkpoint loads on as many model-parallel ranks only.

    When this returns, the folder is complete and flushed to disk, and `directory`/latest names it. Until then `latest`
    names the checkpoint before, whatever happens. torch.distributed.checkpoint reads it too: `dcp.load` into
    `{"model": ..., "optim": ...}` of get_state_dict(), with `planner=DefaultLoadPlanner(allow_partial_load=True)`.

    Args:
        directory: A directory that all ranks see. The checkpoint gets its own folder in it. Only one job at a time may
            save into it, and only one optimizer: a save replaces that of another one of the same step.
        model: The model of the optimizer's parameters. Weights, the first rank's buffers and frozen parameters are
            saved.
        optimizer: Its masters, state, step counts, parameter groups and loss scale are saved.
        step: Number of the step, from 0 on. It names the folder, and replaces a checkpoint of the same step.
        keep: Remove all but this many of the newest checkpoints; None: remove none.
        exclude_frozen_parameters: Leave out frozen parameters, such as the base under LoRA. A load leaves them alone.
        exclude_gradients: Save even if a backward has run since the last step(), without its gradients. They stay for
            the next step() of this run, as in torch.
        **extra: More data of this rank: tensors and plain data, such as state dicts of schedulers and dataloaders.
            Numbers of numpy come back as Python's.

    Returns:
        The folder.

    Raises:
        CheckpointError: A file could not be written on some rank. Raised on all ranks.
        CollectiveError: A rank died.
        TypeError: `extra` holds objects that cannot be loaded without running code; `optimizer` is not one of pyzero's;
            or `model` is not a module.
        ValueError: `step` or `keep` is out of range, the model cannot be saved, or ranks pass different steps.
        RuntimeError: A backward has run since the last step(), and its gradients would be lost. It is not noticed if
            `.grad` is torch's (one rank, or `reduce_grads=False`).
    """

    def give() -> Content:
        return _content(model, optimizer, extra, exclude_frozen_parameters, exclude_gradients)

    writer = Writer(begin(optimizer), directory, step, keep, give)
    return writer.run(wait_for_saves)


def async_save_checkpoint(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: ZeroOptimizer,
    step: int,
    keep: int | None = None,
    exclude_frozen_parameters: bool = False,
    exclude_gradients: bool = False,
    **extra: Any,
) -> Future[Path]:
    """Save as save_checkpoint does, in a thread. Return once all is copied to host memory; training may then continue.

    The next save or load in this process waits until this one is written, and so does the end of the program. Call
    `result()` before you destroy the process group.

    Returns:
        A future. `result()` waits, and returns the folder or raises. You cannot cancel it, because the other ranks
        write the checkpoint too.
    """

    def give() -> Content:
        content = _content(model, optimizer, extra, exclude_frozen_parameters, exclude_gradients)
        return replace(content, state=_on_host(content.state))

    writer = Writer(begin(optimizer), directory, step, keep, give)
    devices = (param.device for group in optimizer.param_groups for param in group["params"])
    device = next(devices, torch.device("cpu"))

    future: Future[Path] = Future()
    future.set_running_or_notify_cancel()
    _thread.submit(_run, writer, device, future)
    _under_way.add(future)
    future.add_done_callback(_under_way.discard)
    future.add_done_callback(_log_failure)
    _in_thread[optimizer] = future
    return future


def wait_for_saves() -> None:
    """Wait for all saves that threads of this process write: those of other optimizers may use the same directory."""
    wait([*_under_way])


def _run(writer: Writer, device: torch.device, future: Future[Path]) -> None:
    try:
        with on_device(device):  # a thread begins on the first GPU, and each rank would take memory there
            folder = writer.run()
    except BaseException as error:
        future.set_exception(error)
        del future  # the error's traceback would hold it in a cycle
    else:
        future.set_result(folder)


def _log_failure(future: Future[Path]) -> None:
    """Log a failed save, even if nobody asks for the result."""
    error = future.exception()
    if error is not None:
        log.error("%s", error)


_thread = ThreadPoolExecutor(1, "pyzero-checkpoint")  # starts its thread when it is first used
_in_thread: WeakKeyDictionary[ZeroOptimizer, Future[Path]] = WeakKeyDictionary()  # the last save of each
_under_way: set[Future[Path]] = set()


def _forget() -> None:
    """Reset in a forked child: it inherits the thread's queue and running saves, but not the thread."""
    global _thread
    _thread = ThreadPoolExecutor(1, "pyzero-checkpoint")
    _in_thread.clear()
    _under_way.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def begin(optimizer: ZeroOptimizer) -> Group:
    """Begin a save or a load: wait for the optimizer's last save, and return the process group that both use.

    Raises:
        CheckpointError, TypeError, ValueError: The optimizer cannot use its parameters on some rank. On all ranks.
        TypeError: `optimizer` is not one of pyzero's.
    """
    if not isinstance(optimizer, ZeroOptimizer):
        raise TypeError(
            f"expected optimizer as one of pyzero's, got {type(optimizer).__name__}; pass FusedZeroAdamW or its like "
            f"itself, not what wraps it, and save torch's own with torch.distributed.checkpoint"
        )
    if optimizer in _in_thread:
        _in_thread.pop(optimizer).exception()  # waits; a failure was logged
    found: list[int] = []
    problem: Exception | None = None
    try:
        found = optimizer._find_unfrozen()
    except CollectiveError:  # the other ranks raise it too
        raise
    except Exception as error:
        problem = error

    def tell() -> tuple[list[int], Unfrozen]:
        if problem is not None:
            raise problem
        unfrozen = optimizer._describe_unfrozen(found)
        return optimizer._group.members() if unfrozen else [], unfrozen

    try:
        group = optimizer._checkpoint_group()
        told = gather_from_all_ranks(group, f"the start of {SAVE_OR_LOAD}", tell)
    finally:
        problem = None  # its traceback holds this frame, and the callers'
    by_rank = {rank: unfrozen for rank, (_, unfrozen) in zip(group.members(), told, strict=True)}
    for members in {tuple(members): None for members, unfrozen in told if unfrozen}:  # each has a part of the model
        check_unfrozen(members, [by_rank[rank] for rank in members])
    optimizer._place_found(found)
    return group


def _content(
    model: nn.Module, optimizer: ZeroOptimizer, extra: dict[str, Any], excludes_frozen: bool, excludes_gradients: bool
) -> Content:
    """Return what a save writes. Raise RuntimeError if gradients that it must not exclude would be lost."""
    optimizer._check_between_steps(with_gradients=not excludes_gradients)
    return collect(model, optimizer, extra, excludes_frozen)


def _on_host(value: Any) -> Any:
    """Copy tensors to host memory, in nested dicts too."""
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value
