"""The engine's checkpoints: DeepSpeed's folders by tag and its `latest` file, with pyzero's checkpoints in them."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from pyzero.checkpoint import files
from pyzero.checkpoint.agreement import run_on_all_ranks
from pyzero.checkpoint.content import names_of
from pyzero.checkpoint.convert import import_deepspeed
from pyzero.checkpoint.files import CheckpointError
from pyzero.checkpoint.loading import load_checkpoint, load_weights, read_weights
from pyzero.checkpoint.saving import begin, save_checkpoint
from pyzero.comm.work import CollectiveError
from pyzero.deepspeed.config.schema import Batches
from pyzero.deepspeed.schedules import Schedule, set_rate
from pyzero.optimizer import ZeroOptimizer
from pyzero.sharding.fsdp import has_unsent_gradients, reshard
from pyzero.sharding.local_param import shard_of

log = logging.getLogger("pyzero")

_THEIRS = "*mp_rank_*_states.pt"  # files that DeepSpeed writes into a checkpoint's folder
_TAG_PART = re.compile(r"(?!\.|latest$)[^/\\\0\n\r\ud800-\udfff]+")
_OWN_FOLDER = re.compile(r"step_\d+(\.\d+)?")  # in the folder of a tag
_COUNTERS = ("global_steps", "global_samples")
_SCRIPT = """\
# python zero_to_fp32.py CHECKPOINT_DIR OUTPUT_DIR writes whole fp32 weights; --help lists options
from pyzero.deepspeed.zero_to_fp32 import main

