"""The benchmarks run at tiny sizes, and refuse to time an op that is wrong."""

import functools
import json
import os
import re
import statistics
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import __main__ as bench
from benchmarks import (
    checkpoint,
    gpu_timer,
    harness,
    memory,
    peers,
    results,
    rows,
    step_scalars,
    timing,
    train,
    train_loops,
    workloads,
)
from benchmarks.options import Options
from pyzero import ops
from pyzero.ops import registry

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--numel", "5000"]
ON_RANKS = ["backward", "transport", "train", "memory", "scaling"]
CHEAP = ["adam", "lion", "sgd", "unscale", "pack", "reduce_scatter", "loss_scale", "step_scalars", "step", "models"]


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine torch's own threads spin for seconds over tiny tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CHEAP)
def test_prints_a_table_and_writes_files(name, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert bench.main([name, *TINY, "--out", str(out)]) == 0

    assert f"## {name}" in capsys.readouterr().out
    assert f"## {name}" in (out / "results.md").read_text()
    report = json.loads((out / "results.json").read_text())
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["threads"] == 1
    assert report["environment"]["commit"] and "apex" in report["environment"]["absent"]
    found = report["rows"]
    assert {row["bench"] for row in found} == {name}
    assert all(row["p20_s"] <= row["median_s"] <= row["p80_s"] for row in found)
    assert all(row["median_s"] == statistics.median(row["samples_s"]) for row in found)
    for case in {row["case"] for row in found}:
        ours, *others = [row for row in found if row["case"] == case]
        assert ours["name"].startswith("pyzero") and ours["times_ours"] == 1 and ours["peer"] is None
        assert all(row["times_ours"] for row in others if row["name"] not in harness.MACHINE)
    assert any(row["peer"] for row in found)
    if name in ("adam", "lion", "sgd", "unscale", "reduce_scatter", "pack", "step"):
        assert (out / "roofline.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_RANKS)
def test_on_ranks(name, tmp_path, capsys):
    size = ["--numel", "16800000", "--peers", "ddp"] if name == "memory" else TINY
    assert bench.main([name, *size, "--out", str(tmp_path)]) == 0
    _, found = results.read(tmp_path)
    assert {row.bench for row in found} == {name}
    assert any(row.peer for row in found) and any(row.peer is None for row in found)
    if name == "train":
        whole = [row for row in found if row.phases]
        assert {"FSDP2", "DDP", "FusedZeroAdamW"} <= {row.name.replace(",", " ").split()[0] for row in whole}
        assert all({"forward", "backward", "step"} == row.phases.keys() for row in whole)
        assert len(found) == 2 * len(whole) - 1, "beyond compute, but for compute"
    if name == "memory":
        ours = [row for row in found if row.peer is None]
        assert [row.num_ranks for row in ours] == [1, 2]
        for row in ours:  # 32 MiB of weights, 192 of state: what the estimate says, but for up to 64 MiB of kept pages
            assert -(2 << 20) < row.rest_bytes - row.estimated_rest_bytes < 68 << 20, row
            assert row.peak_bytes >= row.rest_bytes and row.estimated_peak_bytes >= row.estimated_rest_bytes
    if name == "scaling":
        assert any(row.predicted_s for row in found)


def _wrong_adam(*args, lr, **kwargs):
    return _RIGHT["adam_"](*args, lr=lr * 1.01, **kwargs)


def _wrong_lion(*args, lr, **kwargs):
    return _RIGHT["lion_"](*args, lr=lr * 1.01, **kwargs)


def _wrong_sgd(*args, lr, **kwargs):
    return _RIGHT["sgd_"](*args, lr=lr * 1.01, **kwargs)


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


def _wrong_step_scalars(out, stats, **kwargs):
    _RIGHT["step_scalars_"](out, stats, **kwargs)
    out.mul_(1.01)


_RIGHT = {name: getattr(ops, name) for name in ops.__all__}


@pytest.mark.parametrize(
    ("name", "op", "wrong"),
    [
        ("adam", "adam_", _wrong_adam),
        ("lion", "lion_", _wrong_lion),
        ("sgd", "sgd_", _wrong_sgd),
        ("unscale", "unscale_", _wrong_unscale),
        ("reduce_scatter", "reduce_scatter_", _wrong_reduce_scatter),
        ("pack", "pack_", _wrong_pack),
        ("loss_scale", "loss_scale_update_", _wrong_loss_scale),
        ("step_scalars", "step_scalars_", _wrong_step_scalars),
        ("step", "adam_", _wrong_adam),
        ("step", "unscale_", _wrong_unscale),
        ("models", "adam_", _wrong_adam),
        ("scaling", "adam_", _wrong_adam),
    ],
)
def test_a_wrong_op_is_not_timed(name, op, wrong, monkeypatch, capsys):
    monkeypatch.setattr(ops, op, wrong)
    assert bench.main([name, *TINY]) == 1
    captured = capsys.readouterr()
    assert "NOT TIMED" in captured.err and "differs from the peer" in captured.err
    assert f"## {name}" not in captured.out


@pytest.mark.parametrize("name", ["train", "memory"])
@pytest.mark.parametrize(("asked", "kinds"), [("none", {None}), ("fsdp2", {None, "fsdp2"})])
def test_a_loop_that_is_only_checked_against_is_not_timed(name, asked, kinds, monkeypatch):
    """DDP, if --peers does not name it."""
    specs = []

    def launch(module, num_ranks, spec, environ=None):
        specs.append(spec)
        names = [one for one in spec["names"] if one not in spec.get("untimed", ())]
        phases = {one: [{"forward": 1.0, "backward": 2.0, "step": 3.0}] for one in names}
        return {"phases": phases, "bytes": dict.fromkeys(names, (1, 2)), "notes": []}

    module = {"train": train, "memory": memory}[name]
    monkeypatch.setattr(module, "launch", launch)
    found = module.run(Options(numel=5000, peers=frozenset({asked} - {"none"})))
    assert {row.peer for row in found} == kinds
    assert name != "train" or {train_loops.MASTERS, train_loops.PLAIN} <= {*specs[0]["names"]}


class NeverReduces(train_loops.Loop):
    """Each rank steps by its own gradients."""


class SendsRankZeros(train_loops.Loop):
    """All step by rank 0's gradients: alike, and wrong."""

    def _backward(self, loss):
        loss.backward()
        for param in self.model.parameters():
            dist.broadcast(param.grad, 0)


def checked_beside_ddp(group, loop, width):
    """What the check of `train` says of ours, and of such a loop, on all ranks."""
    device = torch.device("cpu")
    workload = workloads.Linears(width)
    model = train_loops.make_model(workload, device)
    train_loops.ENTRIES["other"] = train_loops.Entry(None, same_as=train_loops.MASTERS)
    names = [train_loops.OURS, train_loops.MASTERS]
    loops = {name: train_loops.ENTRIES[name].make(workload, device) for name in names}
    x = workload.inputs()
    train.check(loops, x, Options())
    fresh = {train_loops.MASTERS: train_loops.ENTRIES[train_loops.MASTERS].make(workload, device)}
    try:
        train.check(fresh | {"other": loop(model, train_loops._Masters(list(model.parameters())))}, x, Options())
    except AssertionError as error:
        return str(error)
    return "passed"


class FailsOnRankOne(train_loops.Loop):
    """After the collectives, so that no rank waits."""

    def _update(self):
        if dist.get_rank() == 1:
            raise KeyError("HOME")


def notes_of_a_peer(group, loop, peer, width):
    """What the check of `train` notes of such a loop if it is a peer, and what is left to time."""
    device, notes = torch.device("cpu"), Options()
    workload = workloads.Linears(width)
    model = train_loops.make_model(workload, device)
    train_loops.ENTRIES["other"] = train_loops.Entry(None, peer=peer, same_as=train_loops.MASTERS)
    loops = {name: train_loops.ENTRIES[name].make(workload, device) for name in (train_loops.OURS, train_loops.MASTERS)}
    loops["other"] = loop(model, train_loops._Masters(list(model.parameters())))
    train.check(loops, workload.inputs(), notes)
    return notes.notes, list(loops)


@pytest.mark.parametrize(
    ("loop", "word"),
    [
        (NeverReduces, "other left other weights on other ranks"),
        (SendsRankZeros, "moved the weights otherwise"),
        (FailsOnRankOne, "failed on another rank"),
    ],
)
def test_a_peer_that_fails_or_differs_on_ranks_is_left_out_on_all(ranks, loop, word):
    for notes, names in ranks.run(4, notes_of_a_peer, loop, "deepspeed", 17)[:1]:
        assert len(notes) == 1 and notes[0].startswith("other: not timed, ") and word in notes[0]
        assert names == [train_loops.OURS, train_loops.MASTERS]


def what_fails(group, name):
    """What making the loops of `train` says or notes if one of them cannot be made."""
    entry, notes = train_loops.ENTRIES[name], Options()
    broken = train_loops.Entry(lambda width, device: [][1], peer=entry.peer, same_as=entry.same_as)
    train_loops.ENTRIES[name] = broken
    try:
        made = train.make_loops({"names": [name], "workload": ["Linears", {"width": 8}]}, torch.device("cpu"), notes)
    except IndexError as error:
        return str(error)
    finally:
        train_loops.ENTRIES[name] = entry
    return [*made, *notes.notes]


def test_only_a_peer_may_fail(ranks):
    """Without ours, every ratio would be to another contender."""
    for name in (train_loops.OURS, train_loops.MASTERS):
        assert ranks.run(4, what_fails, name) == ["list index out of range"] * 4
    name = "DeepSpeed ZeRO-2, AdamW(fused)"
    assert ranks.run(4, what_fails, name) == [[f"{name}: not timed, IndexError: list index out of range"]] * 4


@pytest.mark.parametrize(
    ("loop", "word"),
    [(NeverReduces, "other left other weights on other ranks"), (SendsRankZeros, "moved the weights otherwise")],
)
@pytest.mark.parametrize("width", [17, 64])
def test_a_training_loop_that_does_not_reduce_is_not_timed(ranks, loop, word, width):
    for found in ranks.run(4, checked_beside_ddp, loop, width):
        assert word in found


def test_every_bench_is_tested():
    assert set(bench._MODULES) == {*CHEAP, *ON_RANKS, "checkpoint", "build", "import"}


def test_as_a_user_types_it(tmp_path):
    """From the root."""
    command = [sys.executable, "-m", "benchmarks", "loss_scale", *TINY, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "## loss_scale" in done.stdout and (tmp_path / "results.json").exists()
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__", "__main__"}
    assert not modules & {"build", *sys.stdlib_module_names}, "a script of this folder would import it instead"


def test_checkpoints_without_a_peer_that_fails(monkeypatch, tmp_path):
    def fails(num_layers):
        raise RuntimeError("no launcher")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "_WIDTH", 64)
    monkeypatch.setattr(checkpoint, "_deepspeed_engine", fails)
    monkeypatch.setattr(peers, "is_there", lambda key, options: True)
    options = Options(numel=4096)
    found = checkpoint.run(options)
    assert options.notes == ["DeepSpeed ZeRO-2: not timed, RuntimeError: no launcher"]
    assert {(row.case, row.name) for row in found if row.name not in checkpoint.MACHINE} == {
        ("save", "pyzero"),
        ("load", "pyzero"),
    }
    assert not [*tmp_path.iterdir()]


def test_import_is_measured(capsys):
    assert bench.main(["import", *TINY]) == 0
    assert "import pyzero" in capsys.readouterr().out


@pytest.mark.parametrize(("argument", "word"), [("adma", "adma"), ("--peers=horovod", "horovod")])
def test_unknown_words_are_refused(argument, word, capsys):
    with pytest.raises(SystemExit):
        bench.main([argument])
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--numel", "--threads", "--ranks"])
@pytest.mark.parametrize("value", ["0", "-5", "1.5", "many"])
def test_what_is_no_positive_number_is_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        bench.main(["adam", *TINY, f"{option}={value}"])
    assert f"argument {option}: expected a whole number from 1 on, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_timing(out, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        bench.main(["adam", *TINY, "--out", str(tmp_path / out)])
    assert f"got --out {tmp_path / out}, wanted a folder to write to (" in capsys.readouterr().err


def fake_contenders(monkeypatch, durations):
    """Each takes what it says in the next round."""
    order = []

    class FakeTimer:
        host_s = hides_host = None

        def __init__(self, call, device):
            self.name = call

        def sample(self):
            order.append(self.name)
            return durations[self.name][sum(name == self.name for name in order) - 1]

    monkeypatch.setattr(harness, "make_timer", FakeTimer)
    keys = {"ours": None, "peer": "torch-fused"}
    return order, [harness.Contender(name, name, 4, keys[name]) for name in durations]


def test_ratios_are_of_medians_in_turns(monkeypatch):
    order, contenders = fake_contenders(monkeypatch, {"ours": [9.0, 1.0, 1.0, 1.2], "peer": [9.0, 3.0, 3.1, 2.9]})
    found = harness.compare("b", "c", 10**9, contenders, Options(numel=8), with_copy=False)
    assert order == ["ours", "peer", "peer", "ours"] * 2, "every second round backwards"
    assert [row.times_ours for row in found] == [1.0, 3.0] and [row.is_decided for row in found] == [True, True]
    assert [row.gb_per_s for row in found] == [4.0, 4 / 3]


def test_what_is_too_noisy_to_judge_says_so(monkeypatch):
    _, contenders = fake_contenders(monkeypatch, {"ours": [9.0, 1.0, 2.0, 3.0], "peer": [9.0, 2.5, 2.6, 2.7]})
    found = harness.compare("b", "c", 8, contenders, Options(numel=8), with_copy=False)
    assert found[1].is_decided is False and "1.30?" in rows.table(found) and "noisy" in rows.table(found)
    assert "TOO NOISY TO JUDGE: of 1 of 2 rows" in rows.verdict(found)
    assert rows.verdict(found[1:]) is None


def test_no_committed_run_is_too_noisy_to_judge():
    """README and docs/measured.md quote them."""
    found = sorted((ROOT / "benchmarks" / "results").rglob("results.md"))
    assert found and not [path for path in found if "TOO NOISY TO JUDGE" in path.read_text()]


@pytest.mark.slow
def test_a_large_model_is_timed_beside_peers_with_and_without_masters():
    tiny = workloads.GPT2(layers=2, width=32, heads=2, context=16, vocabulary=64, tokens=16)
    found = [row for row in train.time_in_parts(tiny, Options(numel=5000)) if row.phases]
    cases = {what: [row.name for row in found if what in row.case] for what in ("with masters", "without masters")}
    assert all(names[0] == train_loops.OURS and names[-1] == train_loops.COMPUTE for names in cases.values())
    assert train_loops.MASTERS in cases["with masters"] and train_loops.PLAIN in cases["without masters"]


def test_a_model_that_does_not_fit_is_named_and_left_out(monkeypatch, tmp_path):
    told = tmp_path / "meminfo"
    monkeypatch.setattr(train, "_MEMORY", told)
    monkeypatch.setattr(train, "_time", lambda workload, names, options, *more, **kwargs: [workload.title])
    for kib, timed in ((9_000_000, []), (30_000_000, ["GPT-2 (124M)"] * 2)):
        told.write_text(f"MemFree: 1 kB\nMemAvailable: {kib} kB\n")
        options = Options()
        assert train.run(options) == ["16 x Linear(1024)", *timed]
        assert ("GPT-2 (124M): not timed" in " ".join(options.notes)) is (not timed)


def test_the_documents_name_the_commits_of_the_committed_runs():
    text = (ROOT / "docs" / "measured.md").read_text()
    for path in (ROOT / "benchmarks" / "results").rglob("results.json"):
        assert results.read(path)[0]["commit"] in text, path


@pytest.mark.parametrize("document", ["README.md", "docs/measured.md"])
def test_the_figures_of_documents_are_in_the_committed_run(document):
    """Of an iteration on two ranks, beside each peer."""
    _, found = results.read(ROOT / "benchmarks" / "results" / "cpu")
    whole = [row for row in found if row.bench == "train" and row.phases]
    ratios = {row.name: row.times_ours for row in whole if "Linear" in row.case}
    text = (ROOT / document).read_text()
    for name, peer in (
        ("DDP, AdamW(fused), fp32 masters by hand", "DDP"),
        ("FSDP2, AdamW(fused), no masters, summed in fp32", "FSDP2"),
        ("DeepSpeed ZeRO-2, AdamW(fused)", "DeepSpeed"),
    ):
        figure = re.escape(f"{ratios[name]:.1f}x")
        assert re.search(rf"(?<![\d.]){figure} (faster )?than {peer}|\| {peer}[^|]*\| {figure} \|", text), name


@pytest.mark.parametrize(
    ("folder", "name"), [("cpu", "EPYC"), ("xeon", "Xeon"), ("nvidia-h200", "H200"), ("nvidia-h100", "H100")]
)
def test_every_peer_that_is_faster_is_in_the_documents_table(folder, name):
    text = (ROOT / "docs" / "measured.md").read_text().partition("## Slower or larger than a peer")[2]
    table = [line for line in text.partition("\n## ")[0].splitlines() if name in line]
    _, found = results.read(ROOT / "benchmarks" / "results" / folder)
    for row in found:
        if row.bench != "memory" and row.peer and row.is_decided and row.times_ours < 0.995:
            assert any(f"{row.times_ours:.2f}x" in line for line in table), row


def test_only_the_peers_asked_for_are_timed(monkeypatch):
    for asked, names in ((frozenset(), ["ours"]), (frozenset({"torch-fused"}), ["ours", "peer"])):
        _, contenders = fake_contenders(monkeypatch, {"ours": [1.0] * 4, "peer": [1.0] * 4})
        options = Options(numel=8, peers=asked)
        found = harness.compare("b", "c", 8, contenders, options, with_copy=False)
        assert [row.name for row in found] == names
        assert set(peers.versions(options)) == asked


def test_a_peer_that_fails_or_differs_is_named_and_left_out(monkeypatch, tmp_path, capsys):
    def broken(params):
        raise RuntimeError("no compiler\nwith details")

    class Slow(torch.optim.AdamW):
        def __init__(self, params):
            super().__init__(params, lr=2e-3)

    found = peers.adamw_peers(Options())
    found |= {"broken": ("apex", peers._maker(broken)), "slow": ("deepspeed", peers._maker(Slow))}
    monkeypatch.setattr(peers, "adamw_peers", lambda options: found)
    assert bench.main(["adam", *TINY, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "broken: not timed, RuntimeError: no compiler" in text
    assert "slow: not timed, AssertionError: adam_ against slow: master differs from the peer" in text
    assert not {"broken", "slow"} & {row.name for row in results.read(tmp_path)[1]}


@pytest.mark.parametrize("error", [SystemExit("bye"), KeyError("bye")])
def test_whatever_a_peer_raises_the_run_goes_on(monkeypatch, capsys, error):
    def broken(params):
        raise error

    found = peers.adamw_peers(Options()) | {"broken": ("apex", peers._maker(broken))}
    monkeypatch.setattr(peers, "adamw_peers", lambda options: found)
    assert bench.main(["adam", *TINY]) == 0
    assert f"broken: not timed, {type(error).__name__}: " in capsys.readouterr().out


class LionOfDeepSpeed(peers.ForeachLion):
    """It takes 1 as the sign of 0, as DeepSpeed's does."""

    @torch.no_grad()
    def step(self):
        for param in self._weights:
            param.mul_(1 - peers.LR * peers.WEIGHT_DECAY).sub_(torch.where(param.grad >= 0, 1.0, -1.0), alpha=peers.LR)


def test_a_lion_with_another_sign_of_zero_is_timed(monkeypatch, capsys):
    """A gradient of exactly 0 is rare, and must not decide whom pyzero is compared with."""
    normal = peers.normal
    monkeypatch.setattr(peers, "normal", lambda *args, **kwargs: normal(*args, **kwargs).index_fill_(0, ZERO, 0.0))
    found = peers.lion_peers(Options()) | {"with a sign": ("deepspeed", peers._maker(LionOfDeepSpeed))}
    monkeypatch.setattr(peers, "lion_peers", lambda options: found)
    assert bench.main(["lion", *TINY]) == 0
    out = capsys.readouterr().out
    assert "not timed" not in out and "| with a sign" in out


ZERO = torch.tensor([7])


def test_every_lion_has_the_same_betas(monkeypatch):
    """DeepSpeed's default is (0.9, 0.999)."""
    made = {}
    fake = types.SimpleNamespace(DeepSpeedCPULion=lambda params, **options: made.update(options))
    monkeypatch.setitem(sys.modules, "deepspeed.ops.lion", fake)
    peers._deepspeed("lion", "cpu")([])
    assert made == {"lr": peers.LR, "weight_decay": peers.WEIGHT_DECAY, "betas": (0.9, 0.99)}


def test_a_library_copies_no_gradient_in_its_step(monkeypatch):
    """A copy would cost it 4 bytes of some 34 per element, and nothing else in the comparison pays that."""
    fake = types.SimpleNamespace(FusedAdam=lambda params, **options: torch.optim.SGD(params, lr=0.0))
    monkeypatch.setitem(sys.modules, "apex.optimizers", fake)
    weights, grads = [torch.zeros(8)], [torch.full((8,), 3.0)]
    step = peers.LibraryStep("apex.optimizers", weights, grads, 1.0)
    step.step()
    assert step.weights[0].grad.data_ptr() == grads[0].data_ptr()


@pytest.mark.parametrize("error", [KeyError("x"), OSError("disk full"), AttributeError("no")])
def test_a_bench_that_fails_leaves_the_others(monkeypatch, tmp_path, capsys, error):
    def fails(options):
        raise error

    monkeypatch.setattr(step_scalars, "run", fails)
    assert bench.main(["step_scalars", "loss_scale", *TINY, "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "## step_scalars" in captured.err and "NOT TIMED" in captured.err and str(error) in captured.err
    assert "## loss_scale" in captured.out and {row.bench for row in results.read(tmp_path)[1]} == {"loss_scale"}


def test_a_bench_that_is_named_twice_runs_once(capsys):
    assert bench.main(["loss_scale", "loss_scale", *TINY]) == 0
    assert capsys.readouterr().out.count("## loss_scale") == 1


def test_ctrl_c_leaves_what_has_ended(monkeypatch, tmp_path, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(step_scalars, "run", interrupted)
    assert bench.main(["loss_scale", "step_scalars", *TINY, "--out", str(tmp_path)]) == 130
    assert f"interrupted in step_scalars; {tmp_path} has loss_scale\n" in capsys.readouterr().err
    assert {row.bench for row in results.read(tmp_path)[1]} == {"loss_scale"}
    assert bench.main(["step_scalars", *TINY, "--out", str(tmp_path)]) == 130
    assert "interrupted in step_scalars\n" in capsys.readouterr().err, "what is there is of another run"


def test_a_closed_pipe_loses_no_result(monkeypatch, tmp_path):
    """`python -m benchmarks ... --out DIR | head -1`."""

    def closed(text, **options):
        raise BrokenPipeError

    monkeypatch.setattr(bench.tqdm, "write", closed)
    with pytest.raises(BrokenPipeError):
        bench.main(["loss_scale", *TINY, "--out", str(tmp_path)])
    assert {row.bench for row in results.read(tmp_path)[1]} == {"loss_scale"}


def test_no_picture_of_another_run_stays(tmp_path, capsys):
    assert bench.main(["pack", *TINY, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "roofline.png").exists() and "another run" not in capsys.readouterr().err
    (tmp_path / "mine.png").touch()
    assert bench.main(["loss_scale", *TINY, "--out", str(tmp_path)]) == 0
    assert f"{tmp_path} has results of another run, which these will replace" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "mine.png"}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_backend_is_told(monkeypatch, tmp_path, capsys, backend):
    """Without a compiler, or by PYZERO_BACKEND, pyzero is as slow as the reference."""
    if reason := registry.BACKENDS[backend].unavailable_reason("cpu"):
        pytest.skip(reason)
    registry.forget()
    monkeypatch.setenv("PYZERO_BACKEND", backend)
    assert bench.main(["loss_scale", *TINY, "--out", str(tmp_path)]) == 0
    registry.forget()
    assert f"\nbackend: {backend}\n" in capsys.readouterr().out
    assert results.read(tmp_path)[0]["backend"] == backend


def test_a_missing_package_is_named(tmp_path):
    for name in ("tqdm", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name}')")

    def run(*arguments):
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "benchmarks", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)

    done = run("loss_scale")
    assert done.returncode == 1 and done.stderr.startswith("python -m benchmarks needs tqdm (no tqdm): pip")
    (tmp_path / "tqdm.py").unlink()
    done = run("simulate", "--out", str(tmp_path / "out"))
    assert done.returncode == 0 and "no picture (no matplotlib): pip install matplotlib" in done.stderr
    assert "Simulated, not measured" in (tmp_path / "out" / "simulation.md").read_text()


@pytest.mark.parametrize("option", ["--model-params", "--tokens-per-rank"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_no_impossible_model_is_simulated(option, value, capsys):
    with pytest.raises(SystemExit) as found:
        bench.main(["simulate", option, value])
    assert found.value.code == 2 and f"expected {option} as a number from 1 on, got {value}" in capsys.readouterr().err


@pytest.mark.parametrize("number", [1, 3, 5, 7, 11, 15, 31])
def test_quantiles_are_as_far_from_either_end(number):
    samples = list(range(number))
    low, high = rows.quantile(samples, 0.2), rows.quantile(samples[::-1], 0.8)
    assert low == number - 1 - high and abs(low - 0.2 * (number - 1)) <= 0.5


def test_the_cache_is_cold(monkeypatch):
    events = []
    monkeypatch.setattr(timing, "flush_cache", lambda: events.append("flush"))
    timer = timing.CpuTimer(lambda: events.append("call"), ready=lambda: events.append("ready"))
    assert timer.sample() > 0 and events == ["flush", "ready", "call"]


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
    monkeypatch.setattr(gpu_timer, "_more_than_l2", lambda: torch.zeros(1))
    monkeypatch.setattr(gpu_timer, "_cycles_per_s", functools.cache(gpu_timer._cycles_per_s.__wrapped__))
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
    row = rows.Row("b", "c", "who", 1, 0.02, 0.02, 0.02, host_s=timer.host_s, hides_host=timer.hides_host)
    assert "host ms" in rows.table([row]) and "20.00+" in rows.table([row])
    assert "host ms" not in rows.table([rows.Row("b", "c", "who", 1, 0.02, 0.02, 0.02)])


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
