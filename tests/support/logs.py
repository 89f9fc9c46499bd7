"""Captures log lines."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname}: {record.getMessage()}")


@contextmanager
def logged(level: int = logging.NOTSET) -> Iterator[list[str]]:
    """The lines that pyzero logs inside. level: the logger's level; NOTSET leaves it."""
    log, logger = Log(), logging.getLogger("pyzero")
    before = logger.level
    logger.addHandler(log)
    logger.setLevel(level or before)
    try:
        yield log.lines
    finally:
        logger.setLevel(before)
        logger.removeHandler(log)
