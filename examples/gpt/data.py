"""Text as bytes: the Python standard library's own sources, or a file; held-out text is split off by file."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3"}
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Corpus:
    """Bytes as tokens. The batch of a step depends on the seed and the step, not on the number of ranks."""

    name: str
    train: Tensor  # (n,) uint8
    held_out: Tensor  # (m,) uint8

    def fingerprint(self) -> str:
        """Changes when the text does."""
        return hashlib.sha256(self.train.numpy().tobytes() + self.held_out.numpy().tobytes()).hexdigest()[:12]

    def batch(self, step: int, rows: int, context: int, seed: int) -> Tensor:
        """(rows, context) int64: random windows of the training text; the same on every rank."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - context + 1, (rows,), generator=generator)
        return _windows(self.train, starts, context)

    def held_out_windows(self, rows: int, context: int) -> Tensor:
        """(rows, context) int64: evenly spaced windows of the held-out text."""
        starts = torch.linspace(0, len(self.held_out) - context, rows).long()
        return _windows(self.held_out, starts, context)


def _windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    return text[starts[:, None] + torch.arange(context)].long()


def load(path: str | None, context: int, without: str = "") -> Corpus:
    """The standard library's .py files, less a folder's, every tenth held out; of a single file, the last tenth."""
    if path is not None:
        return from_text(path, Path(path).read_bytes(), context)
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = _SKIPPED_FOLDERS | {without}
    files = sorted(f for f in root.rglob("*.py") if not skipped & set(f.relative_to(root).parts[:-1]))
    texts = [file.read_bytes() for file in files]
    train = b"".join(text for i, text in enumerate(texts) if i % _HELD_OUT_ONE_IN)
    return _corpus(f"{len(files)} files of {root}", train, b"".join(texts[::_HELD_OUT_ONE_IN]), context)


def from_text(name: str, text: bytes, context: int) -> Corpus:
    """The last tenth is held out."""
    cut = len(text) - len(text) // _HELD_OUT_ONE_IN
    return _corpus(name, text[:cut], text[cut:], context)


def _corpus(name: str, train: bytes, held_out: bytes, context: int) -> Corpus:
    if min(len(train), len(held_out)) < context:
        raise ValueError(
            f"expected at least {context} bytes to train on and to hold out, got {len(train)} and {len(held_out)} from "
            f"{name}; pass a longer text with --data"
        )
    as_tensor = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, held_out)]
    return Corpus(name, *as_tensor)
