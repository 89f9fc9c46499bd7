"""`python -m benchmarks compare OLD NEW` finds what is slower or larger, and not what is only noisy."""

import dataclasses

import pytest

from benchmarks import __main__ as bench
from benchmarks import harness, results
from benchmarks.rows import MemoryRow, Row

OURS = Row("adam", "fp32", "pyzero adam_", 100, 1.0, 0.9, 1.1)
PEER = Row("adam", "fp32", "torch", 100, 2.0, 1.9, 2.1, peer="torch-fused")
BYTES = MemoryRow("memory", "case", "FusedZeroAdamW", 100, 2, 1000, 2000)


def scaled(row, factor):
    times = {name: getattr(row, name) * factor for name in ("median_s", "p20_s", "p80_s")}
    return dataclasses.replace(row, **times)


def compare(tmp_path, old, new):
    for name, rows in (("old", old), ("new", new)):
        results.write(tmp_path / name, {"device": "a CPU"}, rows, [])
    return bench.main(["compare", str(tmp_path / "old"), str(tmp_path / "new" / results.JSON_NAME)])


@pytest.mark.parametrize(
    ("new", "status"),
    [
        ([OURS, PEER, BYTES], 0),
        ([scaled(OURS, 1.5), PEER, BYTES], 1),
        ([dataclasses.replace(OURS, median_s=1.5, p80_s=1.6), PEER, BYTES], 0),  # p20-p80 overlap
        ([dataclasses.replace(OURS, median_s=1.08, p20_s=1.2, p80_s=1.3), PEER, BYTES], 0),  # less than a tenth
        ([scaled(OURS, 1.5), scaled(PEER, 1.5), BYTES], 0),  # the machine
        ([scaled(OURS, 1.5), scaled(PEER, 0.5), BYTES], 1),
        ([OURS, scaled(PEER, 3.0), BYTES], 0),  # theirs
        ([scaled(OURS, 0.5), PEER, BYTES], 0),
        ([OURS, PEER, dataclasses.replace(BYTES, peak_bytes=2100)], 1),
        ([OURS, PEER, dataclasses.replace(BYTES, rest_bytes=1020)], 0),
        ([PEER, BYTES], 0),  # told of below
        ([dataclasses.replace(OURS, median_s=0.0, p20_s=0.0, p80_s=0.0), PEER, BYTES], 0),
    ],
)
def test_regressions(tmp_path, capsys, new, status):
    assert compare(tmp_path, [OURS, PEER, BYTES], new) == status
    assert f"{status} regressions in" in capsys.readouterr().out


def test_what_is_missing_and_another_machine_are_told(tmp_path, capsys):
    assert compare(tmp_path, [OURS, BYTES], [BYTES]) == 0
    assert "not in NEW: adam | fp32 | pyzero adam_" in capsys.readouterr().out
    results.write(tmp_path / "new", {"device": "another"}, [OURS], [])
    assert bench.main(["compare", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert "device was a CPU, is another" in capsys.readouterr().err


@pytest.mark.parametrize(("old", "new"), [([OURS], [BYTES]), ([PEER], [PEER]), ([], [OURS])])
def test_nothing_to_compare_is_no_success(tmp_path, capsys, old, new):
    assert compare(tmp_path, old, new) == 2
    assert "no row of ours is in both" in capsys.readouterr().err


NOT_OURS = [
    ("adam", "copy (torch, fp32)"),
    ("adam", "in place (torch mul_, fp32)"),
    ("train", "forward and backward alone"),
    ("backward", "no hooks, nothing sent"),
    ("checkpoint", "torch.load"),
    ("checkpoint", "disk: write, fsync"),
]


@pytest.mark.parametrize(("bench_name", "name"), NOT_OURS)
def test_a_measure_of_the_machine_is_not_ours(tmp_path, capsys, bench_name, name):
    """It is evidence of a slower machine, and no regression."""
    ours = dataclasses.replace(OURS, bench=bench_name)
    machine = dataclasses.replace(ours, name=name)
    assert compare(tmp_path, [ours, machine], [ours, scaled(machine, 1.5)]) == 0
    assert "0 regressions in 1 rows of ours" in capsys.readouterr().out
    assert compare(tmp_path, [ours, machine], [scaled(ours, 1.5), scaled(machine, 1.5)]) == 0
    assert compare(tmp_path, [ours, machine], [scaled(ours, 1.5), machine]) == 1


def test_a_time_of_zero(tmp_path, capsys):
    """As of an iteration beyond compute that took no longer than compute."""
    zero = scaled(OURS, 0.0)
    assert compare(tmp_path, [zero, scaled(PEER, 0.0)], [OURS, PEER]) == 1
    assert "0.000 -> 1000.000 ms" in capsys.readouterr().out
    assert [row.times_ours for row in harness.relative([zero, PEER])] == [None, None]


def test_noise_is_told(tmp_path, capsys):
    assert compare(tmp_path, [OURS], [dataclasses.replace(OURS, p80_s=3.0)]) == 0
    err = capsys.readouterr().err
    assert f"warning: {tmp_path / 'new' / results.JSON_NAME}: TOO NOISY TO JUDGE" in err and err.count("NOISY") == 1


def test_another_backend_is_told_and_one_that_an_old_file_lacks_is_not(tmp_path, capsys):
    for name, backend in (("a", {"backend": "cpu"}), ("b", {"backend": "reference"}), ("c", {})):
        results.write(tmp_path / name, backend, [OURS], [])
    for new, text in (("b", "backend was cpu, is reference"), ("c", "")):
        assert bench.main(["compare", str(tmp_path / "a"), str(tmp_path / new)]) == 0
        err = capsys.readouterr().err
        assert text in err and ("warning" in err) == bool(text)


ROW = '{"kind": "time", "bench": "a", "case": "c", "name": "n", "numel": 1, "median_s": "x", "p20_s": 1, "p80_s": 1}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"rows": [], "environment": []',
        '{"rows": [], "environment": [1]}',
        '{"rows": ["x"], "environment": {}}',
        '{"rows": 3, "environment": {}}',
        '{"rows": [' + ROW + '], "environment": {}}',
        '{"rows": [{"kind": "power"}], "environment": {}}',
    ],
)
def test_a_damaged_file_is_no_regression(tmp_path, capsys, text):
    """A traceback would end with status 1, which means a regression."""
    (tmp_path / "x.json").write_text(text)
    assert bench.main(["compare", str(tmp_path / "x.json"), str(tmp_path / "x.json")]) == 2
    assert "to be written by `python -m benchmarks --out`" in capsys.readouterr().err


def test_no_results(tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"rows": [{}]}')
    assert bench.main(["compare", str(tmp_path / "x.json"), str(tmp_path / "absent")]) == 2
    assert "--out" in capsys.readouterr().err
