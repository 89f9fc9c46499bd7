"""deepspeed.utils.zero_to_fp32: whole fp32 weights from a checkpoint of an engine or of DeepSpeed, in one process."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyzero.checkpoint import deepspeed_files, files, from_deepspeed
from pyzero.checkpoint.convert import fp32_state_dict
from pyzero.checkpoint.export import atomic_file, export_safetensors


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Tensor]:
    """Return the weights by name, on the CPU. Tied weights share one tensor.

    Args:
        checkpoint_dir: The save_dir of engine.save_checkpoint, or of DeepSpeed in stage 1 or 2.
        tag: Name of the checkpoint; default: the one in `latest`.
        exclude_frozen_parameters: Not supported; exclude them in engine.save_checkpoint.
        lazy_mode: Ignored; all tensors are read.

    Raises:
        ValueError: exclude_frozen_parameters is set, the tag leads out of checkpoint_dir, or files of DeepSpeed's are
            damaged or of another stage.
        CheckpointError, FileNotFoundError: There is no checkpoint, or it is damaged.
    """
    if exclude_frozen_parameters:
        raise ValueError(
            "got exclude_frozen_parameters=True, which is not supported; pass it to engine.save_checkpoint"
        )
    directory = Path(checkpoint_dir)
    folder = deepspeed_files.folder(directory, tag)
    if files.find(folder) is not None:
        return fp32_state_dict(folder)
    theirs = from_deepspeed.read(directory, tag)
    masters = {name: values["master"] for name, values in theirs.params.items()}
    found = {name: masters.get(name, value) for name, value in theirs.module.items()}
    found = {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
    return {name: found[theirs.shared.get(name, name)] for name in found}


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> nn.Module:
    """Move a model to the CPU, load the weights into it, not strictly, as DeepSpeed does, and return it."""
    model = model.cpu()
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: Any = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the weights to pytorch_model.bin or model.safetensors in output_dir.

    There is one file, whatever `max_shard_size` is.
    """
    weights = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, exclude_frozen_parameters)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if safe_serialization:
        export_safetensors(weights, folder / "model.safetensors")
    else:
        with atomic_file(folder / "pytorch_model.bin") as file:
            torch.save(weights, file)


def main(arguments: list[str] | None = None) -> None:
    """Run DeepSpeed's command line: `zero_to_fp32.py CHECKPOINT_DIR OUTPUT_DIR`."""
    parser = argparse.ArgumentParser(description="Write whole fp32 weights of a checkpoint of engine.save_checkpoint.")
    parser.add_argument("checkpoint_dir", help="where engine.save_checkpoint saved, with the file latest")
    parser.add_argument("output_dir", help="for pytorch_model.bin or model.safetensors")
    parser.add_argument("--max_shard_size", default="5GB", help="ignored: one file is written")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors")
    parser.add_argument("-t", "--tag", help="which checkpoint; default: the latest")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="not supported")
    parser.add_argument("-d", "--debug", action="store_true", help="ignored")
    options = vars(parser.parse_args(arguments))
    options.pop("debug")
    convert_zero_checkpoint_to_fp32_state_dict(**options)


if __name__ == "__main__":
    main()
