"""Convert checkpoints: import DeepSpeed's folders, and export safetensors files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyzero.checkpoint import files, from_deepspeed
from pyzero.checkpoint.agreement import run_on_all_ranks
from pyzero.checkpoint.content import PARTS, Content
from pyzero.checkpoint.export import export_safetensors
from pyzero.checkpoint.files import CheckpointError
from pyzero.checkpoint.writer import Writer
from pyzero.comm.group import Group
from pyzero.rank_state.notes import SCALER
from pyzero.sharding.buckets import MASTER

_OTHER_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def import_deepspeed(directory: str | Path, out: str | Path, tag: str | None = None) -> Path:
    """Convert a DeepSpeed checkpoint (ZeRO stage 1 or 2, any number of ranks) into one for load_checkpoint.

    DeepSpeed need not be installed, and no code in its files is run. `load_checkpoint` then also returns DeepSpeed's
    "client_state" and "lr_scheduler".

    Args:
        directory: The folder that contains `latest`, or the folders of the tags.
        out: The directory for pyzero's checkpoint.
        tag: The checkpoint to convert; default: the one that `latest` names.

    Returns:
        The folder of the new checkpoint.

    Raises:
        FileNotFoundError, ValueError: See from_deepspeed.read. Or `out` is `directory`.
        CheckpointError: `out` could not be written.
    """
    if Path(out).resolve() == Path(directory).resolve():
        raise ValueError(
            f"expected a folder for the new checkpoint other than {directory}, got the same, in which DeepSpeed's file "
            f"latest would be replaced; pass another, such as {Path(directory) / 'pyzero'}"
        )
    theirs = from_deepspeed.read(directory, tag)
    groups: list[dict[str, Any]] = [{**group.hyper, "params": group.names} for group in theirs.groups]
    for group, of_theirs in zip(groups, theirs.groups, strict=True):
        if of_theirs.decoupled_weight_decay is not None:
            group["decoupled_weight_decay"] = of_theirs.decoupled_weight_decay
    groups[0][SCALER] = from_deepspeed.scaler_state(theirs)
    is_fp32 = {name for name, weight in theirs.module.items() if weight.dtype == torch.float32}
    state = {
        name: {key: value for key, value in values.items() if key != MASTER or name not in is_fp32}
        for name, values in theirs.params.items()
    }
    content = Content(
        {"model": theirs.module, "optim": {"state": state}},
        {"param_groups": groups, "model": {}, "tied": theirs.shared},
        {"client_state": theirs.client_state, "lr_scheduler": theirs.lr_scheduler},
    )
    return Writer(Group(is_alone=True), out, theirs.global_steps, None, lambda: content).run()


class Exported(NamedTuple):
    """What `export` has written."""

    num_tensors: int  # tied ones count once
    step: int


def export(directory: str | Path, path: str | Path, dtype: torch.dtype | None = None) -> Exported:
    """Write a checkpoint's weights and buffers to a safetensors file that transformers' `from_pretrained` loads.

    Args:
        directory: The directory of checkpoints, to use the latest, or the folder of one checkpoint.
        path: The file, NAME.safetensors. It appears whole or not at all.
        dtype: dtype of floating-point weights. fp32 uses the masters; None keeps the model's dtypes.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
        ValueError: See export_safetensors. Or weights are saved in parts, or the file has another suffix.
        OSError: The file could not be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        stem = path.with_suffix("") if path.suffix in _OTHER_SUFFIXES else path
        raise ValueError(
            f"expected a file NAME.safetensors, for that is its format, got {path}; pass {stem}.safetensors"
        )
    weights = _Weights.find(directory, dtype)
    like = {name: weights.empty(name, "meta") for name in weights.saved_names}
    export_safetensors(like, path, dtype, tied=weights.tied, load=weights.read)
    return Exported(len(weights.saved_names) - len(weights.tied), weights.index["step"])


def fp32_state_dict(directory: str | Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights and buffers by name, on the CPU, floating-point ones in fp32. Tied ones are shared.

    Args:
        directory: As for `export`.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
        ValueError: Weights are saved in parts.
    """
    weights = _Weights.find(directory, torch.float32)
    found = {name: weights.read(name) for name in weights.saved_names if name not in weights.tied}
    found = {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
    return {name: found[weights.tied.get(name, name)] for name in weights.saved_names}


@dataclass(frozen=True)
class _Weights:
    """The weights in a checkpoint."""

    folder: Path
    index: dict[str, Any]
    saved_names: dict[str, str]  # the saved tensor's name, by the weight's
    tied: dict[str, str]  # the name that a tied one is saved under

    @classmethod
    def find(cls, directory: str | Path, dtype: torch.dtype | None) -> _Weights:
        """Find the weights of a checkpoint. dtype: fp32 selects the masters."""
        folder = files.find(Path(directory))
        if folder is None:
            raise CheckpointError(f"expected a checkpoint in {directory}, got none; pass where save_checkpoint() saved")
        index = files.read_index(folder)
        common, saved = files.load_file(folder, files.COMMON, index), index["tensors"]
        if common.get(PARTS, 0):
            raise ValueError(
                f"expected whole weights, got parts of {common[PARTS]} model-parallel ranks, and how layers split them "
                f"is not saved; join them in the script, and write the file with pyzero.checkpoint.export's "
                f"export_safetensors()"
            )
        tied = common["tied"]
        names = [name.removeprefix("model.") for name in saved if name.startswith("model.")]
        masters = {name: f"optim.state.{name}.{MASTER}" for name in names}
        saved_names = {n: masters[n] if dtype == torch.float32 and masters[n] in saved else f"model.{n}" for n in names}
        return cls(folder, index, saved_names, {a: b for a, b in tied.items() if a in saved_names and b in saved_names})

    def empty(self, name: str, device: str) -> Tensor:
        saved = self.index["tensors"][self.saved_names[name]]
        return torch.empty(saved["shape"], dtype=getattr(torch, saved["dtype"]), device=device)

    def read(self, name: str) -> Tensor:
        from pyzero.checkpoint import storage  # the import takes half a second

        tensor = self.empty(name, "cpu")
        where = {self.saved_names[name]: tensor}
        # Through run_on_all_ranks, so that an interrupt, which torch turns into a failure, is raised as itself.
        run_on_all_ranks(
            Group(is_alone=True), f"the read of {name}", lambda: storage.read(where, self.folder, self.index)
        )
        return tensor
