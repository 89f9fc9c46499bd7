"""`python -m pyzero COMMAND`."""

from __future__ import annotations

import argparse
import io
import os
import sys

from pyzero import __version__

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_BLOCKS = 32  # of a model of 7e9 parameters
_CLOSED_PIPE = 128 + 13  # what a shell makes of a command that SIGPIPE, signal 13, ended


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Ends quietly once nobody reads what it prints, as before `| head`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of what its encoding lacks, as in a path in a report
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)  # a closed pipe may show no earlier than here; after --help too
    except BrokenPipeError:
        # The interpreter flushes once more at exit: give it somewhere to write what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE


def _run(argv: list[str] | None) -> int:
    args = _parser().parse_args(argv)
    if args.command in ("import-deepspeed", "export"):
        return _convert(args)
    if args.command == "report":
        from . import report

        return report.main()
    if args.command == "config-keys":
        from .deepspeed.config import keys, schema

        print(keys.table(schema.Config), end="")
        return 0
    try:
        _estimate(args)
    except ValueError as error:
        args.refuse(str(error))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pyzero")
    parser.add_argument("--version", action="version", version=f"pyzero {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="which kernels and backends run on this machine, which do not, and why")
    estimate = commands.add_parser("estimate", help="memory per rank of a model trained with FusedZeroAdam")
    estimate.add_argument(
        "--model-params", type=_count, required=True, metavar="N", help="number of parameters: 7B, 350M or 7e9"
    )
    estimate.add_argument("--ranks", type=int, default=1, metavar="W", help="data-parallel ranks; default: 1")
    estimate.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="ZeRO stage; default: 2")
    estimate.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="T", help="ranks that split each weight; default: 1"
    )
    estimate.add_argument(
        "--blocks",
        type=int,
        metavar="N",
        help=f"blocks of the model, which stage 3 gathers one by one; default: {_BLOCKS}",
    )
    estimate.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="dtype of the weights; default: bf16"
    )
    estimate.add_argument(
        "--bucket-cap-mb", type=float, metavar="MB", help="size of a bucket; default: the optimizer's"
    )
    estimate.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="device that the ranks train on; default: cuda"
    )
    estimate.add_argument("--cpu-offload", action="store_true", help="masters and moments are in host memory")
    estimate.add_argument(
        "--accumulate",
        action="store_true",
        help="count the whole gradients that a rank keeps over several backwards in stage 1 or no_sync()",
    )
    estimate.set_defaults(refuse=estimate.error)  # prints the usage of this command
    commands.add_parser(
        "config-keys", help="print every key of a DeepSpeed config, and whether it is done, ignored or refused"
    )
    imports = commands.add_parser("import-deepspeed", help="convert a ZeRO-1 or ZeRO-2 checkpoint of DeepSpeed")
    imports.add_argument("directory", metavar="DIR", help="folder that DeepSpeed saved to")
    imports.add_argument("out", metavar="OUT", help="folder to write, for pyzero.load_checkpoint(OUT, ...)")
    imports.add_argument("--tag", help="checkpoint to read; default: the one that DIR/latest names")
    exports = commands.add_parser("export", help="write a checkpoint's weights to a safetensors file")
    exports.add_argument("directory", metavar="DIR", help="folder that pyzero.save_checkpoint() saved to")
    exports.add_argument("path", metavar="FILE.safetensors", help="file to write")
    exports.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="dtype to write; fp32 takes the masters; default: the model's dtype",
    )
    return parser


def _estimate(args: argparse.Namespace) -> None:
    from . import estimate

    dtype = estimate.DTYPES[args.dtype]
    if args.cpu_offload and args.device == "cpu":
        raise ValueError("got --cpu-offload with --device cpu, wanted GPUs for it; leave one of them out")
    shards_weights = args.stage == 3 and args.ranks > 1
    if args.blocks is not None and not shards_weights:
        raise ValueError(
            f"expected --blocks with --stage 3 and several --ranks, got it with stage {args.stage} and {args.ranks}; "
            f"leave it out"
        )
    on_gpu = args.device == "cuda" or args.cpu_offload
    found = estimate.estimate_numel(
        args.model_params,
        dtype,
        num_ranks=args.ranks,
        stage=args.stage,
        bucket_cap_mb=args.bucket_cap_mb,
        tensor_parallel=args.tensor_parallel,
        num_blocks=_BLOCKS if args.blocks is None else args.blocks,
        cpu_offload=args.cpu_offload,
        on_gpu=on_gpu,
        accumulates=args.accumulate,
    )
    print(estimate.table(found, "on GPUs" if on_gpu else "on CPUs"))
    if args.blocks is None and shards_weights:
        print(f"for {_BLOCKS} blocks of one size, of which two are gathered at a time; --blocks N takes another number")


def _convert(args: argparse.Namespace) -> int:
    from . import estimate
    from .checkpoint import convert

    try:
        if args.command == "export":
            done = convert.export(args.directory, args.path, args.dtype and estimate.DTYPES[args.dtype])
            print(f"{args.path}: {done.num_tensors} tensors of step {done.step}")
        else:
            print(convert.import_deepspeed(args.directory, args.out, args.tag))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"python -m pyzero {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _count(text: str) -> int:
    """7B, 350M, 7e9 or 7000000000."""
    factor = _SUFFIXES.get(text[-1:].upper(), 1)
    try:
        count = round(float(text[:-1] if factor > 1 else text) * factor)
    except (ValueError, OverflowError):  # of inf and nan too
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, as 7B, 350M or 7e9, got {text!r}")
    return count


if __name__ == "__main__":
    sys.exit(main())
