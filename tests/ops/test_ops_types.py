"""What a type checker sees of pyzero.ops."""

from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api", reason="mypy is not installed")

ROOT = Path(__file__).parents[2]


def test_a_misspelt_op_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    options = ["--no-site-packages", "--ignore-missing-imports", "--follow-imports=silent", "--config-file="]
    code = "from pyzero import ops\nops.unscale_([], 1.0, found_inf=None)\nops.unscal_([], 1.0, found_inf=None)\n"
    found, _, _ = api.run([*options, "-c", code])
    assert 'error: Module has no attribute "unscal_"' in found, found
    assert "Found 1 error" in found, found
