"""load_checkpoint: loads on any number of ranks, and changes nothing before all of it is read and checked."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyzero.checkpoint import files
from pyzero.checkpoint.agreement import run_on_all_ranks
from pyzero.checkpoint.content import (
    EXCLUDED,
    PARTS,
    check_parts,
    comparable,
    model_state,
    names_of,
    own_tensors,
    set_extra_state,
)
from pyzero.checkpoint.files import CheckpointError
from pyzero.checkpoint.saving import begin, wait_for_saves
from pyzero.gradients.hooks import trained
from pyzero.optimizer import ZeroOptimizer
from pyzero.rank_state.notes import RULE, SCALER
from pyzero.sharding.buckets import MASTER, STEP
from pyzero.sharding.local_param import empty_on_host, local_of

log = logging.getLogger("pyzero")

_MOST_SHOWN = 5  # names in a report
_DECOUPLED = "decoupled_weight_decay"  # tells AdamW from Adam
_STATE = "optim.state."  # prefix of the names of a parameter's state
_NO_OPTIONS = ("params", "param_names", SCALER)  # keys of a group that are not hyper-parameters


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Return the folder that load_checkpoint would load; None if there is no checkpoint yet.

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
    """Load what save_checkpoint saved, on any number of ranks, in any stage, with any buckets and order of groups.

    With the same gradients, training continues bit for bit. Every rank of the optimizer's process group and of its
    model_parallel_group calls it. All of it is read and checked before anything is changed.

    Args:
        directory: The directory of save_checkpoint, to load the latest, or the folder of one checkpoint.
        model: A model with the same parameter names. Its dtypes may differ, because masters are fp32 on both sides.
        optimizer: An optimizer with the same update rule, over the same parameters.
        strict: False leaves alone what the checkpoint lacks, and ignores what the model lacks. It also ignores the
            options of another update rule, and the state of parameters that are frozen here.

    Returns:
        A dict of "step" and the saved `extra`: this rank's on as many ranks, otherwise the first rank's.

    Raises:
        CheckpointError: There is no checkpoint; a file is missing, cut or damaged; it has other parameters or another
            update rule's state; or it has parts of another number of model-parallel ranks. On all ranks.
        TypeError: `optimizer` is not one of pyzero's, or `model` is not a module.
    """
    return _Load(directory, model, optimizer, strict).run()


def load_weights(directory: Path, model: nn.Module, optimizer: ZeroOptimizer, strict: bool) -> dict[str, Any]:
    """Load only the model of a checkpoint, whatever optimizer and trained parameters it was saved with.

    fp32 weights are read from the saved masters. The optimizer's masters follow the weights; its state, groups and loss
    scale stay.
    """
    return _Load(directory, model, optimizer, strict, weights_only=True).run()


def read_weights(directory: Path, model: nn.Module, optimizer: ZeroOptimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all weights and buffers of a checkpoint, whole, in host memory, and what load_weights returns.

    Changes neither model nor optimizer.
    """
    return _Load(directory, model, optimizer, strict=False, weights_only=True).read_whole()


