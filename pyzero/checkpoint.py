"""save_checkpoint and load_checkpoint: a model and its optimizer, saved by any number of ranks, loaded by any other."""

from __future__ import annotations

import json
import logging
import operator
import os
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from tqdm import tqdm

from pyzero import checkpoint_files as files
from pyzero.buckets import MASTER, STEP
from pyzero.checkpoint_files import CheckpointError
from pyzero.comm import Group
from pyzero.optimizer import ZeroOptimizer
from pyzero.rank_state import SCALER, ZERO

log = logging.getLogger("pyzero")
_T = TypeVar("_T")

_SHOW_PROGRESS_AFTER_S = 5.0
_MOST_SHOWN = 5  # names in a report
_OF_ITS_OWN = ("params", "param_names", SCALER)  # of a group: no hyper-parameters


def save_checkpoint(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: ZeroOptimizer,
    step: int,
    keep: int | None = None,
    **extra: Any,
) -> Path:
    """Save a model and its optimizer, each rank what it holds. Every rank of the optimizer's process group calls it.

    The folder is complete, flushed to disk and named by `directory`/latest when this returns; until then `latest` names
    the one before, whatever happens. It is a checkpoint of torch.distributed.checkpoint too: `dcp.load` reads it.

    Args:
        directory: Seen by all ranks. The checkpoint goes into a folder of its own in there.
        model: Whose parameters the optimizer has. Weights, buffers and frozen parameters are saved.
        optimizer: Its masters, state, step counts, parameter groups and loss scale are saved.
        step: Number of the step, from 0 on, which names the folder. One of the same step is replaced.
        keep: Remove all but this many of the newest; None: remove none.
        **extra: More of this rank: plain data, as state dicts of schedulers and dataloaders, and tensors.

    Returns:
        The folder.

    Raises:
        CheckpointError: A file could not be written on some rank, on all ranks.
        CollectiveError: A rank died.
        TypeError: `extra` holds objects that cannot be loaded without running code.
        ValueError: `step`, `keep` or the model is none to save, or ranks pass different steps.
        RuntimeError: A backward has run since the last step(): its gradients would be lost. Not noticed where
            `.grad` is torch's, on one rank or with `reduce_grads=False`.
    """
    return _writer(directory, model, optimizer, step, keep, extra, copies=False).run()


def async_save_checkpoint(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: ZeroOptimizer,
    step: int,
    keep: int | None = None,
    **extra: Any,
) -> Future[Path]:
    """As save_checkpoint, in a thread: returns once all has been copied to host memory, and training may go on.

    The optimizer's next save or load waits until it is written.

    Returns:
        `result()` waits, and gives the folder or raises.
    """
    future = _thread.submit(_writer(directory, model, optimizer, step, keep, extra, copies=True).run)
    future.add_done_callback(_log_failure)
    _in_thread[optimizer] = future
    return future


def _log_failure(future: Future[Path]) -> None:
    """Whether or not anybody asks for the result."""
    error = future.exception()
    if error is not None:
        log.error("%s", error)


_thread = ThreadPoolExecutor(1, "pyzero-checkpoint")  # starts its thread when it is first used
_in_thread: WeakKeyDictionary[ZeroOptimizer, Future[Path]] = WeakKeyDictionary()  # the last save of each


