"""python -m benchmarks [names] [--quick] [--device cuda] [--json FILE], from the repository's root.

Each bench first checks its results against the peer's, and fails where they disagree; then it times both in turns.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import harness

_MODULES = {
    "adam": "adam",
    "unscale": "unscale",
    "pack": "pack",
    "reduce_scatter": "reduce_scatter",
    "loss_scale": "loss_scale",
    "step_scalars": "step_scalars",
    "step": "step",
    "models": "models",
    "transport": "transport",
    "train": "train",
    "checkpoint": "checkpoint",
    "build": "build_time",
    "import": "import_time",
}
_CPU_ONLY = ("transport", "train", "checkpoint", "build", "import")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"of {', '.join(_MODULES)}; default: all that use the device"
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller tensors, fewer repeats: some 2 minutes on 2 cores"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch and of pyzero; default: torch's choice")
    parser.add_argument("--numel", type=int, help="elements, in place of each bench's own sizes")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in _MODULES]
    if unknown:
        parser.error(f"got {', '.join(unknown)}, wanted names of {', '.join(_MODULES)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("got --device cuda, but this torch sees no GPU; leave it out to run on the CPU")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    options = harness.Options(args.device, args.quick, args.numel)
    print(", ".join(f"{key}: {value}" for key, value in harness.environment(options).items()))
    if busy := harness.busy_warning():
        print(busy, file=sys.stderr)
    rows: list[harness.Row] = []
    failed = []
    for name in args.names or [name for name in _MODULES if args.device == "cpu" or name not in _CPU_ONLY]:
        try:
            found = importlib.import_module(f".{_MODULES[name]}", __package__).run(options)
        except (AssertionError, RuntimeError) as error:  # torch's errors, out of memory among them, are RuntimeErrors
            failed.append(name)
            why = "the check failed" if isinstance(error, AssertionError) else type(error).__name__
            print(f"\n## {name}\n\nNOT TIMED, {why}: {error}", file=sys.stderr)
            continue
        print(f"\n## {name}\n\n{harness.table(found)}", flush=True)
        rows += found
        if args.json is not None:  # after each: a run that is cut short leaves what it has
            harness.write_json(args.json, options, rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
