"""Long hunts with the state machines of test_state_machine.py and test_engine_state_machine.py, outside of pytest."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test


def parser(chunk: int) -> argparse.ArgumentParser:
    """The arguments of a hunt. chunk: Its default size."""
    found = argparse.ArgumentParser(description="Run many programs.")
    found.add_argument("--examples", type=int, default=1000)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--chunk", type=int, default=chunk, help="programs per seed; a failure ends a chunk")
    found.add_argument("--fix", default="", help='fields of Config, as in "size=1, stage=2"')
    found.add_argument("--no-shrink", action="store_true")
    return found


def fixed_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of Config that --fix names."""
    fields: dict[str, Any] = eval(f"dict({args.fix})")
    return fields


def hunt(args: argparse.Namespace, make_machine: Callable[[], Any], base: settings, failed: type[Exception]) -> bool:
    """Run chunk by chunk, each with a seed of its own; a failure ends its chunk alone. Return whether there was one."""
    phases = [hypothesis.Phase.generate] + [hypothesis.Phase.shrink] * (not args.no_shrink)
    options = settings(base, max_examples=args.chunk, derandomize=False, phases=phases, report_multiple_bugs=False)
    failures, begin = 0, time.time()
    for number in range(math.ceil(args.examples / args.chunk)):
        machine = hypothesis.seed(1000 * args.seed + number)(make_machine())
        try:
            run_state_machine_as_test(machine, settings=options)
        except failed as failure:
            failures += 1
            print(f"---- failure {failures}, chunk {number}\n{failure}\n", flush=True)
        print(f"{number + 1} chunks, {failures} failures, {time.time() - begin:.0f} s", flush=True)
    return failures > 0
