"""Where the peers' own tests are, and the table of what came of them."""

import pytest
from suites import ROWS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peers")
    group.addoption("--torch-tests", metavar="DIR", help="the folder test of PyTorch's source")
    group.addoption("--deepspeed-tests", metavar="DIR", help="the folder tests of DeepSpeed's source")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if rows := config.stash.get(ROWS, []):
        terminalreporter.section("the peers' own tests")
        terminalreporter.write_line("| suite | passed | named differences | skipped by itself | not run yet |")
        terminalreporter.write_line("|---|---|---|---|---|")
        for row in rows:
            terminalreporter.write_line(row)
