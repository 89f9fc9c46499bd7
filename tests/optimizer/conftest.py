"""Fixtures of the optimizer's tests."""

import pytest
from own_groups import OwnGroups


@pytest.fixture(scope="module")
def run(ranks):
    return OwnGroups(ranks)
