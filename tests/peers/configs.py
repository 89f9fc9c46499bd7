"""Reads every DeepSpeed config (*.json) below a folder: which are accepted? python tests/peers/configs.py DIR."""

import sys
from pathlib import Path

from pyzero.deepspeed.config.reader import load


def refusal(path: Path) -> str:
    """Why a config is refused, or nothing. What a launcher or trainer would fill in is: a batch size."""
    try:
        config = load(path)
        if {config.train_batch_size, config.train_micro_batch_size_per_gpu} - {None, "auto"}:
            config.batches(num_ranks(config))
    except ValueError as error:
        return str(error)
    return ""


def num_ranks(config: object) -> int:
    """For which the batch sizes of a config are meant, where it names all of them."""
    sizes = [getattr(config, name) for name in ("train_batch_size", "train_micro_batch_size_per_gpu")]
    steps = config.gradient_accumulation_steps  # type: ignore[attr-defined]
    return sizes[0] // (sizes[1] * steps) if all(isinstance(size, int) for size in (*sizes, steps)) else 1


if __name__ == "__main__":
    paths = sorted(Path(sys.argv[1]).rglob("*.json"))
    refusals = {path: why for path in paths if (why := refusal(path))}
    for path, why in refusals.items():
        print(f"{path}: {why}")
    print(f"{len(paths) - len(refusals)} of {len(paths)} accepted")
