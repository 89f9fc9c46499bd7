"""python -m benchmarks [names] [--device cuda] [--ranks W] [--peers NAMES] [--out DIR], from the repository's root.

Each bench first compares its results with the peers', and fails if they differ from torch's. Then it times all in
turns. `python -m benchmarks compare OLD NEW` finds regressions between two results. `python -m benchmarks simulate`
prints what the cost model of docs/scaling.md predicts for more ranks than there are.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

try:
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"python -m benchmarks needs tqdm ({error}): pip install tqdm, and matplotlib for the pictures")

from . import environment, peers, regressions, results
from .options import Options
from .rows import AnyRow, table, verdict

_MODULES = {
    "adam": "adam",
    "lion": "lion",
    "sgd": "sgd",
    "unscale": "unscale",
    "reduce_scatter": "reduce_scatter",
    "pack": "pack",
    "loss_scale": "loss_scale",
    "step_scalars": "step_scalars",
    "step": "step",
    "models": "models",
    "backward": "backward",
    "scaling": "scaling",
    "transport": "transport",
    "train": "train",
    "memory": "memory",
    "checkpoint": "checkpoint",
    "build": "build_time",
    "import": "import_time",
}
_CPU_ONLY = ("backward", "scaling", "transport", "checkpoint", "build", "import")
_MANY_GPUS = ("train", "memory")  # with fewer GPUs than ranks, only if named
_DEFAULT_RANKS = 2
_INTERRUPTED = 130  # as shells report it
_TOLD = (AssertionError, RuntimeError, OSError)  # whose text says enough; torch's, out of memory too, are RuntimeErrors


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="name",
        help=f"benches to run, of {', '.join(_MODULES)}; default: all that use the device",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--ranks",
        type=_positive,
        default=_DEFAULT_RANKS,
        metavar="W",
        help="number of ranks of backward, train and transport; scaling and memory choose their own",
    )
    parser.add_argument(
        "--peers",
        default="auto",
        metavar="NAMES",
        help=f"peers to time: auto (all that are installed), none, or some of {','.join(peers.PEERS)}",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json, results.md and pictures there")
    parser.add_argument(
        "--quick", action="store_true", help="smaller tensors, fewer repeats: some 5 minutes on 2 cores"
    )
    parser.add_argument("--threads", type=_positive, help="threads of torch and of pyzero; default: torch's choice")
    parser.add_argument("--numel", type=_positive, help="number of elements; default: each bench's own sizes")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in _MODULES]
    if unknown:
        parser.error(f"got {', '.join(unknown)}, wanted names of {', '.join(_MODULES)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("got --device cuda, but this torch sees no GPU; leave it out to run on the CPU")
    args.peers = _peers(parser, args.peers)
    if args.out is not None:
        _make_folder(parser, args.out)
    return args


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return number


def _make_folder(parser: argparse.ArgumentParser, out: Path) -> None:
    """Make it before anything is timed: without it the times would be lost."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        parser.error(f"got --out {out}, wanted a folder to write to ({error.strerror}); pass another")


def _peers(parser: argparse.ArgumentParser, text: str) -> frozenset[str] | None:
    if text == "auto":
        return None
    names = frozenset(name for name in text.split(",") if name != "none")
    if unknown := sorted(names - peers.PEERS.keys()):
        parser.error(f"got --peers {', '.join(unknown)}, wanted auto, none, or of {', '.join(peers.PEERS)}")
    return names


def _default_names(options: Options) -> list[str]:
    if options.device == "cpu":
        return list(_MODULES)
    has_many = torch.cuda.device_count() >= options.ranks
    return [name for name in _MODULES if name not in _CPU_ONLY and (has_many or name not in _MANY_GPUS)]


def bench(args: argparse.Namespace) -> int:
    """Run the benches that are named; return the exit status."""
    options = Options(args.device, args.quick, args.numel, args.ranks, args.peers)
    found = environment.environment(options)
    print(environment.in_words(found))
    if busy := environment.busy_warning():
        print(busy, file=sys.stderr)
    if args.out is not None and (args.out / results.JSON_NAME).exists():
        print(f"{args.out} has results of another run, which these will replace", file=sys.stderr)
    rows: list[AnyRow] = []
    failed = []
    names = dict.fromkeys(args.names or _default_names(options))
    for name in tqdm(names, desc="benchmarks", leave=False, disable=None):
        try:
            new = importlib.import_module(f".{_MODULES[name]}", __package__).run(options)
        except KeyboardInterrupt:
            ended = ", ".join(dict.fromkeys(row.bench for row in rows))
            print(f"interrupted in {name}" + f"; {args.out} has {ended}" * bool(args.out and ended), file=sys.stderr)
            return _INTERRUPTED
        except Exception as error:  # the other benches run
            failed.append(name)
            why = "the check failed" if isinstance(error, AssertionError) else type(error).__name__
            where = "" if isinstance(error, _TOLD) else traceback.format_exc()
            tqdm.write(f"\n## {name}\n\nNOT TIMED, {why}: {error}\n{where}", file=sys.stderr)
            continue
        rows += new
        if args.out is not None:
            results.write(args.out, found, rows, options.notes)
        tqdm.write(f"\n## {name}\n\n{table(new)}")
    for text in filter(None, [*options.notes, verdict(rows)]):
        print(text)
    if args.out is not None and rows:
        _draw(args.out, rows)
    return 1 if failed else 0


def _draw(out: Path, rows: Sequence[AnyRow]) -> None:
    try:
        from . import pictures
    except ImportError as error:
        print(f"no pictures ({error}): pip install matplotlib", file=sys.stderr)
        return
    print("\n".join(str(path) for path in pictures.draw(out, rows)))


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["compare"]:
        return regressions.main(argv[1:])
    if argv[:1] == ["simulate"]:
        from . import simulate

        return simulate.main(argv[1:])
    args = parse(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return bench(args)


if __name__ == "__main__":
    sys.exit(main())
