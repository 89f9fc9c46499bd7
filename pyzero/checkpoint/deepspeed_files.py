"""Finds the files of a DeepSpeed checkpoint, checks their checksums, and unpickles them without running their code."""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch


class _Inert:
    """Stands in for a class of DeepSpeed. It keeps a pickled object's values as attributes, and has no code."""


# (stand-in, name) of each of DeepSpeed's classes that pickles of ZeRO-1 and ZeRO-2 name.
_STAND_INS: list[Any] = [
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
_MODEL_FILE = "mp_rank_00_model_states.pt"
_OPTIM_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


def folder(directory: Path, tag: str | None) -> Path:
    """Return the folder of one checkpoint. tag: Its name, or a path; None: read it from the file `latest`.

    The folder is always inside `directory`, whatever the tag or `latest` contains.

    Raises:
        FileNotFoundError: There is no such folder, or no `latest`.
        ValueError: The tag leads out of `directory`, or names nothing.
    """
    if tag is None:
        latest = directory / "latest"
        if not latest.is_file():
            raise FileNotFoundError(
                f"expected {latest}, which names the newest checkpoint, got no such file; pass the folder that "
                f"DeepSpeed's save_checkpoint was given, or a tag"
            )
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    path = Path(tag)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in tag:
        raise ValueError(f"expected a tag that names a folder in {directory}, got {tag[:80]!r}; pass tag=")
    if not (directory / tag).is_dir():
        raise FileNotFoundError(f"expected the folder {directory / tag}, got none; pass the tag of one that is there")
    return directory / tag


def model_file(folder: Path) -> Path:
    """Return the file with the weights.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The checkpoint is pyzero's; or of stage 3, or of tensor, pipeline or expert parallelism.
    """
    others = [path.name for path in folder.glob("*mp_rank_*_model_states.pt") if path.name != _MODEL_FILE]
    others += [path.name for path in folder.glob("layer_*.pt")]
    if others:
        raise ValueError(
            f"expected ZeRO-1 or ZeRO-2 over data-parallel ranks alone, got {sorted(others)[0]} in {folder}, of "
            f"stage 3, of tensor, pipeline or expert parallelism; convert it with DeepSpeed's own tools"
        )
    path = folder / _MODEL_FILE
    if not path.is_file():
        if any((folder / name).is_file() for name in ("index.json", "latest")):  # of pyzero's
            raise ValueError(
                f"expected a folder that DeepSpeed wrote, got pyzero's own checkpoint, which needs no conversion; pass "
                f"{folder} to pyzero.load_checkpoint or `python -m pyzero export`"
            )
        raise FileNotFoundError(f"expected {path}, got no such file; copy the whole folder")
    return path


def optimizer_files(folder: Path) -> list[Path]:
    """Return the optimizer's files, in rank order.

    Raises:
        FileNotFoundError: A rank's file is missing.
        ValueError: The checkpoint was converted to DeepSpeed's universal format.
    """
    if (folder / "zero").is_dir():
        raise ValueError(
            f"expected each rank's *_optim_states.pt, got a universal checkpoint in {folder}; pass the tag that it was "
            f"made from, which loads on any number of ranks too"
        )
    found = [(int(m[1]), path) for path in folder.glob("*_optim_states.pt") if (m := _OPTIM_FILE.fullmatch(path.name))]
    if not found or sorted(rank for rank, _ in found) != list(range(len(found))):
        raise FileNotFoundError(
            f"expected *zero_pp_rank_R_mp_rank_00_optim_states.pt of each rank R from 0 in {folder}, got those of "
            f"{sorted(rank for rank, _ in found)}; copy the files of all ranks, of one run"
        )
    return [path for _, path in sorted(found)]


def load(path: Path) -> dict[str, Any]:
    """Return the dict in a file. torch's restricted unpickler reads it, with its own classes and _STAND_INS only.

    Raises:
        ValueError: The file is damaged, names other classes, or does not contain a dict.
    """
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:
            _check_sums(path)
        with torch.serialization.safe_globals(_STAND_INS):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"one that asks for {asked[1]}" if asked else f"this ({str(error).splitlines()[-1]})"
        raise ValueError(
            f"expected tensors, plain data and DeepSpeed's own few classes in {path}, got {what}; nothing of it was "
            f"run: save the checkpoint again without such objects in client_state"
        ) from error
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError, OSError) as error:
        raise ValueError(f"expected a whole file of torch.save, got {path}: {error}; copy it again") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"expected a dict in {path}, got {type(loaded).__name__}; pass a folder that DeepSpeed wrote")
    return loaded


def _check_sums(path: Path) -> None:
    """Raise ValueError if a checksum in the file is wrong. torch.load does not check them."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise ValueError(str(error)) from error
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} in it is wrong")
