"""What `estimate` predicts against what living tensors take, at rest and at the worst moment of a step."""

import re
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from meter import Meter, gloo_lets_go
from torch import Tensor, nn

import pyzero
from pyzero.__main__ import _count, main
from pyzero.estimate import Estimate, estimate, estimate_numel

WITHIN = 0.03
SHAPES = [(700, 300), (300,), (300, 400), (400,), (17,), (400, 500), (1000, 333), (5, 5, 5)]


class Ones(torch.autograd.Function):
    """A loss whose backward makes each gradient when it is due, and nothing else."""

    @staticmethod
    def forward(ctx: Any, before: Tensor, param: Tensor) -> Tensor:
        ctx.made_like = param.shape, param.dtype
        return before.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        shape, dtype = ctx.made_like
        return grad, torch.ones(shape, dtype=dtype)


def measure(group: Any, dtype: torch.dtype, *args: Any) -> dict[str, int]:
    with gloo_lets_go():
        return measured(group, dtype, *args)


def measured(group: Any, dtype: torch.dtype, options: dict[str, Any], num_backwards: int = 1) -> dict[str, int]:
    with Meter() as meter:
        params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
        optimizer = pyzero.FusedZeroAdamW(params, process_group=group, loss_scale=None, **options)
        for _ in range(2):
            meter.know_shared(optimizer)
            meter.most = 0
            for number in range(num_backwards):
                loss = torch.zeros((), requires_grad=True)
                for param in params:
                    loss = Ones.apply(loss, param)
                with optimizer.no_sync() if number < num_backwards - 1 else nullcontext():
                    loss.backward()
                del loss
            after_backward = meter.now
            optimizer.step()
            optimizer.zero_grad()
        return {"idle": meter.now, "after backward": after_backward, "peak": meter.most}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"stage": 1, "transport": "exact"}),
        (3, {"stage": 2, "transport": "exact"}),
        (1, {}),
        (2, {"stage": 1}),
        (2, {"stage": 2}),
        (4, {"stage": 2}),
        (3, {"stage": 2}),
        (2, {"reduce_grads": False, "stage": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("cap", [0.25, 25.0])
def test_within_three_percent_of_what_is_measured(ranks, dtype, size, options, cap):
    params = [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in SHAPES]
    predicted = estimate(params, num_ranks=size, bucket_cap_mb=cap, **options)
    check(predicted, ranks.run(size, measure, dtype, {**options, "bucket_cap_mb": cap}))


def check(predicted: Estimate, found: list[dict[str, int]]) -> None:
    for one in found:
        assert one["idle"] == pytest.approx(predicted.idle, rel=WITHIN)
        assert one["after backward"] == pytest.approx(predicted.idle + predicted.gradients, rel=WITHIN)
    assert max(one["peak"] for one in found) == pytest.approx(predicted.peak, rel=WITHIN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("size", "options"),
    [(2, {"stage": 1, "transport": "exact"}), (2, {"stage": 2, "transport": "exact"}), (2, {"stage": 2}), (1, {})],
    ids=str,
)
def test_sums_of_several_backwards_are_counted(ranks, dtype, size, options):
    params = [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in SHAPES]
    predicted = estimate(params, num_ranks=size, bucket_cap_mb=0.25, accumulates=True, **options)
    check(predicted, ranks.run(size, measure, dtype, {**options, "bucket_cap_mb": 0.25}, 3))


class GatheringMeter(Meter):
    """Counts storages as large as they are: fully_shard frees by resizing."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: Any = weakref.WeakValueDictionary()

    def _see(self, storage: torch.UntypedStorage) -> None:
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        ranges = [(other.data_ptr(), other.nbytes()) for other in self._storages.values()]
        if storage.device.type != "meta" and storage._cdata not in self._storages:
            if not any(low <= begin and end <= low + size for low, size in ranges):
                self._storages[storage._cdata] = storage
        self.now = sum(other.nbytes() for other in self._storages.values())
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "c10d":
            time.sleep(0.003)  # for gloo's threads to let go of it
        return result

    def settled(self) -> int:
        time.sleep(0.02)
        torch.zeros(1)
        return self.now


class Net(nn.Module):
    """Blocks between what the root gathers, which computes before and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 256)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(256, 600), nn.Linear(600, 256)) for _ in range(4))
        self.norm = nn.LayerNorm(256)
        self.head = nn.Linear(256, 301)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def measure_stage_3(group: Any, dtype: torch.dtype) -> dict[str, int]:
    from torch.distributed.device_mesh import DeviceMesh

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    with GatheringMeter() as meter:
        model = Net()
        engine = pyzero.initialize(model=model, config=config, mesh=DeviceMesh.from_group(group, "cpu"))[0]
        steps = []
        for _ in range(5):
            idle, meter.most = meter.settled(), 0
            engine.optimizer.backward(engine(torch.tensor([[3]])).sum())
            steps.append((idle, meter.settled(), meter.most))
            engine.step()
        # The least of some steps: what gloo's threads have not let go of comes on top. The first step is another.
        idle, after_backward, peak = (min(values) for values in zip(*steps[1:], strict=True))
        return {"idle": idle, "after backward": after_backward, "peak": peak}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_stage_3_within_three_percent_of_what_is_measured(ranks, dtype):
    predicted = estimate(Net().to(dtype), num_ranks=2, stage=3)
    found = ranks.run(2, measure_stage_3, dtype)
    for one in found:
        assert one["idle"] == pytest.approx(predicted.idle, rel=WITHIN)
        assert one["after backward"] == pytest.approx(predicted.idle + predicted.gradients, rel=WITHIN)
    assert max(one["peak"] for one in found) == pytest.approx(predicted.peak, rel=WITHIN)