class _Load:
    """One load. It reads all into host memory and checks it, and then copies it."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        model: nn.Module,
        optimizer: ZeroOptimizer,
        strict: bool,
        weights_only: bool = False,
    ) -> None:
        self._given = directory
        self._model = model
        self._optimizer = optimizer
        self._strict = strict
        self._weights_only = weights_only
        self._group = begin(optimizer)
        self._problems: list[str] = []  # how the checkpoint differs from what it is loaded into

    def run(self) -> dict[str, Any]:
        """Read on every rank, agree, and copy."""
        self._read_on_all_ranks(self._read)
        if not self._weights_only:  # before all else, because it may refuse
            self._optimizer.load_state_dict({"state": self._state, "param_groups": self._groups})
        with torch.no_grad():
            for name, value in self._others.items():
                local_of(self._own[name]).copy_(local_of(value))
            if self._weights_only:  # no version counter shows a write through a DTensor's local tensor
                for param, name in names_of(self._model, self._optimizer).items():
                    if name in self._others:
                        torch.autograd.graph.increment_version(local_of(param))
        set_extra_state(self._model, self._common["model"])
        return {"step": self._index["step"], **self._extra}

    def read_whole(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """See read_weights."""
        self._read_on_all_ranks(self._read_whole)
        return {**self._whole, **self._common["model"]}, {"step": self._index["step"], **self._extra}

    def _read_on_all_ranks(self, read: Callable[[Path], None]) -> None:
        what = f"the load of {self._given}"
        self._elsewhere = self._on_other_ranks(what)
        found = run_on_all_ranks(self._group, what, self._find)
        name = self._group.gather_objects(found, what)[0]  # all ranks load the same folder
        run_on_all_ranks(self._group, what, lambda: self._open(self._directory / name))
        if self._strict and not self._weights_only:
            frozen = run_on_all_ranks(self._group, what, self._frozen_with_state)
            with trained(*frozen):  # as load_state_dict does
                begin(self._optimizer)
        run_on_all_ranks(self._group, what, lambda: read(self._directory / name))
        self._compare(what)

    def _on_other_ranks(self, what: str) -> set[str]:
        """Return the names in the checkpoint that any model-parallel rank loads."""
        if self._optimizer.model_parallel_rank is None:
            return set()
        mine = run_on_all_ranks(self._group, what, self._names_here)
        return set().union(*self._group.gather_objects(mine, what))

    def _names_here(self) -> list[str]:
        """Return the names in the checkpoint of all that this rank has."""
        keys = {key for values in self._optimizer.state_dict()["state"].values() for key in values}
        names = names_of(self._model, self._optimizer).values()
        state = [f"{_STATE}{name}.{key}" for name in names for key in keys]
        return [*state, *(f"model.{name}" for name in model_state(self._model, self._optimizer)[0])]

    def _find(self) -> Path | None:
        """Return the folder's name, on the first rank only: a shared file system may show others an older `latest`."""
        self._directory = Path(self._given)
        if self._group.rank:
            return None
        wait_for_saves()
        folder = files.find(self._directory)
        if folder is None:
            raise CheckpointError(
                f"expected a checkpoint in {self._directory}, got none; save one with pyzero.save_checkpoint(), or ask "
                f"pyzero.latest_checkpoint() first"
            )
        return folder.relative_to(self._directory)

    def _compare(self, what: str) -> None:
        """Raise if ranks have read different checkpoints."""
        found = self._group.gather_objects((self._index["step"], zlib.crc32(json.dumps(self._index).encode())), what)
        for rank, one in enumerate(found):
            if one != found[0]:
                raise CheckpointError(
                    f"expected one checkpoint on all ranks, got step {found[0][0]} on rank 0 and another, of step "
                    f"{one[0]}, on rank {rank}; pass the same directory, on a file system that all ranks share"
                )

    def _open(self, folder: Path) -> None:
        self._index = files.read_index(folder)
        self._common = files.load_file(folder, files.COMMON, self._index)
        check_parts(self._model, self._optimizer, self._common.get(PARTS, 0), folder)
        is_same = self._index["num_ranks"] == self._group.size
        self._extra = files.load_file(folder, files.rank_file(self._group.rank if is_same else 0), self._index)

    def _frozen_with_state(self) -> list[Tensor]:
        """Return the frozen parameters without state here that the checkpoint has state for, from when they trained."""
        names = names_of(self._model, self._optimizer)
        saved = self._index["tensors"]
        return self._optimizer._could_have_state(param for param, name in names.items() if _step_of(name) in saved)

    def _read_whole(self, folder: Path) -> None:
        wanted = {
            name: torch.empty(tensor["shape"], dtype=getattr(torch, tensor["dtype"]), device="cpu")
            for name, tensor in self._index["tensors"].items()
            if name.startswith("model.")
        }
        self._fill(wanted, folder)
        self._whole = {name.removeprefix("model."): tensor for name, tensor in wanted.items()}

    def _read(self, folder: Path) -> None:
        wanted = self._plan()
        if self._problems and self._strict:
            raise CheckpointError(
                f"expected the model and the optimizer that {folder} was saved from, got others: "
                f"{'; '.join(self._problems)}. Build them as they were, or pass strict=False (to an engine: "
                f"load_module_strict=False) to leave these out{self._lost_state()}"
            )
        for problem in self._problems:
            log.info("loading %s: %s", folder, problem)
        self._fill(wanted, folder)

    def _fill(self, wanted: dict[str, Tensor], folder: Path) -> None:
        from pyzero.checkpoint import storage

        storage.read(wanted, folder, self._index)

    def _lost_state(self) -> str:
        """Say what strict=False would do with the state of another update rule. Empty for the same rule."""
        if self._weights_only or self._optimizer._takes_rule(self._common.get(RULE)):
            return ""
        mine = {key for of_param in self._state.values() for key in of_param} - {MASTER, STEP}
        saved = {name.rpartition(".")[2] for name in self._index["tensors"] if name.startswith(_STATE)}
        said = []
        if dropped := saved - mine - {MASTER, STEP}:
            said.append(f"drops the saved {', '.join(sorted(dropped))}")
        if new := mine - saved:
            said.append(f"goes on with {', '.join(sorted(new))} as in this optimizer, 0 in a new one")
        return f", which {' and '.join(said)}" if said else ""

    def _plan(self) -> dict[str, Tensor]:
        """Return host memory for all that is to be read, by name in the checkpoint. Report misfits in `_problems`."""
        self._model_state, _ = model_state(self._model, self._optimizer)
        state = self._optimizer.state_dict()
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        by_param = names_of(self._model, self._optimizer)
        names = [by_param[param] for param in params]
        self._own = own_tensors(self._model, self._optimizer, self._model_state)
        saved_names = {} if self._weights_only else self._saved_names(state["state"], params, names)
        others = self._untrained({names[number]: params[number] for number in saved_names})
        self._report(
            "tensors that the model's state_dict() makes anew, so that nothing can be loaded into them (register them "
            "as buffers)",
            [name for name in others if name not in self._own],
        )
        others = {name: value for name, value in others.items() if name in self._own}
        saved_name_of = {name: self._saved_name_of(name, value) for name, value in others.items()}
        like = {
            saved_name: state["state"][n][key]
            for n, of_param in saved_names.items()
            for key, saved_name in of_param.items()
        }
        like.update({saved_name_of[name]: value for name, value in others.items() if saved_name_of[name] not in like})
        wanted = self._fitting(like, others)
        self._state = {
            number: {
                key: wanted.get(saved_name, state["state"][number][key])
                for key, saved_name in of_param.items()
                if key != MASTER or saved_name in wanted
            }
            for number, of_param in saved_names.items()
        }
        self._others = {name: wanted[saved_name] for name, saved_name in saved_name_of.items() if saved_name in wanted}
        self._groups = [] if self._weights_only else self._match_groups(state["param_groups"], names)
        return wanted

    def _saved_names(
        self, state: dict[int, dict[str, Tensor]], params: list[Tensor], names: list[str]
    ) -> dict[int, dict[str, str]]:
        """Return the name in the checkpoint of each value of a parameter's state, by the parameter's number."""
        saved = self._index["tensors"]
        saved_names = {
            number: {key: f"{_STATE}{names[number]}.{key}" for key in values}
            for number, values in state.items()
            if params[number].numel() or _step_of(names[number]) in saved
        }
        for number, of_param in saved_names.items():
            if of_param[MASTER] not in saved:
                of_param[MASTER] = f"model.{names[number]}"  # the weight is its own master, or no master was saved
        return saved_names

    def _saved_name_of(self, name: str, value: Tensor) -> str:
        """Return the name in the checkpoint of a model's tensor that the optimizer does not load."""
        master = f"{_STATE}{self._common['tied'].get(name, name)}.{MASTER}"
        takes_master = self._weights_only and value.dtype == torch.float32 and master in self._index["tensors"]
        return master if takes_master else f"model.{name}"

    def _untrained(self, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's tensors, by name, that are neither trained parameters nor tied to one."""
        addresses = {local_of(param).data_ptr() for param in trained.values() if local_of(param).numel()}
        return {
            name: value
            for name, value in self._model_state.items()
            if name not in trained and local_of(self._own.get(name, value)).data_ptr() not in addresses
        }

    def _fitting(self, like: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return host memory for the tensors of `like` that the checkpoint has in the same shape. Report the others."""
        saved = self._index["tensors"]
        known = {*like, *(f"model.{name}" for name in self._model_state)}
        if self._weights_only:
            known |= {name for name in saved if name.startswith("optim.")}
        left_out = {f"model.{name}" for name in self._common.get(EXCLUDED, ()) if name in others}
        shapes = {name: (saved[name]["shape"], list(like[name].shape)) for name in like if name in saved}
        missing = [name for name in like if name not in saved and name not in left_out]
        unexpected = [name for name in saved if name not in known and name not in self._elsewhere]
        not_here, not_there = _untrained_of(unexpected, like, known), _untrained_of(missing, saved, saved)
        self._report("missing", [name for name in missing if _param_of(name) not in not_there])
        self._report("unexpected", [name for name in unexpected if _param_of(name) not in not_here])
        self._report(
            "state of parameters that do not train here (strict=True keeps it for those that the optimizer has)",
            not_here,
        )
        self._report(
            "no state of parameters that did not train there (build the optimizer with them frozen, and unfreeze them "
            "after the load)",
            not_there,
        )
        self._report(
            "of another shape", [f"{n} {got}, wanted {want}" for n, (got, want) in shapes.items() if got != want]
        )
        return {name: empty_on_host(like[name]) for name, (got, want) in shapes.items() if got == want}

    def _match_groups(self, groups: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
        """Return the optimizer's groups with the hyper-parameters that their parameters were saved with."""
        saved, rule = self._common["param_groups"], self._common.get(RULE)
        if not self._optimizer._takes_rule(rule):
            self._problems.insert(0, f"of the update rule {rule}, wanted {self._optimizer.rule_name}")
            saved = [{"params": [], SCALER: group.get(SCALER)} for group in saved]  # the rule's options do not fit here
        group_of = {name: index for index, group in enumerate(saved) for name in group["params"]}
        matched = []
        for index, group in enumerate(groups):
            found = sorted({group_of[names[i]] for i in group["params"] if names[i] in group_of})
            options = [{key: value for key, value in saved[i].items() if key not in _NO_OPTIONS} for i in found]
            if not all(self._optimizer._is_of_rule(index, of_group) for of_group in options):
                self._problems.append(f"group {index} holds parameters of another update rule")
                options = [of_group for of_group in options if self._optimizer._is_of_rule(index, of_group)]
            if any(comparable(other) != comparable(options[0]) for other in options):
                self._problems.append(f"group {index} holds parameters of the saved groups {found}, which differ")
            matched.append({**group, **(options[0] if options else {})})
            if matched[-1].get(_DECOUPLED) != group.get(_DECOUPLED) and self._group.rank == 0:
                log.warning(
                    "group %d goes on with %s=%s, as it was saved; set it in param_groups after the load for another",
                    *(index, _DECOUPLED, matched[-1].get(_DECOUPLED)),
                )
        matched[0][SCALER] = saved[0][SCALER]
        return matched

    def _report(self, what: str, names: Collection[str]) -> None:
        if names:
            shown = ", ".join(sorted(names)[:_MOST_SHOWN]) + (
                f" and {len(names) - _MOST_SHOWN} more" * (len(names) > _MOST_SHOWN)
            )
            self._problems.append(f"{what}: {shown}")


def _step_of(name: str) -> str:
    """Return the name in a checkpoint of a parameter's step count."""
    return f"{_STATE}{name}.{STEP}"


def _param_of(name: str) -> str | None:
    """Return the parameter whose state a name in a checkpoint belongs to; None for other names."""
    return name.removeprefix(_STATE).rpartition(".")[0] if name.startswith(_STATE) else None


def _untrained_of(names: Iterable[str], trained: Iterable[str], weights: Collection[str]) -> set[str]:
    """Return the parameters of the state in `names` that have weights in `weights`, but no state in `trained`."""
    found = {_param_of(name) for name in names} - {_param_of(name) for name in trained}
    return {param for param in found if param is not None and f"model.{param}" in weights}