def _begin(optimizer: ZeroOptimizer) -> Group:
    """What saves and loads begin with: the save before is over, for they talk in this group too."""
    if optimizer in _in_thread:
        _in_thread.pop(optimizer).exception()  # waits; whoever started it hears of a failure
    optimizer.place_unfrozen()
    return optimizer.checkpoint_group()


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The folder that load_checkpoint would take; None where there is no checkpoint yet.

    Raises:
        CheckpointError: `latest` is damaged.
    """
    return files.find(Path(directory))


def load_checkpoint(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: ZeroOptimizer,
    strict: bool = True,
) -> dict[str, Any]:
    """Load what save_checkpoint saved, on any number of ranks, in any stage, with any buckets, groups in any order.

    Training goes on bit for bit where the gradients are the same. Every rank of the optimizer's process group calls it.
    All of it is read and checked before anything is changed.

    Args:
        directory: Where it was saved: the latest is taken. Or the folder of one.
        model: Of the same parameter names. Other dtypes will do: masters are fp32 on both sides.
        optimizer: With the same update rule, over the same parameters.
        strict: False leaves what the checkpoint lacks as it is, and ignores what the model lacks.

    Returns:
        "step", and what was given as `extra`: this rank's on as many ranks, else the first rank's.

    Raises:
        CheckpointError: There is none; a file is missing, cut or damaged; or it has other parameters. On all ranks.
    """
    return _Load(Path(directory), model, optimizer, strict).run()


# ---- what both do ---------------------------------------------------------------------------------------------------


def _together(group: Group, what: str, act: Callable[[], _T]) -> _T:
    """Run it on every rank; where it fails on one, all ranks raise."""
    problem = None
    try:
        result = act()
    except Exception as error:  # of any kind: the other ranks wait to hear of it
        problem = error
    failed = None if problem is None else f"{type(problem).__name__}: {problem}"
    for rank, text in enumerate(group.gather_objects(failed, f"the agreement on {what}")):
        if text is not None:
            if isinstance(problem, (CheckpointError, TypeError, ValueError)):
                raise problem
            raise CheckpointError(f"{what} failed on rank {rank} of {group.size}: {text}") from problem
    return result


def _names_of(model: nn.Module, optimizer: ZeroOptimizer) -> dict[Tensor, str]:
    """The optimizer's parameters, by torch.distributed.checkpoint's names: without what DDP and torch.compile add."""
    ours = {param for group in optimizer.param_groups for param in group["params"]}
    lacking = len(ours - set(model.parameters()))
    if lacking:
        raise ValueError(
            f"expected a model that holds the optimizer's parameters, got one without {lacking} of {len(ours)}; pass "
            f"the model that the optimizer was built over"
        )
    from torch.distributed.checkpoint.state_dict import _get_fqns  # no public name gives what get_state_dict uses

    return {p: next(iter(_get_fqns(model, name))) for name, p in model.named_parameters() if p in ours}


def _model_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """By name: parameters and buffers, whose memory is the model's; and what get_extra_state() of modules returns."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(model)
    suffix = _EXTRA_STATE_KEY_SUFFIX
    extra = {n: v for n, v in state.items() if not torch.is_tensor(v) or n.split(".")[-1] == suffix}
    return {name: value for name, value in state.items() if name not in extra}, extra