def test_zero_papers_numbers():
    """2 + 12/W bytes of state and weights (arXiv 1910.02054), and 4/W of gradients, here in fp32."""
    for num_ranks in (1, 8, 64):
        found = estimate_numel(7_000_000_000, torch.bfloat16, num_ranks, stage=2, bucket_cap_mb=25.0)
        assert found.idle / 7e9 == pytest.approx(2 + 12 / num_ranks, rel=0.01)
        if num_ranks > 1:
            assert found.gradients / 7e9 == pytest.approx(4 / num_ranks, rel=0.01)


# Beside the shards of gradients, of which those of the last two blocks are not there yet: 4 bytes over 8 ranks each.
# bf16: a gradient and the block gathered ahead, two fp32 copies to send; fp32: two blocks, a gradient, one copy.
@pytest.mark.parametrize(
    ("dtype", "block_bytes"), [(torch.bfloat16, 2 * 2 + 2 * 4 - 1), (torch.float32, 3 * 4 + 4 - 1)], ids=str
)
def test_stage_3_by_hand(dtype, block_bytes):
    """fp32 shards that are their own masters: 4 + 8 bytes over all ranks, 4 of gradients; two blocks at work."""
    found = estimate_numel(8_000_000_000, dtype, 8, 3, 25.0, num_blocks=40)
    assert found.weights / 1e9 == pytest.approx(4, rel=0.01) and found.state / 1e9 == pytest.approx(8, rel=0.01)
    assert found.gradients / 1e9 == pytest.approx(4, rel=0.01) and found.shared == 0
    assert found.buckets == pytest.approx(200_000_000 * block_bytes, rel=1e-4)
    assert found.peak == found.idle + found.gradients + found.buckets


def test_stage_3_of_weights_in_no_block_by_hand():
    """At the end: a gradient in bf16, its copy in fp32 that is sent, and this rank's half of the mean."""
    found = estimate(nn.Linear(1024, 1024, bias=False).bfloat16(), num_ranks=2, stage=3)
    assert found.gradients + found.buckets == 2**20 * (2 + 4 + 2)


def test_tensor_parallel_by_hand():
    """Each rank has a quarter, of which the rest is as for a model of that size."""
    whole, quarter = (estimate_numel(n, torch.bfloat16, 8, 2, 25.0, t) for n, t in ((2 * 10**9, 1), (8 * 10**9, 4)))
    assert (quarter.peak, quarter.idle, quarter.num_params) == (whole.peak, whole.idle, 8 * 10**9)
    assert estimate_numel(10**6, torch.bfloat16, 1, 3, 25.0) == estimate_numel(10**6, torch.bfloat16, 1, 2, 25.0)
    with pytest.raises(ValueError, match="tensor_parallel and num_blocks from 1, got 0 and 32"):
        estimate_numel(10**6, torch.bfloat16, 1, 3, 25.0, 0)
    assert estimate(nn.Linear(2, 2), stage=3) == estimate(nn.Linear(2, 2), stage=2)
    odd = nn.ParameterList([nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(0, 4))])
    assert estimate(odd, num_ranks=2, stage=3).num_params == 1
    with pytest.raises(ValueError, match="expected a module for stage 3"):
        estimate([nn.Parameter(torch.zeros(2))], stage=3, num_ranks=2)


@pytest.mark.parametrize("wrong", [{"accumulates": True}, {"reduce_grads": False}, {"transport": "peer"}], ids=str)
def test_what_stage_3_does_not_count_is_refused(wrong):
    with pytest.raises(ValueError, match=f"expected {next(iter(wrong))} only in stages 1 and 2"):
        estimate(nn.Linear(2, 2), num_ranks=2, stage=3, **wrong)
    assert estimate(nn.Linear(2, 2), num_ranks=2, stage=2, **wrong).num_params == 6
    with pytest.raises(ValueError, match="transport to be one of auto, exact, collective, peer, got 'sockets'"):
        estimate(nn.Linear(2, 2), transport="sockets")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--stage 3 --ranks 8 --accumulate", "accumulates only in stages 1 and 2"),
        ("--stage 2 --ranks 8 --blocks 4", "got it with stage 2 and 8"),
        ("--stage 3 --blocks 4", "got it with stage 3 and 1"),
        ("--ranks 8 --bucket-cap-mb 0.001", "7000000000 parameters; pass a larger bucket_cap_mb"),
        ("--model-params 1e30", "expected at most 100000 buckets"),
        ("--stage 3 --ranks 2 --blocks 99999999999999999999999", "expected num_blocks up to 100000"),
    ],
)
def test_so_it_is_on_the_command_line(wrong, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["estimate", "--model-params", "7B", *wrong.split()])
    assert said in capsys.readouterr().err


