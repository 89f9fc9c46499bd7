"""What initialize() logs: of keys of the config, and to whom."""

from __future__ import annotations

import logging
import sys

from pyzero.comm import process
from pyzero.deepspeed import launcher
from pyzero.deepspeed.config.keys import remarks
from pyzero.deepspeed.config.schema import Config
from pyzero.deepspeed.config.unknown_keys import unknown_keys

log = logging.getLogger("pyzero")


class _UntilConfigured(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr until somebody configures logging. It is a filter too, because filters are asked first."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not logging.getLogger().handlers and log.handlers == [self]:
            return True
        log.removeHandler(self)
        log.filters = [other for other in log.filters if other is not self]  # a new list: the old one is being iterated
        if log.level == logging.INFO:
            log.setLevel(logging.NOTSET)
        return log.isEnabledFor(record.levelno)

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)  # the present one, because it may have been redirected
        super().emit(record)


def show_log() -> None:
    """Show the log on rank 0 from level INFO on, unless somebody configured logging: DeepSpeed shows it too."""
    levels = log.level, logging.getLogger().level
    is_configured = log.hasHandlers() or levels != (logging.NOTSET, logging.WARNING)  # Python's initial levels
    if process.rank_and_size()[0] > 0 or is_configured:
        return
    handler = _UntilConfigured()
    handler.setFormatter(logging.Formatter("[pyzero] %(message)s"))
    log.addHandler(handler)
    log.addFilter(handler)
    log.setLevel(logging.INFO)


def remark_on(config: Config, trains: bool) -> None:
    """Log one line for each key of the config that works differently here than a reader may expect."""
    if process.rank_and_size()[0] > 0:
        return
    if config.optimizer is not None and config.optimizer.remark:
        log.warning("config: optimizer.type=%s: %s", config.optimizer.type, config.optimizer.remark)
    if trains and config.max_grad_norm() is None and "gradient_clipping" not in config.model_fields_set:
        log.warning("config: gradient_clipping is not given: nothing is clipped; DeepSpeed 0.19 clips to a norm of 1.0")
    if config.zero_optimization.offloads_params():
        if config.zero_optimization.stage < 3:
            log.warning("config: zero_optimization.offload_param: weights stay on their device below stage 3")
        elif launcher.device().type == "cpu":
            log.info("config: zero_optimization.offload_param: nothing to do, for weights lie in memory of the host")
    unknown = unknown_keys(config)
    if unknown:
        log.warning("config: unknown keys are ignored, as in DeepSpeed: %s", ", ".join(unknown))
    for line, warns in remarks(config):
        log.log(logging.WARNING if warns else logging.INFO, "config: %s", line)