def _set_extra_state(model: nn.Module, state: dict[str, Any]) -> None:
    """By torch.distributed.checkpoint's names, to the modules that the model has."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if state:
        set_model_state_dict(model, state, options=StateDictOptions(strict=False))


# ---- saving ---------------------------------------------------------------------------------------------------------


@dataclass
class Content:
    """What goes into a checkpoint from this rank."""

    state: dict[str, Any]  # {"model": ..., "optim": ...}, as torch.distributed.checkpoint's get_state_dict() gives
    common: dict[str, Any]  # parameter groups by name, what the model has beside tensors, tied names; rank 0's counts
    extra: dict[str, Any]


def _collect(model: nn.Module, optimizer: ZeroOptimizer, extra: dict[str, Any]) -> Content:
    """All by name, in the memory where it lies."""
    names = _names_of(model, optimizer)
    state = optimizer.state_dict()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [
        {**{k: v for k, v in group.items() if k != ZERO}, "params": [names[params[i]] for i in group["params"]]}
        for group in state["param_groups"]
    ]
    values = {names[params[i]]: dict(of_param) for i, of_param in state["state"].items()}
    for param, name in names.items():
        if param.dtype == torch.float32 and name in values:
            del values[name][MASTER]  # the weight itself
    model_state, others = _model_state(model)
    first: dict[int, str] = {}
    tensors = {name: value for name, value in model_state.items() if value.numel()}
    tied = {name: first.setdefault(value.data_ptr(), name) for name, value in tensors.items()}
    common = {"param_groups": groups, "model": others, "tied": {a: b for a, b in tied.items() if a != b}}
    return Content(
        {"model": {**model_state, **others}, "optim": {"state": values, "param_groups": groups}}, common, extra
    )


class Writer:
    """One checkpoint, to be written.

    Args:
        group: The ranks that write it together.
        directory: See save_checkpoint.
        step: See save_checkpoint.
        keep: See save_checkpoint.
        collect: Gives this rank's content; called at once.
    """

    def __init__(
        self,
        group: Group,
        directory: str | os.PathLike[str],
        step: int,
        keep: int | None,
        collect: Callable[[], Content],
    ) -> None:
        self._group = group
        self._directory = Path(directory).absolute()  # whatever the working directory is when it is written
        self._step = step
        self._keep = keep
        self._what = f"the save to {directory}"
        _together(group, self._what, lambda: self._take(collect))
        steps = group.gather_objects(self._step, self._what)
        if len(set(steps)) > 1:
            raise ValueError(f"expected the same step on every rank, got {steps}; pass how many steps were taken")

    def _take(self, collect: Callable[[], Content]) -> None:
        if not hasattr(self._step, "__index__") or operator.index(self._step) < 0:
            raise ValueError(f"expected step as a whole number from 0 on, got {self._step!r}; pass how many were taken")
        self._step = operator.index(self._step)
        if self._keep is not None and self._keep < 1:
            raise ValueError(
                f"expected keep as 1 or more, or None, got {self._keep}; pass how many checkpoints to leave"
            )
        content = collect()
        self._state = content.state
        self._in_common = [f"model.{name}" for name in content.common["model"]]
        self._contents = {files.rank_file(self._group.rank): files.to_bytes(content.extra, "extra")}
        if self._group.rank == 0:
            self._contents[files.COMMON] = files.to_bytes(content.common, "the parameter groups and the model")

    def run(self) -> Path:
        """Write, agree, and give the folder its name."""
        is_first = self._group.rank == 0
        began = _together(
            self._group, self._what, lambda: files.begin(self._directory, self._step) if is_first else None
        )
        folder: Path = self._group.gather_objects(began, self._what)[0]
        try:
            _together(self._group, self._what, lambda: self._write(folder))
            metadata = _together(self._group, self._what, lambda: self._write_tensors(folder))
            rows = self._group.gather_objects((self._sums, self._crcs), self._what)
            _together(
                self._group,
                self._what,
                lambda: files.commit(folder, self._index(metadata, rows), self._keep) if is_first else None,
            )
        except CheckpointError:
            if is_first:
                shutil.rmtree(folder, ignore_errors=True)  # a full disk gets its space back
            raise
        complete = folder.with_name(files.name_of(folder))
        log.info("step %d is saved in %s", self._step, complete)
        return complete

    def _write(self, folder: Path) -> None:
        """This rank's .pt files."""
        if not folder.is_dir():
            raise CheckpointError(
                f"expected a directory that all ranks share, got {folder.parent}, in which rank {self._group.rank} "
                f"does not see what rank 0 has written; pass a path on a shared file system"
            )
        for name, content in self._contents.items():
            files.write_file(folder / name, content)
        self._sums = {name: files.sum_of(content) for name, content in self._contents.items()}

    def _write_tensors(self, folder: Path) -> Any:
        from pyzero import checkpoint_storage  # half a second

        self._crcs: checkpoint_storage.Crcs = {}
        with self._progress() as progress:
            return checkpoint_storage.write(self._state, folder, self._group.handle, self._crcs, progress)

    def _index(self, metadata: Any, rows: list[tuple[dict[str, Any], dict[tuple[str, int], tuple[int, int]]]]) -> Any:
        crcs = {place: row for _, of_rank in rows for place, row in of_rank.items()}
        sizes: dict[str, int] = {}
        for (name, offset), (length, _) in crcs.items():
            if not name.startswith("."):
                sizes[name] = max(sizes.get(name, 0), offset + length)
        return {
            "format": files.FORMAT,
            "step": self._step,
            "num_ranks": self._group.size,
            "torch": torch.__version__,
            "files": {name: row for sums, _ in rows for name, row in sums.items()},
            "sizes": sizes,
            "tensors": _describe(metadata, crcs, self._in_common),
        }

    @contextmanager
    def _progress(self) -> Iterator[Callable[[int], object]]:
        """A bar of this rank's bytes, on the first rank of a save that takes long."""
        hidden = self._group.rank != 0
        with tqdm(
            desc=f"step {self._step}", unit="B", unit_scale=True, delay=_SHOW_PROGRESS_AFTER_S, disable=hidden
        ) as bar:
            yield bar.update