main()
"""


class EngineCheckpoints:
    """The part of Engine for checkpoints. All ranks make the same calls."""

    module: nn.Module
    optimizer: ZeroOptimizer
    lr_scheduler: Any
    rank: int
    global_steps: int
    micro_steps: int
    batches: Batches

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See Engine."""
        raise NotImplementedError

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | int | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save everything into save_dir/tag: weights, the optimizer's state, loss scale, schedule and counters.

        Args:
            save_dir: A folder that all ranks see.
            tag: Name of the checkpoint, the same on every rank; default: global_step and its number.
            client_state: More plain data of this rank. `load_checkpoint` returns it.
            save_latest: Make `load_checkpoint` find this checkpoint without its tag, once it is complete.
            exclude_frozen_parameters: See pyzero.save_checkpoint.

        Returns:
            True.

        Raises:
            ValueError: The tag cannot name a folder, or is `latest`; or save_dir is empty.
            CheckpointError: See pyzero.save_checkpoint. Or the save is in the middle of an accumulation.
            CollectiveError, TypeError: See pyzero.save_checkpoint.
        """
        if not save_dir:
            raise ValueError(f"expected a folder to save into, got {save_dir!r}; pass one, as '.'")
        group, what = begin(self.optimizer), f"the save into {save_dir}"
        name = run_on_all_ranks(
            group, what, lambda: _checked(f"global_step{self.global_steps}" if tag is None else str(tag))
        )
        scheduler = None if self.lr_scheduler is None else self.lr_scheduler.state_dict()
        run_on_all_ranks(group, what, self._check_between_steps)
        save_checkpoint(
            Path(save_dir) / name,
            model=self.module,
            optimizer=self.optimizer,
            step=self.global_steps,
            keep=1,
            exclude_frozen_parameters=exclude_frozen_parameters,
            counters={counter: getattr(self, counter) for counter in _COUNTERS},
            lr_scheduler=scheduler,
            client_state={} if client_state is None else client_state,
        )
        run_on_all_ranks(group, what, lambda: None if self.rank else _finish(Path(save_dir), name, save_latest))
        return True

    def load_module_state_dict(
        self, checkpoint: dict[str, Any], strict: bool = True, custom_load_fn: Any = None, **ignored: Any
    ) -> None:
        """Load weights from `checkpoint["module"]`, a state dict of whole tensors; masters follow. All ranks call it.

        Args:
            checkpoint: A dict with the key "module".
            strict: As of load_state_dict.
            custom_load_fn: As of `load_checkpoint`.
            **ignored: DeepSpeed's fetch_z3_params and others: shards are written as they are.
        """
        weights = checkpoint["module"]
        if custom_load_fn is not None:
            self._load_by(custom_load_fn, weights)
        else:
            reshard(self.module)
            params = dict(self.module.named_parameters(remove_duplicate=False))
            shards = {name: shard_of(value, params.get(name)) for name, value in weights.items()}
            self.module.load_state_dict(shards, strict=strict)
        if self.optimizer is not None:
            self.optimizer.refresh_fp32_params()

    def _check_between_steps(self) -> None:
        """Raise RuntimeError in the middle of an accumulation, also if `.grad` is torch's, as on one rank.

        In stage 3, gradients may also be those that no_sync() has kept.
        """
        trained = (param for group in self.optimizer.param_groups for param in group["params"])
        has_grads = any(param.grad is not None for param in trained) or has_unsent_gradients(self.module)
        if not self.optimizer.reduces_grads and has_grads:
            raise RuntimeError(
                "expected a save between steps, got one in the middle of an accumulation, whose gradients would be "
                "lost; save where engine.is_gradient_accumulation_boundary() was true before step(), after it"
            )

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | int | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint of `save_checkpoint`, or of DeepSpeed in stage 1 or 2, on any number of ranks.

        A checkpoint of DeepSpeed is first translated into a temporary folder in load_dir.

        Args:
            load_dir: The save_dir of the checkpoint.
            tag: Name of the checkpoint; default: the latest.
            load_module_strict: False leaves alone what the checkpoint lacks.
            load_optimizer_states: False loads only the weights, whatever optimizer was saved. The masters follow them.
            load_lr_scheduler_states: False leaves the schedule and its rates alone. With True, a schedule of the config
                loads only its count, and continues by the config.
            load_module_only: Load only the weights. Counters, optimizer and schedule stay.
            custom_load_fn: Called on every rank as `custom_load_fn(src=weights, dst=engine.module)`, instead of the
                load of weights. `src` has all weights and buffers by name, whole, on the CPU, as they were saved. The
                masters follow what it writes. Needs load_module_only=True or load_optimizer_states=False.

        Returns:
            (folder, client_state). client_state is this rank's if as many ranks saved it, otherwise the first rank's.
            (None, None) if no tag is given and there is no latest.

        Raises:
            ValueError: The tag cannot name a folder, ranks pass different tags, or custom_load_fn is passed for a load
                of the optimizer's state too, or replaced parameters on any rank.
            CheckpointError: `latest` is damaged. See also pyzero.load_checkpoint.
            CollectiveError: See pyzero.load_checkpoint.
            FileNotFoundError: A file of DeepSpeed's is missing.
        """
        loads_all = load_optimizer_states and not load_module_only
        if custom_load_fn is not None and loads_all:
            raise ValueError(
                "expected custom_load_fn for weights alone, got it beside the optimizer's state, whose masters would "
                "overwrite what it writes; pass load_optimizer_states=False, or load_module_only=True"
            )
        group, what = begin(self.optimizer), f"the load of {load_dir}"

        def find() -> str | None:
            if tag is not None:
                return _checked(str(tag))
            return None if group.rank else _latest(Path(load_dir))  # other ranks may see an older file

        tags, names = zip(*group.gather_objects((tag, run_on_all_ranks(group, what, find)), what), strict=True)
        if len({str(one) for one in tags}) > 1:
            raise ValueError(f"expected the same tag on every rank, got {[*tags]}; pass one to all, or None to all")
        name = names[0]
        if name is None:
            if self.rank == 0:
                log.warning("no checkpoint is loaded, for there is no file %s; pass a tag, or save one", files.LATEST)
            return None, None
        folder = Path(load_dir) / name
        load = load_checkpoint if loads_all else load_weights
        with self._as_ours(folder) as ours:
            if custom_load_fn is None:
                loaded = load(ours, model=self.module, optimizer=self.optimizer, strict=load_module_strict)
            else:
                weights, loaded = read_weights(ours, self.module, self.optimizer)
                run_on_all_ranks(group, what, lambda: self._load_by(custom_load_fn, weights))
                self.optimizer.refresh_fp32_params()
        if not load_module_only:
            steps = loaded["step"]
            theirs = {"global_steps": steps, "global_samples": steps * self.batches.train}
            counters = loaded.get("counters", theirs)
            for counter in _COUNTERS:
                setattr(self, counter, counters[counter])
            self.micro_steps = steps * self.batches.accumulation  # a step begins, whatever the saver had
            self.zero_grad()  # drops gradients of an unfinished accumulation
            self._load_schedule(loaded.get("lr_scheduler") if load_lr_scheduler_states else None, load_optimizer_states)
        return str(folder), loaded.get("client_state", {})  # a checkpoint of pyzero.save_checkpoint has none

    def _load_by(self, custom_load_fn: Any, weights: dict[str, Any]) -> None:
        names = {} if self.optimizer is None else names_of(self.module, self.optimizer)
        custom_load_fn(src=weights, dst=self.module)
        reshard(self.module)
        lost = [names[param] for param in names.keys() - set(self.module.parameters())]
        if lost:
            raise ValueError(
                f"expected custom_load_fn to write into the parameters that the optimizer trains, got {len(lost)} of "
                f"{len(names)} replaced by others, {min(lost)} first; build the engine anew, and copy into them, as "
                f"load_state_dict() does without assign=True"
            )

    def _load_schedule(self, state: dict[str, Any] | None, has_groups: bool) -> None:
        """Load the schedule's state; None leaves it alone. has_groups: Whether the groups' rates were loaded.

        If only one of the two was loaded, the groups take the schedule's rates. Otherwise torch's schedules that
        compute a rate from the last one would stay wrong for ever.
        """
        schedule = self.lr_scheduler
        if schedule is None:
            return
        if state is not None:
            schedule.load_state_dict(state)
        if (state is not None) != has_groups:
            for group, rate in zip(self.optimizer.param_groups, getattr(schedule, "get_last_lr", list)(), strict=False):
                set_rate(group, rate)
        if isinstance(schedule, Schedule) and (state is not None or has_groups):
            schedule.apply()

    @contextmanager
    def _as_ours(self, folder: Path) -> Iterator[Path]:
        """Yield the checkpoint's folder, or a temporary translation if it is DeepSpeed's. pyzero's goes first."""
        if (folder / files.LATEST).is_file() or not any(folder.glob(_THEIRS)):
            yield folder
            return
        group = self.optimizer._checkpoint_group()
        ours = folder.with_name(f".translated_{folder.name}")

        def translate() -> None:
            if group.rank == 0:
                import_deepspeed(folder.parent, ours, folder.name)

        try:
            run_on_all_ranks(group, f"the translation of DeepSpeed's checkpoint {folder}", translate)
            yield ours
        finally:
            with suppress(CollectiveError):  # the caller gets the error that broke the group
                group.gather_objects(None, f"the end of the load of {folder}")  # wait until all have read it
            if group.rank == 0:
                shutil.rmtree(ours, ignore_errors=True)


