"""Write a run's metrics to CSV files, TensorBoard or Weights & Biases, as the config selects."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pyzero.deepspeed import comm
from pyzero.deepspeed.config.schema import Config
from pyzero.deepspeed.config.sections import CsvSection, TensorBoardSection, WandbSection

Event = tuple[str, float, int]  # (name, value, sample)


class _Writer(Protocol):
    def write(self, events: Sequence[Event]) -> None: ...


class Monitor:
    """DeepSpeed's `engine.monitor`. Only rank 0 writes.

    Raises:
        ImportError: tensorboard or wandb is enabled and not installed.
    """

    def __init__(self, config: Config, is_first: bool) -> None:
        self._writers: list[_Writer] = []
        # Imported on all ranks: if only rank 0 failed, the others would wait for it.
        boards = _installed("torch.utils.tensorboard", "tensorboard") if config.tensorboard.enabled else None
        wandb = _installed("wandb", "wandb") if config.wandb.enabled else None
        if not is_first:
            return
        if config.csv_monitor.enabled:
            self._writers.append(_Csv(config.csv_monitor))
        if boards is not None:
            self._writers.append(_TensorBoard(boards, config.tensorboard))
        if wandb is not None:
            self._writers.append(_Wandb(wandb, config.wandb))

    @property
    def enabled(self) -> bool:
        """Whether this rank writes anything."""
        return bool(self._writers)

    def write_events(self, events: Sequence[Event]) -> None:
        """Write (name, value, sample) rows."""
        for writer in self._writers:
            writer.write(events)


class MonitorMaster(Monitor):
    """A Monitor that a script makes itself: `MonitorMaster(DeepSpeedConfig(config).monitor_config)`."""

    def __init__(self, monitor_config: Config) -> None:
        super().__init__(monitor_config, comm.get_rank() == 0)


class _Csv:
    """Writes one file per name, with the columns `step` and the last part of the name."""

    def __init__(self, section: CsvSection) -> None:
        self._folder = Path(section.output_path or "csv_monitor") / section.job_name
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, events: Sequence[Event]) -> None:
        for name, value, sample in events:
            path = self._folder / f"{name.replace('/', '_').replace(' ', '_')}.csv"
            is_new = not path.exists()
            with path.open("a", newline="") as file:
                rows = csv.writer(file)
                if is_new:
                    rows.writerow(["step", name.rpartition("/")[2]])
                rows.writerow([sample, float(value)])


class _TensorBoard:
    def __init__(self, module: Any, section: TensorBoardSection) -> None:
        self._writer = module.SummaryWriter(str(Path(section.output_path or "runs") / section.job_name))

    def write(self, events: Sequence[Event]) -> None:
        for name, value, sample in events:
            self._writer.add_scalar(name, float(value), sample)
        self._writer.flush()


class _Wandb:
    def __init__(self, module: Any, section: WandbSection) -> None:
        self._wandb = module
        self._wandb.init(project=section.project, group=section.group, entity=section.team)

    def write(self, events: Sequence[Event]) -> None:
        for name, value, sample in events:
            self._wandb.log({name: float(value)}, step=sample)


def _installed(module: str, package: str) -> Any:
    """Import a module of an optional package. package: Also the name of its section in the config."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{package}.enabled is true in the config, and the package {package} is not installed ({error}); "
            f"pip install {package}, or enable csv_monitor instead"
        ) from error