def test_the_device_is_asked_for_and_not_looked_up(monkeypatch, capsys):
    """8 ranks: on GPUs buckets of 100 MiB, on CPUs of 25 in shared memory, whatever this torch sees."""
    printed = {}
    for sees_gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda sees_gpu=sees_gpu: sees_gpu)
        for device in ("cuda", "cpu"):
            assert main(["estimate", "--model-params", "7e9", "--ranks", "8", "--device", device]) == 0
            printed[sees_gpu, device] = capsys.readouterr().out
            assert ("on GPUs" in printed[sees_gpu, device]) is (device == "cuda")
    assert printed[True, "cuda"] == printed[False, "cuda"] and printed[True, "cpu"] == printed[False, "cpu"]
    gpu, cpu = (estimate_numel(7 * 10**9, torch.bfloat16, 8, 2, None, on_gpu=on_gpu) for on_gpu in (True, False))
    assert gpu.shared == 0 < cpu.shared and gpu.buckets > cpu.buckets


def test_cpu_offload_by_hand():
    """Masters and moments lie on the host; 2 bytes of weights stay, and 4 for each 64 elements of the shard."""
    for found in (
        estimate_numel(8_000_000_000, torch.bfloat16, 8, 2, 25.0, cpu_offload=True),
        estimate(nn.Linear(8192, 8192, bias=False, dtype=torch.bfloat16, device="meta"), cpu_offload=True),
    ):
        n = found.num_params // (8 if found.num_params > 1e9 else 1)
        assert found.host / n == pytest.approx(12, rel=1e-3)
        assert (found.idle - found.weights) / n == pytest.approx(4 / 64, rel=1e-3)


def test_frozen_parameters_are_weights_alone():
    model = nn.Linear(640, 640, bias=False).requires_grad_(False)
    assert estimate(model).peak == 640 * 640 * 4


@pytest.mark.parametrize(
    ("text", "wanted"), [("7B", 7e9), ("1.5b", 1.5e9), ("350M", 35e7), ("10k", 1e4), ("7e9", 7e9), ("12", 12)]
)
def test_counts_as_people_write_them(text, wanted, capsys):
    assert main(["estimate", "--model-params", text]) == 0
    assert _count(text) == wanted


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("7X", "got '7X'"), ("-1", "got '-1'"), ("inf", "got 'inf'"), ("7B --bucket-cap-mb -3", "got -3.0; pass None")],
)
def test_numbers_that_make_no_sense(wrong, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["estimate", "--model-params", *wrong.split()])
    assert said in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"pyzero {pyzero.__version__}\n"


def test_the_command(capsys):
    for device, shared in (("cuda", 0), ("cpu", 2 * 25 * 2**20 / 1e9)):
        args = ["estimate", "--model-params", "1e9", "--ranks", "8", "--stage", "2", "--dtype", "bf16"]
        assert main([*args, "--device", device]) == 0
        head, *shown = capsys.readouterr().out.splitlines()
        assert ("on GPUs" if device == "cuda" else "on CPUs") in head
        rows = [re.split(r"\s{2,}", line) for line in shown]
        lines = {name: per_param.removesuffix(" B") for name, _, per_param, *_ in rows}
        assert lines["weights"] == "2.00"
        assert float(lines["after step and zero_grad"]) == pytest.approx(3.5 + shared, abs=0.011)
    args = ["estimate", "--model-params", "2e9", "--ranks", "8", "--stage", "3", "--tensor-parallel", "2"]
    assert main([*args, "--blocks", "10"]) == 0
    shown = capsys.readouterr().out
    lines = dict(re.split(r"\s{2,}", line)[::2] for line in shown.splitlines()[1:])
    assert (lines["weights"], lines["buckets or blocks on their way, at most"]) == ("0.25 B", "0.55 B")
    mib, gib = re.search(r"^peak, without activations +([\d.,]+) .* B +([\d.]+) GiB$", shown, re.MULTILINE).groups()
    assert float(gib) == pytest.approx(float(mib.replace(",", "")) / 1024, abs=0.051)
    assert main([*args, "--blocks", "32"]) == 0
    shown = capsys.readouterr().out
    assert main(args) == 0
    assert capsys.readouterr().out.startswith(f"{shown}for 32 blocks of one size, ")
    with pytest.raises(SystemExit):
        main(["estimate", "--model-params", "1e9", "--ranks", "0"])
    done = subprocess.run([sys.executable, "-m", "pyzero", "estimate", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--model-params" in done.stdout
