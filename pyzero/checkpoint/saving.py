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
from pyzero.comm.group import CollectiveError, Group
from pyzero.optimizer import ZeroOptimizer
from pyzero.sharding.agreement import Unfrozen, check_unfrozen
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
    """Save a model and its optimizer, each rank what it holds. Every rank of the optimizer's process group calls it.

    With a model_parallel_group every rank of both calls it, with its part of the model under the whole model's names.
    Of a weight marked `tensor_model_parallel`, as Megatron's layers do, each saves its part, for as many ranks.

    The folder is complete, flushed to disk and named by `directory`/latest when this returns; until then `latest` names
    the one before, whatever happens. It is a checkpoint of torch.distributed.checkpoint too: `dcp.load` reads it, into
    `{"model": ..., "optim": ...}` of get_state_dict() by `planner=DefaultLoadPlanner(allow_partial_load=True)`.

    Args:
        directory: Seen by all ranks. The checkpoint goes into a folder of its own in there. One job at a time saves
            into it.
        model: Whose parameters the optimizer has. Weights, the first rank's buffers and frozen parameters are saved.
        optimizer: Its masters, state, step counts, parameter groups and loss scale are saved.
        step: Number of the step, from 0 on, which names the folder. One of the same step is replaced.
        keep: Remove all but this many of the newest; None: remove none.
        exclude_frozen_parameters: Leave out those that are not trained, as the base under LoRA. A load leaves them as
            they are.
        exclude_gradients: Save also where a backward has run since the last step(), without its gradients, which stay
            for the next step() of this run, as torch does.
        **extra: More of this rank: plain data, as state dicts of schedulers and dataloaders, and tensors.

    Returns:
        The folder.

    Raises:
        CheckpointError: A file could not be written on some rank. Raised on all ranks.
        CollectiveError: A rank died.
        TypeError: `extra` holds objects that cannot be loaded without running code; `optimizer` is none of pyzero's, or
            `model` no module.
        ValueError: `step`, `keep` or the model is none to save, or ranks pass different steps.
        RuntimeError: A backward has run since the last step(): its gradients would be lost. Not noticed where
            `.grad` is torch's, on one rank or with `reduce_grads=False`.
    """
    options = (exclude_frozen_parameters, exclude_gradients)
    writer = _writer(directory, model, optimizer, step, keep, *options, extra, copies=False)
    return writer.run(lambda: wait([*_under_way]))  # another optimizer's too: it may go into the same directory


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
    """As save_checkpoint, in a thread: returns once all has been copied to host memory, and training may go on.

    The optimizer's next save or load waits until it is written. So does the end of the program; but where that destroys
    its process group before, call `result()` first.

    Returns:
        `result()` waits, and gives the folder or raises. It cannot be cancelled, for the other ranks write it too.
    """
    options = (exclude_frozen_parameters, exclude_gradients)
    writer = _writer(directory, model, optimizer, step, keep, *options, extra, copies=True)
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


def _run(writer: Writer, device: torch.device, future: Future[Path]) -> None:
    try:
        with on_device(device):  # a thread begins on the first GPU, on which each rank would take memory
            folder = writer.run()
    except BaseException as error:
        future.set_exception(error)
        del future  # which the error's traceback would hold in a cycle
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
    """In a forked child, which has the thread's queue and what it was writing, but not the thread."""
    global _thread
    _thread = ThreadPoolExecutor(1, "pyzero-checkpoint")
    _in_thread.clear()
    _under_way.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def begin(optimizer: ZeroOptimizer) -> Group:
    """Begin a save or a load: wait for the save before, which uses the same process group; returns that group.

    Raises:
        CheckpointError, TypeError, ValueError: On all ranks: parameters of one are not as its optimizer needs them.
    """
    if not isinstance(optimizer, ZeroOptimizer):
        raise TypeError(
            f"expected optimizer as one of pyzero's, got {type(optimizer).__name__}; pass FusedZeroAdamW or its like "
            f"itself, not what wraps it, and save torch's own with torch.distributed.checkpoint"
        )
    if optimizer in _in_thread:
        _in_thread.pop(optimizer).exception()  # waits; whoever started it hears of a failure
    found: list[int] = []
    problem: Exception | None = None
    try:
        found = optimizer.find_unfrozen()
    except CollectiveError:  # which the others have, too
        raise
    except Exception as error:
        problem = error

    def tell() -> tuple[list[int], Unfrozen]:
        if problem is not None:
            raise problem
        unfrozen = optimizer.describe_unfrozen(found)
        return optimizer.members() if unfrozen else [], unfrozen

    try:
        group = optimizer.checkpoint_group()
        told = gather_from_all_ranks(group, "the look for parameters that are no longer frozen", tell)
    finally:
        problem = None  # its traceback holds this frame, and the callers'
    by_rank = {rank: unfrozen for rank, (_, unfrozen) in zip(group.members(), told, strict=True)}
    for members in {tuple(members): None for members, unfrozen in told if unfrozen}:  # each has a part of the model
        check_unfrozen(members, [by_rank[rank] for rank in members])
    optimizer.place_unfrozen(found)
    return group


def _writer(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: ZeroOptimizer,
    step: int,
    keep: int | None,
    excludes_frozen: bool,
    excludes_gradients: bool,
    extra: dict[str, Any],
    copies: bool,
) -> Writer:
    """A Writer of a model and its optimizer. copies: Copy all values to the host, so that training may go on."""

    def give() -> Content:
        optimizer.check_between_steps(with_gradients=not excludes_gradients)
        content = collect(model, optimizer, extra, excludes_frozen)
        return replace(content, state=_on_host(content.state)) if copies else content

    return Writer(begin(optimizer), directory, step, keep, give)


def _on_host(value: Any) -> Any:
    """A copy in host memory, through dicts."""
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value
