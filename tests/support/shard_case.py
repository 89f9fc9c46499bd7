"""Shared by the tests of update rules: a call over a flat shard, as data, run on a backend and on the reference."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import ClassVar

import torch
from backends import REFERENCE, Target
from bits import Guarded, assert_same, tame, wild
from torch import Tensor

FP32_LR = 0.0010000000474974513  # exact in fp32, so that number and tensor are equal
SIZES = (0, 1, 7, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4097, 32767, 32768, 32769)


@dataclass(frozen=True)
class ShardCase:
    """One call of an op."""

    op: ClassVar[Callable[..., None]]
    state: ClassVar[tuple[str, ...]]

    numel: int = 700
    grad: torch.dtype = torch.float32
    out: torch.dtype | None = None
    weight_decay: float = 0.0
    maximize: bool = False
    on_device: bool = False  # numbers are passed as tensors
    grad_scale: float = 0.37109375
    found_inf: float | None = None
    shift: int = 0  # elements off alignment
    segments: int = 0
    idle: bool = False  # some segments are not active
    is_wild: bool = True

    def inputs(self) -> dict[str, Tensor]:
        make = wild if self.is_wild else tame
        made = {each: make(self.numel, torch.float32, seed) for seed, each in enumerate(self.state)}
        made["grad"] = make(self.numel, self.grad, 3)
        if self.out is not None:
            made["param_out"] = make(self.numel, self.out, 4)
        return made

    def numbers(self) -> dict[str, float]:
        """The numbers that may also be tensors."""
        return {"lr": FP32_LR, "grad_scale": self.grad_scale}

    def options(self, device: str) -> dict[str, object]:
        made: dict[str, object] = dict(self.numbers())
        if self.on_device:
            made = {each: torch.tensor(value, device=device) for each, value in self.numbers().items()}
        if self.found_inf is not None:
            made["found_inf"] = torch.tensor([self.found_inf], device=device)
        if self.segments:
            made["segment_ids"] = self.segment_ids().to(device)
        if self.idle:
            made["active"] = self.active().to(device)
        return made | {"weight_decay": self.weight_decay, "maximize": self.maximize}

    def segment_ids(self) -> Tensor:
        granules = -(-self.numel // 64)
        return (torch.arange(granules) // 3 * 7 % self.segments).to(torch.int32)

    def active(self) -> Tensor:
        return (torch.arange(self.segments) % 3 != 1).float()


def run(case: ShardCase, target: Target, values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the tensors after the call, on the CPU. Checks canaries and the gradient."""
    values = case.inputs() if values is None else values
    shifts = dict.fromkeys(values, case.shift)
    return run_shifted(case, target, values, shifts)


def run_shifted(
    case: ShardCase, target: Target, values: dict[str, Tensor], shifts: dict[str, int]
) -> dict[str, Tensor]:
    """The same, with each tensor off alignment by its own number of elements."""
    held = {each: Guarded(value, target.device, shifts[each]) for each, value in values.items()}
    tensors = {each: guard.tensor for each, guard in held.items()}
    type(case).op(**_with_peers(tensors), **case.options(target.device), backend=target.backend)
    for each, guard in held.items():
        guard.check(f"{each} of {case} at {shifts}")
    assert_same(tensors["grad"], values["grad"], f"grad of {case}", nan_is_nan=False)
    return {each: tensor.cpu() for each, tensor in tensors.items()}


def _with_peers(tensors: dict[str, Tensor]) -> dict[str, object]:
    """The op's arguments. If there are peers, param_out is a list."""
    peers = {each: tensor for each, tensor in tensors.items() if each.startswith("peer")}
    outs = {"param_out": [tensors["param_out"], *peers.values()]} if peers else {}
    return {each: tensor for each, tensor in tensors.items() if each not in peers} | outs


def _add_peers(values: dict[str, Tensor], num_peers: int) -> list[str]:
    """Add `num_peers` tensors like param_out, which also receive the weights. Returns their names."""
    peers = [f"peer {index}" for index in range(num_peers)]
    values |= {peer: values["param_out"] for peer in peers}
    return peers


