"""The benchmarks run at tiny sizes, and refuse to time an op that is wrong."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pyzero import ops

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: an installed pyzero is not shadowed

from benchmarks import harness, run  # noqa: E402

TINY = ["--numel", "5000"]
CHEAP = ["adam", "unscale", "reduce_scatter", "step"]


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
    assert run.main([name, *TINY, "--json", str(path)]) == 0

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


_RIGHT = {name: getattr(ops, name) for name in ("adam_", "unscale_", "reduce_scatter_")}


@pytest.mark.parametrize(
    ("name", "op", "wrong"),
    [
        ("adam", "adam_", _wrong_adam),
        ("unscale", "unscale_", _wrong_unscale),
        ("reduce_scatter", "reduce_scatter_", _wrong_reduce_scatter),
        ("step", "adam_", _wrong_adam),
        ("step", "unscale_", _wrong_unscale),
    ],
)
def test_a_wrong_op_is_not_timed(name, op, wrong, monkeypatch, capsys):
    monkeypatch.setattr(ops, op, wrong)
    assert run.main([name, *TINY]) == 1
    captured = capsys.readouterr()
    assert "NOT TIMED" in captured.err and "differs from the peer" in captured.err
    assert f"## {name}" not in captured.out


def test_import_is_measured(capsys):
    assert run.main(["import", *TINY]) == 0
    assert "import pyzero" in capsys.readouterr().out


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["adma"])
    assert "adma" in capsys.readouterr().err


def test_speedup_is_the_peers_median_over_ours(monkeypatch):
    durations = {"ours": 1.0, "peer": 3.0}
    monkeypatch.setattr(harness, "_time_cpu", lambda call: call())
    contenders = [harness.Contender(name, lambda name=name: durations[name], 4) for name in durations]
    rows = harness.compare("b", "c", 10**9, contenders, harness.Options(numel=8), peer="peer", with_copy=False)
    assert [row.speedup for row in rows] == [3.0, 1.0]
    assert [row.gb_per_s for row in rows] == [4.0, 4 / 3]
