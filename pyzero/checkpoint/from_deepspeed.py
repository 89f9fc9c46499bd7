"""Reads DeepSpeed's ZeRO-1 and ZeRO-2 checkpoints without DeepSpeed, and runs no code from their files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyzero.checkpoint import deepspeed_files as files

log = logging.getLogger("pyzero")

_T = TypeVar("_T")

# The keys that DeepSpeed's engine writes. All other keys are the caller's client_state.
_ENGINE_KEYS = frozenset(
    "module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments lr_scheduler "
    "data_sampler random_ltd sparse_tensor_module_names skipped_steps global_steps global_samples dp_world_size "
    "mp_world_size checkpoint_parallel_dimensions ds_config ds_version universal_checkpoint_info".split()
)
_HYPER = {"lr": float, "betas": tuple, "eps": float, "weight_decay": float, "maximize": bool, "initial_lr": float}
_SLOTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class LossScaleState:
    """The state of DeepSpeed's loss scaler. If `growth_interval` is None, the scale is fixed."""

    scale: float  # 0: no loss scale
    growth_interval: int | None = None  # DeepSpeed's scale_window
    hysteresis_left: int = 1
    num_clean_steps: int = 0  # since the last overflow, or since the start

    @property
    def growth_tracker(self) -> int:
        """The tracker of `pyzero.ops.loss_scale_update_` with growth_delay=1: -1 before the first clean step."""
        if self.growth_interval is None:
            return 0
        return (self.num_clean_steps - 1) % self.growth_interval if self.num_clean_steps else -1


@dataclass(frozen=True)
class ParamGroup:
    """A parameter group of DeepSpeed's optimizer."""

    names: list[str]
    hyper: dict[str, Any]  # those of lr, betas, eps, weight_decay, ... that the file has
    decoupled_weight_decay: bool | None  # None: the file does not say


@dataclass(frozen=True)
class DeepSpeedCheckpoint:
    """The content of a checkpoint, with the ranks' partitions joined."""

    params: dict[str, dict[str, Tensor]]  # trained ones: "master", "exp_avg", "exp_avg_sq" in fp32, and "step" (0-D)
    module: dict[str, Tensor]  # the module's state_dict: all weights, frozen ones too, and buffers
    shared: dict[str, str]  # other names of tied parameters, each with the parameter's name in `params`
    groups: list[ParamGroup]
    loss_scale: LossScaleState
    global_steps: int  # including skipped steps
    skipped_steps: int
    lr_scheduler: dict[str, Any] | None
    client_state: dict[str, Any]


def read(directory: str | Path, tag: str | None = None) -> DeepSpeedCheckpoint:
    """Read what DeepSpeed's `engine.save_checkpoint(directory, tag)` wrote in stage 1 or 2, on any number of ranks.

    torch's restricted unpickler reads the files. It accepts tensors and plain data, and makes objects without code for
    four classes of DeepSpeed. Tensors that need no conversion are mapped from the files, so keep the files until you
    have copied these tensors.

    Args:
        directory: The folder that contains `latest`, or the folders of the tags.
        tag: The checkpoint to read; default: the one that `latest` names.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: A file is damaged or names other classes, or the checkpoint is of another kind.
    """
    folder = files.folder(Path(directory), tag)
    model = files.load(files.model_file(folder))
    ranks = [files.load(path) for path in files.optimizer_files(folder)]
    try:
        return _assemble(model, [_item(rank, "optimizer_state_dict", dict, folder) for rank in ranks], folder)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected the files of {folder} as DeepSpeed 0.7 or newer writes them in ZeRO stage 1 or 2, got others "
            f"({type(error).__name__}: {error}); convert them with DeepSpeed's own tools"
        ) from error


