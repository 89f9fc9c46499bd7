"""How far a run is, and how that outlives it: checkpoints from which any number of ranks goes on."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyzero

from .ranks import Place

_KEEP = 2  # checkpoints


@dataclass
class Progress:
    """What a checkpoint holds beside the model, its optimizer and its schedule."""

    losses: list[float] = field(default_factory=list)  # nats per byte, mean over the batch; one per step
    parts: list[list[int]] = field(default_factory=list)  # [first step, number of ranks], one per start
    seconds: float = 0.0  # of training, up to the last save


class Keeper:
    """Saves a run every so many steps, and goes on from the last save.

    Args:
        folder: Of the checkpoints.
        trainer: Its model, optimizer and schedule are saved.
        settings: What a resumed run must share with the saved one.
        place: This process.
    """

    def __init__(self, folder: Path, trainer: Any, settings: dict[str, Any], place: Place) -> None:
        self._folder, self._trainer, self._settings, self._place = folder, trainer, settings, place
        self._unread: list[Tensor] = []  # this rank's losses: reading the device waits for it
        self._since = time.monotonic()
        self.progress = Progress()

    def start(self, resume: bool) -> int:
        """The number of steps that are done already: of the last checkpoint, where there is one to resume from."""
        if resume and pyzero.latest_checkpoint(self._folder) is not None:
            self.progress = self._load()
        done = len(self.progress.losses)
        self.progress.parts.append([done, self._place.size])
        self._since = time.monotonic()
        return done

    def _load(self) -> Progress:
        trainer = self._trainer
        saved = pyzero.load_checkpoint(self._folder, model=trainer.model, optimizer=trainer.optimizer)
        other = {key: value for key, value in saved["settings"].items() if self._settings.get(key) != value}
        if other:
            typed = " ".join(f"--{key} {value}" for key, value in other.items() if key != "text")
            text = "that run's text by --data" if "text" in other else ""
            raise SystemExit(
                f"expected the settings of the run saved in {self._folder}, got others; pass "
                f"{' and '.join(filter(None, (typed, text)))}, or another --out"
            )
        trainer.schedule.load_state_dict(saved["schedule"])
        if self._place.rank == 0:
            print(f"resumed after step {saved['step']}, on {self._place.size} rank(s)", flush=True)
        return Progress(**{key: saved[key] for key in asdict(Progress())})

    def add(self, loss: Tensor) -> None:
        """A step is done. loss: 0-D, this rank's."""
        self._unread.append(loss)

    def read(self) -> Progress:
        """All of it up to now. Collective."""
        if self._unread:
            self.progress.losses += self._place.mean(torch.stack(self._unread)).tolist()
            self._unread = []
        now = time.monotonic()
        self.progress.seconds += now - self._since
        self._since = now
        return self.progress

    def save(self) -> None:
        """A checkpoint. Collective."""
        trainer, progress = self._trainer, self.read()
        pyzero.save_checkpoint(
            self._folder,
            model=trainer.model,
            optimizer=trainer.optimizer,
            step=len(progress.losses),
            keep=_KEEP,
            schedule=trainer.schedule.state_dict(),
            settings=self._settings,
            **asdict(progress),
        )


def fail(place: Place) -> None:
    """As a machine does: the last rank is gone, with no word to the others."""
    if place.rank == place.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