def _finish(folder: Path, name: str, is_latest: bool) -> None:
    """Write what lies beside the checkpoints: zero_to_fp32.py, as DeepSpeed does, and `latest`."""
    script = folder / "zero_to_fp32.py"
    if not script.is_file() or script.read_text() != _SCRIPT:
        script.write_text(_SCRIPT)
    if is_latest:
        files.write_latest(folder, name)


def _checked(tag: str) -> str:
    first, *others = tag.split("/")
    are_names = all(_TAG_PART.fullmatch(part) for part in (first, *others)) and tag == tag.strip()
    if not are_names or any(_OWN_FOLDER.fullmatch(part) for part in others):
        raise ValueError(
            f"expected a tag that can name a folder, got {tag!r}; leave out leading dots, spaces at the ends, "
            f"{files.LATEST!r}, which is a file, and step_ with a number after a slash, as a checkpoint's own folders"
        )
    return tag


def _latest(folder: Path) -> str | None:
    """Return the tag in `latest`; None if there is no such file."""
    path = folder / files.LATEST
    if not path.exists():
        return None
    text = path.read_text(errors="replace").strip()
    try:
        return _checked(text)
    except ValueError:
        raise CheckpointError(
            f"expected {path} to hold the tag of a checkpoint, got {text[:80]!r}; pass tag=, or write one there"
        ) from None
