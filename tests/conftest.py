"""Fixtures that all tests share."""

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four gloo workers for the whole session; see tests/ranks.py."""
    pool = Ranks()
    yield pool
    pool.stop()