def _writer(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: ZeroOptimizer,
    step: int,
    keep: int | None,
    extra: dict[str, Any],
    copies: bool,
) -> Writer:
    """Of a model and its optimizer; copies: of all values, to the host, so that training may go on."""

    def collect() -> Content:
        optimizer.check_between_steps()
        content = _collect(model, optimizer, extra)
        return replace(content, state=_on_host(content.state)) if copies else content

    return Writer(_begin(optimizer), directory, step, keep, collect)


def _on_host(value: Any) -> Any:
    """A copy in host memory, through dicts."""
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value


def _describe(
    metadata: Any, crcs: dict[tuple[str, int], tuple[int, int]], in_common: Collection[str]
) -> dict[str, Any]:
    """Every tensor for the index, from torch's metadata: [offsets, sizes, file, offset in it, length, CRC-32].

    in_common: Names of what is for torch's own loaders; ours take it from common.pt. The parameter groups are too.
    """
    tensors: dict[str, Any] = {}
    of_torch = tuple(f"{name}." for name in (*in_common, "optim.param_groups"))
    places = {
        (index.fqn, tuple(index.offset)): where
        for index, where in metadata.storage_data.items()
        if index.offset is not None
    }
    for name, tensor in metadata.state_dict_metadata.items():
        if not hasattr(tensor, "chunks") or f"{name}.".startswith(of_torch):
            continue
        boxes = []
        for chunk in tensor.chunks:
            where = places[name, tuple(chunk.offsets)]
            length, crc = crcs[where.relative_path, where.offset]
            boxes.append([[*chunk.offsets], [*chunk.sizes], where.relative_path, where.offset, length, crc])
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "shape": [*tensor.size], "boxes": boxes}
    return tensors


# ---- loading --------------------------------------------------------------------------------------------------------