def check_peers(make: type[ShardCase], out: torch.dtype, target: Target) -> None:
    """Check several outputs for the weights, one of them off alignment: each has the bits of a single one."""
    case = make(1037, torch.bfloat16, out, 0.01)
    for each in (case, dataclasses.replace(case, found_inf=1.0)):
        _check_peers(each, target)


def _check_peers(case: ShardCase, target: Target) -> None:
    wanted = run(case, REFERENCE)
    for num_peers, shift in ((1, 0), (7, 1), (15, 0)):
        values = case.inputs()
        peers = _add_peers(values, num_peers)
        shifts = {each: shift if each == peers[-1] else 0 for each in values}
        got = run_shifted(case, target, values, shifts)
        assert_all_same(got, wanted | {peer: wanted["param_out"] for peer in peers}, f"{num_peers} peers, {case}")


def _cut(numel: int) -> list[tuple[int, int]]:
    """[begin, end) of gradients that lie apart. They have many sizes, with and without granules between them."""
    spans, begin = [], 0
    for size, gap in cycle(((700, 0), (64, 64), (1, 0), (0, 0), (2049, 128), (63, 0), (5, 0))):
        if begin >= numel:
            return spans
        spans.append((begin, min(begin + size, numel)))
        begin = -(-spans[-1][1] // 64) * 64 + gap
    raise AssertionError


def check_lists(make: type[ShardCase], numel: int, target: Target) -> None:
    """Check gradients that lie apart: they give the bits of one whole gradient. Uncovered elements do not change."""
    for grad, out in ((torch.bfloat16, torch.bfloat16), (torch.float32, None), (torch.float16, torch.float32)):
        for shift, segments, on_device in ((0, 5, True), (3, 0, False)):
            case = make(numel, grad, out, 0.01, shift=shift, segments=segments, idle=segments > 0, is_wild=False)
            _check_list(dataclasses.replace(case, on_device=on_device), target)
    _check_list(make(numel, torch.bfloat16, torch.bfloat16, found_inf=1.0), target)
    _check_list(make(numel, torch.bfloat16, torch.bfloat16, segments=5, idle=True), target, num_peers=3)


def _check_list(case: ShardCase, target: Target, num_peers: int = 0) -> None:
    values = case.inputs()
    wanted = run(case, REFERENCE)
    wanted |= {peer: wanted["param_out"] for peer in _add_peers(values, num_peers)} if num_peers else {}
    grad, spans = values.pop("grad"), _cut(case.numel)
    held = {each: Guarded(value, target.device, 0) for each, value in values.items()}
    shifts = [index % 2 * case.shift for index in range(len(spans))]
    grads = [Guarded(grad[begin:end], target.device, shift) for (begin, end), shift in zip(spans, shifts, strict=True)]
    tensors = {each: guard.tensor for each, guard in held.items()}
    options: dict[str, object] = {"grad": [guard.tensor for guard in grads], "grad_offsets": [b for b, _ in spans]}
    type(case).op(**_with_peers(tensors), **options, **case.options(target.device), backend=target.backend)
    for each, guard in held.items():
        guard.check(f"{each} of {case} with a list")
    is_covered = torch.zeros(case.numel, dtype=torch.bool)
    for begin, end in spans:
        is_covered[begin:end] = True
    for each, value in values.items():
        assert_same(tensors[each].cpu(), torch.where(is_covered, wanted[each], value), f"{each} of {case} with a list")


def check(case: ShardCase, target: Target) -> None:
    """Assert that the target gives the same bits as the reference."""
    assert_all_same(run(case, target), run(case, REFERENCE), str(case))


def assert_all_same(got: dict[str, Tensor], wanted: dict[str, Tensor], what: str, *, nan_is_nan: bool = True) -> None:
    for each in wanted:
        assert_same(got[each], wanted[each], f"{each} of {what}", nan_is_nan=nan_is_nan)