def _assemble(model: dict[str, Any], states: list[dict[str, Any]], folder: Path) -> DeepSpeedCheckpoint:
    _check_kind(states, folder)
    shapes = _item(model, "param_shapes", list, folder)
    config = model.get("ds_config")
    params = dict(_params(states, shapes, folder))
    module = {n: value for n, value in _item(model, "module", dict, folder).items() if isinstance(value, Tensor)}
    _warn_of_other_masters(params, module, folder)
    return DeepSpeedCheckpoint(
        params=params,
        module=module,
        shared=dict(model.get("shared_params") or {}),
        groups=_groups(states[0], shapes, config if isinstance(config, dict) else {}),
        loss_scale=_loss_scale(states[0].get("loss_scaler")),
        global_steps=_item(model, "global_steps", int, folder),
        skipped_steps=_item(model, "skipped_steps", int, folder),
        lr_scheduler=model.get("lr_scheduler"),
        client_state={key: value for key, value in model.items() if key not in _ENGINE_KEYS},
    )


def scaler_state(checkpoint: DeepSpeedCheckpoint) -> Tensor:
    """Return the (5,) fp32 state of pyzero's loss scale. Its skips in a row are 0 or 1: the files do not count them."""
    scale = checkpoint.loss_scale
    in_a_row = scale.growth_interval is not None and checkpoint.skipped_steps > 0 and scale.num_clean_steps == 0
    counts = [scale.growth_tracker, scale.hysteresis_left, checkpoint.skipped_steps, int(in_a_row)]
    return torch.tensor([scale.scale, *counts], dtype=torch.float32)


def _item(container: Mapping[str, Any], key: str, kind: type[_T], folder: Path) -> _T:
    value = container.get(key)
    if not isinstance(value, kind):
        raise ValueError(
            f"expected {key} as a {kind.__name__} in the files of {folder}, got {type(value).__name__}; pass a ZeRO-1 "
            f"or ZeRO-2 checkpoint of DeepSpeed 0.7 or newer"
        )
    return value


def _check_kind(states: Sequence[dict[str, Any]], folder: Path) -> None:
    for rank, state in enumerate(states):
        stage, counts = state.get("zero_stage", 1), state.get("partition_count")  # BF16_Optimizer's has no stage
        if stage not in (1, 2):
            raise ValueError(f"expected ZeRO stage 1 or 2 in {folder}, got {stage}; convert it with DeepSpeed's tools")
        counts = counts if isinstance(counts, list) else [counts]
        if any(count != len(states) for count in counts):
            raise ValueError(
                f"expected the files of {counts} ranks in {folder}, as that of rank {rank} says, got {len(states)}; "
                f"copy the files of all ranks, of one run, without any of an earlier one"
            )


def _warn_of_other_masters(params: dict[str, dict[str, Tensor]], module: dict[str, Tensor], folder: Path) -> None:
    """Warn if weights are not the rounded masters. A caller may have written weights alone, so this is no error."""
    pairs = {name: (values["master"], module[name]) for name, values in params.items() if name in module}
    other = [name for name, (master, weight) in pairs.items() if not torch.equal(master.to(weight.dtype), weight)]
    if other:
        log.warning(
            "%d of %d weights in the model's file of %s are not the masters of the optimizer's files, %s first: the "
            "files may be of two saves, if one was broken off; the masters are taken",
            *(len(other), len(pairs), folder, other[0]),
        )