class _Load:
    """One load: all is read into host memory and checked, then copied."""

    def __init__(self, directory: Path, model: nn.Module, optimizer: ZeroOptimizer, strict: bool) -> None:
        self._directory = directory
        self._model = model
        self._optimizer = optimizer
        self._strict = strict
        self._group = _begin(optimizer)
        self._problems: list[str] = []  # how the checkpoint differs from what it is loaded into

    def run(self) -> dict[str, Any]:
        """Read on every rank, agree, and copy."""
        what = f"the load of {self._directory}"
        name = self._group.gather_objects(_together(self._group, what, self._find), what)[0]  # one that all ranks load
        _together(self._group, what, lambda: self._read(self._directory / name))
        self._compare(what)
        with torch.no_grad():
            for name, value in self._others.items():
                self._model_state[name].copy_(value)
        _set_extra_state(self._model, self._common["model"])
        self._optimizer.load_state_dict({"state": self._state, "param_groups": self._groups})
        return {"step": self._index["step"], **self._extra}

    def _find(self) -> Path | None:
        """The folder in the directory, on the first rank: a shared file system may show others an older `latest`."""
        if self._group.rank:
            return None
        folder = files.find(self._directory)
        if folder is None:
            raise CheckpointError(
                f"expected a checkpoint in {self._directory}, got none; save one with pyzero.save_checkpoint(), or ask "
                f"pyzero.latest_checkpoint() first"
            )
        return folder.relative_to(self._directory)

    def _compare(self, what: str) -> None:
        """Raise where ranks have read different checkpoints."""
        found = self._group.gather_objects((self._index["step"], zlib.crc32(json.dumps(self._index).encode())), what)
        for rank, one in enumerate(found):
            if one != found[0]:
                raise CheckpointError(
                    f"expected one checkpoint on all ranks, got step {found[0][0]} on rank 0 and another, of step "
                    f"{one[0]}, on rank {rank}; pass the same directory, on a file system that all ranks share"
                )

    def _read(self, folder: Path) -> None:
        self._index = files.read_index(folder)
        self._common = files.load_file(folder, files.COMMON, self._index)
        is_same = self._index["num_ranks"] == self._group.size
        self._extra = files.load_file(folder, files.rank_file(self._group.rank if is_same else 0), self._index)
        wanted = self._plan()
        if self._problems and self._strict:
            raise CheckpointError(
                f"expected the model and the optimizer that {folder} was saved from, got others: "
                f"{'; '.join(self._problems)}. Build them as they were, or pass strict=False to leave these out"
            )
        for problem in self._problems:
            log.info("loading %s: %s", folder, problem)
        from pyzero import checkpoint_storage

        checkpoint_storage.read(wanted, folder, self._index)

    def _plan(self) -> dict[str, Tensor]:
        """Host memory for what is to be read, by its name in the checkpoint; what does not fit, as problems."""
        saved = self._index["tensors"]
        state = self._optimizer.state_dict()
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        names_of = _names_of(self._model, self._optimizer)
        names = [names_of[param] for param in params]
        self._model_state, _ = _model_state(self._model)
        places = {  # where in the checkpoint each value of the state lies
            number: {key: f"optim.state.{names[number]}.{key}" for key in values}
            for number, values in state["state"].items()
            if params[number].numel() or f"optim.state.{names[number]}.{STEP}" in saved
        }
        for number, of_param in places.items():
            if of_param[MASTER] not in saved:
                of_param[MASTER] = f"model.{names[number]}"  # the weight is its own master, or all that there is
        like = {place: state["state"][n][key] for n, of_param in places.items() for key, place in of_param.items()}
        trained = {params[number].data_ptr() for number in places if params[number].numel()}
        others = {n: v for n, v in self._model_state.items() if v.data_ptr() not in trained}
        like.update({f"model.{name}": value for name, value in others.items() if f"model.{name}" not in like})
        known = {*like, *(f"model.{name}" for name in self._model_state)}
        self._report("missing", [name for name in like if name not in saved])
        self._report("unexpected", [name for name in saved if name not in known])
        shapes = {name: (saved[name]["shape"], list(like[name].shape)) for name in like if name in saved}
        self._report(
            "of another shape", [f"{n} {got}, wanted {want}" for n, (got, want) in shapes.items() if got != want]
        )
        fitting = [name for name, (got, want) in shapes.items() if got == want]
        wanted = {name: like[name].new_empty(like[name].shape, device="cpu") for name in fitting}
        self._state = {
            number: {
                key: wanted.get(place, state["state"][number][key])
                for key, place in of_param.items()
                if key != MASTER or place in wanted
            }
            for number, of_param in places.items()
        }
        self._others = {name: wanted[f"model.{name}"] for name in others if f"model.{name}" in wanted}
        self._groups = self._match_groups(state["param_groups"], names)
        return wanted

    def _match_groups(self, groups: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
        """The optimizer's groups with the hyper-parameters that their parameters were saved with."""
        saved = self._common["param_groups"]
        group_of = {name: index for index, group in enumerate(saved) for name in group["params"]}
        matched = []
        for index, group in enumerate(groups):
            found = sorted({group_of[names[i]] for i in group["params"] if names[i] in group_of})
            options = [{key: value for key, value in saved[i].items() if key not in _OF_ITS_OWN} for i in found]
            if any(repr(other) != repr(options[0]) for other in options):
                self._problems.append(f"group {index} holds parameters of the saved groups {found}, which differ")
            matched.append({**group, **(options[0] if options else {})})
        matched[0][SCALER] = saved[0][SCALER]
        return matched

    def _report(self, what: str, names: list[str]) -> None:
        if names:
            shown = ", ".join(sorted(names)[:_MOST_SHOWN]) + (
                f" and {len(names) - _MOST_SHOWN} more" * (len(names) > _MOST_SHOWN)
            )
            self._problems.append(f"{what}: {shown}")
