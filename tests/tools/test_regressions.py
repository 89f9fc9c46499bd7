"""`python -m benchmarks compare OLD NEW` finds what is slower or larger, and not what is only noisy."""

import dataclasses

import pytest

from benchmarks import __main__ as bench
from benchmarks import results
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
    ],
)
def test_regressions(tmp_path, capsys, new, status):
    assert compare(tmp_path, [OURS, PEER, BYTES], new) == status
    assert f"{status} regressions in" in capsys.readouterr().out


def test_what_is_missing_and_another_machine_are_told(tmp_path, capsys):
    assert compare(tmp_path, [OURS], [BYTES]) == 0
    assert "not in NEW: adam | fp32 | pyzero adam_" in capsys.readouterr().out
    results.write(tmp_path / "new", {"device": "another"}, [OURS], [])
    assert bench.main(["compare", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert "device was a CPU, is another" in capsys.readouterr().err


def test_no_results(tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"rows": [{}]}')
    assert bench.main(["compare", str(tmp_path / "x.json"), str(tmp_path / "absent")]) == 2
    assert "--out" in capsys.readouterr().err
