"""The benchmarks run at tiny sizes, and refuse to time an op that is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import gpu_timer, harness
from pyzero import ops

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--numel", "5000"]
CHEAP = ["adam", "unscale", "pack", "reduce_scatter", "loss_scale", "step_scalars", "step", "models"]


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine torch's own threads spin for seconds over tiny tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CHEAP)
def test_prints_a_table_and_json(name, tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert bench.main([name, *TINY, "--json", str(path)]) == 0

    assert f"## {name}" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["threads"] == 1
    rows = report["rows"]
    assert {row["bench"] for row in rows} == {name}
    assert any(row["name"].startswith("pyzero") for row in rows)
    assert all(row["p20_s"] <= row["median_s"] <= row["p80_s"] for row in rows)
    assert any(row["speedup"] == 1 for row in rows), "the peer's own row"


def _wrong_adam(*args, lr, **kwargs):
    return _RIGHT["adam_"](*args, lr=lr * 1.01, **kwargs)


def _wrong_unscale(tensors, inv_scale, **kwargs):
    _RIGHT["unscale_"](tensors, inv_scale, **kwargs)
    if kwargs.get("sumsq") is not None:
        kwargs["sumsq"].mul_(1.01)
    kwargs["found_inf"].zero_()


def _wrong_reduce_scatter(shard, slices, **kwargs):
    return _RIGHT["reduce_scatter_"](shard, slices[:1], **kwargs)


def _wrong_pack(bucket, tensors, **kwargs):
    return _RIGHT["pack_"](bucket, tensors[::-1], **kwargs)


def _wrong_loss_scale(state, found_inf, **kwargs):
    return _RIGHT["loss_scale_update_"](state, found_inf, growth_delay=1, **kwargs)


def _wrong_step_scalars(out, rows, **kwargs):
    _RIGHT["step_scalars_"](out, rows, **kwargs)
    out.mul_(1.01)


_RIGHT = {name: getattr(ops, name) for name in ops.__all__}


@pytest.mark.parametrize(
    ("name", "op", "wrong"),
    [
        ("adam", "adam_", _wrong_adam),
        ("unscale", "unscale_", _wrong_unscale),
        ("reduce_scatter", "reduce_scatter_", _wrong_reduce_scatter),
        ("pack", "pack_", _wrong_pack),
        ("loss_scale", "loss_scale_update_", _wrong_loss_scale),
        ("step_scalars", "step_scalars_", _wrong_step_scalars),
        ("step", "adam_", _wrong_adam),
        ("step", "unscale_", _wrong_unscale),
        ("models", "adam_", _wrong_adam),
    ],
)
def test_a_wrong_op_is_not_timed(name, op, wrong, monkeypatch, capsys):
    monkeypatch.setattr(ops, op, wrong)
    assert bench.main([name, *TINY]) == 1
    captured = capsys.readouterr()
    assert "NOT TIMED" in captured.err and "differs from the peer" in captured.err
    assert f"## {name}" not in captured.out


def test_every_bench_is_tested():
    assert set(bench._MODULES) == {*CHEAP, *bench._CPU_ONLY}


def test_as_a_user_types_it(tmp_path):
    """From the root."""
    command = [sys.executable, "-m", "benchmarks", "loss_scale", *TINY, "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "## loss_scale" in done.stdout and (tmp_path / "figures.json").exists()
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__", "__main__"}
    assert not modules & {"build", *sys.stdlib_module_names}, "a script of this folder would import it instead"


def test_import_is_measured(capsys):
    assert bench.main(["import", *TINY]) == 0
    assert "import pyzero" in capsys.readouterr().out


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["adma"])
    assert "adma" in capsys.readouterr().err


def test_speedup_is_the_peers_median_over_ours(monkeypatch):
    durations = {"ours": 1.0, "peer": 3.0}
    monkeypatch.setattr(harness, "_time_cpu", lambda call: call())
    contenders = [harness.Contender(name, lambda name=name: durations[name], 4) for name in durations]
    rows = harness.compare("b", "c", 10**9, contenders, harness.Options(numel=8), peer="peer", with_copy=False)
    assert [row.speedup for row in rows] == [3.0, 1.0]
    assert [row.gb_per_s for row in rows] == [4.0, 4 / 3]


class FakeGpu:
    """Enough of torch.cuda for GpuTimer: a queue that runs apart from the host, on a clock of its own."""

    def __init__(self, queue_length=1024):
        self.host = self.gpu = 0.0
        self.ends = []  # of what is enqueued
        self.queue_length = queue_length

    def launch(self, gpu_s, host_s=0.0):
        self.host += host_s
        self.ends = [end for end in self.ends if end > self.host]
        if len(self.ends) >= self.queue_length:  # the host waits for room
            self.host = self.ends.pop(0)
        self.gpu = max(self.gpu, self.host) + gpu_s
        self.ends.append(self.gpu)

    def _sleep(self, cycles):
        self.launch(cycles / 1e9)

    def synchronize(self):
        self.host = max(self.host, self.gpu)

    def Event(self, enable_timing):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu):
        self.on = gpu

    def record(self):
        self.on.launch(0.0)
        self.at = self.on.gpu

    def synchronize(self):
        self.on.synchronize()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.fixture
def fake_gpu(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(gpu_timer.torch, "cuda", gpu)
    monkeypatch.setattr(gpu_timer.time, "perf_counter", lambda: gpu.host)
    monkeypatch.setattr(gpu_timer, "_flush", [torch.zeros(1)])
    monkeypatch.setattr(gpu_timer, "_rate", [])
    return gpu


def test_the_gpus_time_is_free_of_the_hosts(fake_gpu):
    """30 launches of 5 us each, for which the host takes 40 us each: 150 us on the GPU, 1.2 ms on the host."""

    def call():
        for _ in range(30):
            fake_gpu.launch(5e-6, host_s=40e-6)

    timer = gpu_timer.GpuTimer(call)
    assert timer.sample() == pytest.approx(150e-6)
    assert timer.host_s == pytest.approx(1.2e-3) and timer.hides_host


def test_a_full_queue_is_told(fake_gpu):
    """More launches than the queue holds: the host is blocked for as long as the GPU sleeps."""

    def call():
        for _ in range(2000):
            fake_gpu.launch(5e-6, host_s=10e-6)

    timer = gpu_timer.GpuTimer(call)
    assert timer.sample() == pytest.approx(2000 * 10e-6, rel=0.01), "what the host costs"
    assert not timer.hides_host and timer.host_s == pytest.approx(20e-3)
    row = harness.Row("b", "c", "who", 1, 0.02, 0.02, 0.02, host_s=timer.host_s, hides_host=timer.hides_host)
    assert "host ms" in harness.table([row]) and "20.00+" in harness.table([row])
    assert "host ms" not in harness.table([harness.Row("b", "c", "who", 1, 0.02, 0.02, 0.02)])


def test_the_profile_of_a_step(tmp_path):
    out = tmp_path / "new" / "profile.json"
    command = [sys.executable, "-m", "benchmarks.profile_step", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: ")
    events = json.loads(out.read_text())["traceEvents"]
    names = {event["name"] for event in events if event.get("ph") == "X"}
    assert {"forward", "backward", "step", "pyzero::collect", "pyzero::adam"} <= names
    if not torch.cuda.is_available():  # two ranks
        assert {"pyzero::reduce_scatter", "pyzero::all_gather"} <= names
