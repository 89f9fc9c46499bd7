"""Which file of pyzero/ may import which: from the rows above its own, so that no cycle can come about."""

import ast
from pathlib import Path

PYZERO = Path(__file__).resolve().parents[2] / "pyzero"

# Imports inside functions count too; those under TYPE_CHECKING do not.
LAYERS = (
    {"ops"},
    {"futex"},
    {"amp", "arguments", "backward", "host", "layout", "memory", "modules"},
    {"overflow", "report", "scaler", "sharded_grad"},
    {"comm", "config", "update_rule"},
    {"buckets", "config_reader", "grad_stats", "peer", "schedules"},
    {"transports"},
    {"gather", "nonfinite", "pieces", "placement", "update"},
    {"access", "accumulation", "checkpoint"},
    {"gradients"},
    {"exchange"},
    {"reduction"},
    {"overlap"},
    {"optimizer"},
    {"adam", "lion"},
    {"engine", "estimate"},
    {"__main__"},
)


def imported(path: Path) -> set[str]:
    """Names of the modules of pyzero that a file imports."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 1:
                module = f"pyzero.{module}".rstrip(".")
            if module == "pyzero":
                found.update(alias.name for alias in node.names)
            elif module.startswith("pyzero."):
                found.add(module.split(".")[1])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def test_imports_go_one_way():
    below: set[str] = set()
    for layer in LAYERS:
        for name in layer - {"ops"}:
            wrong = imported(PYZERO / f"{name}.py") - below
            assert not wrong, f"pyzero/{name}.py imports {sorted(wrong)}, which lie beside or above it"
        below |= layer
    assert below - {"ops"} == {path.stem for path in PYZERO.glob("*.py")} - {"__init__"}


def test_imports_are_found(tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text("from pyzero import ops\ndef f():\n    from . import estimate\n    from .comm import Group\n")
    assert imported(path) == {"ops", "estimate", "comm"}