def _params(
    states: Sequence[dict[str, Any]], shapes: Sequence[Any], folder: Path
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each trained parameter's name and state, joined from the ranks' fragments."""
    for index, shapes_of_group in enumerate(shapes):
        flats = [_flat_state(state, index, folder) for state in states]
        mappings = [_item(state, "param_slice_mappings", list, folder)[index] for state in states]
        steps = {rank: float(flat["step"]) for rank, flat in enumerate(flats) if mappings[rank]}
        if len(set(steps.values())) > 1:
            raise ValueError(
                f"expected the files of one save in {folder}, got these steps by rank: {steps}; copy the files of all "
                f"ranks again, or load an earlier tag: a save over this one may have been broken off"
            )
        for name, shape in shapes_of_group.items():
            fragments = [
                (flat, vars(mapping[name])) for flat, mapping in zip(flats, mappings, strict=True) if name in mapping
            ]
            values: dict[str, Tensor] = {}
            for slot in ("master", *_SLOTS):
                parts = [flat[slot][at["start"] : at["start"] + at["numel"]] for flat, at in fragments]
                values[slot] = _whole(name, slot, parts, torch.Size(shape), folder)
            yield name, {**values, "step": flats[0]["step"]}


def _whole(name: str, slot: str, parts: list[Tensor], shape: torch.Size, folder: Path) -> Tensor:
    got = sum(part.numel() for part in parts)
    if got != shape.numel():
        raise ValueError(
            f"expected {shape.numel()} values of {slot} of {name} in {folder}, got {got}; copy the files of all ranks, "
            f"of one run"
        )
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    return flat.detach().float().reshape(shape)


def _flat_state(state: dict[str, Any], index: int, folder: Path) -> dict[str, Tensor]:
    """Return one rank's flat partition of one group, by slot. A parameter has the same place in each slot."""
    master = _item(state, "single_partition_of_fp32_groups", list, folder)[index]
    base = state.get("base_optimizer_state")
    if isinstance(base, list):  # DeepSpeed's "elastic" format: one dict per group, without padding
        saved = base[index]
        step = saved.get("step", state.get("base_optimizer_state_step", 0))
    else:
        base = _item(state, "base_optimizer_state", dict, folder)
        group = base["param_groups"][index]
        saved = base["state"].get(group["params"][0], {})
        step = saved.get("step", group.get("step", 0))
    if saved and not all(isinstance(saved.get(slot), Tensor) for slot in _SLOTS):
        raise ValueError(
            f"expected Adam's exp_avg and exp_avg_sq in {folder}, got {sorted(map(str, saved))}; the state of other "
            f"optimizers cannot be taken over"
        )
    moments = {slot: saved[slot] if saved else torch.zeros_like(master) for slot in _SLOTS}  # none before step 1
    return {"master": master, **moments, "step": torch.tensor(float(step), dtype=torch.float32)}


def _groups(state: dict[str, Any], shapes: Sequence[Any], config: dict[str, Any]) -> list[ParamGroup]:
    base = state["base_optimizer_state"]
    saved = base["param_groups"] if isinstance(base, dict) else [{} for _ in shapes]
    decoupled = _decoupled(config.get("optimizer"))
    return [
        ParamGroup(
            names=list(shapes_of_group),
            hyper={key: kind(group[key]) for key, kind in _HYPER.items() if key in group},
            decoupled_weight_decay=group.get("decoupled_weight_decay", decoupled),
        )
        for shapes_of_group, group in zip(shapes, saved, strict=True)
    ]


def _decoupled(optimizer: Any) -> bool | None:
    """Return whether weight decay is decoupled, by the config's `optimizer`, as the state does not say. None: unknown.

    DeepSpeed's type "Adam" is AdamW too, unless adam_w_mode is false.
    """
    if not isinstance(optimizer, dict) or str(optimizer.get("type", "")).lower() not in ("adam", "adamw"):
        return None
    is_adamw = str(optimizer["type"]).lower() == "adamw"
    return is_adamw or bool((optimizer.get("params") or {}).get("adam_w_mode", True))


def _loss_scale(scaler: Any) -> LossScaleState:
    if scaler is None:  # BF16_Optimizer
        return LossScaleState(0.0)  # no loss scale
    saved = vars(scaler)
    if not saved.get("dynamic"):
        return LossScaleState(float(saved["cur_scale"]))
    return LossScaleState(
        scale=float(saved["cur_scale"]),
        growth_interval=int(saved["scale_window"]),
        hysteresis_left=int(saved["cur_hysteresis"]),
        num_clean_steps=int(saved["cur_iter"]) - int(saved["last_overflow_iter"]) - 1,
    )
