"""Which names of DeepSpeed public scripts use, and which of them are not here: python tests/peers/names.py DIR.

Read from the source of each script that says `deepspeed.initialize`: what it imports from deepspeed, what it takes off
`deepspeed.`, and what it asks of the engine (the first of what initialize() gives).
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import pyzero.compat


def dotted(node: ast.expr) -> str:
    """a.b.c of an attribute; "" of what is none."""
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return node.id if isinstance(node, ast.Name) else ""


def engines(tree: ast.AST) -> set[str]:
    """What scripts call the engine."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            target = node.targets[0]
            first = target.elts[0] if isinstance(target, ast.Tuple) else target
            if dotted(node.value.func) == "deepspeed.initialize" and dotted(first):
                found.add(dotted(first))
    return found


def names(source: str) -> tuple[set[str], set[str]]:
    """(names below deepspeed, names of the engine) in a script."""
    tree = ast.parse(source)
    held = engines(tree)
    package, engine = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "deepspeed":
            package |= {f"{node.module}.{item.name}" for item in node.names}
        elif isinstance(node, ast.Attribute):
            path = dotted(node)
            if path.startswith("deepspeed."):
                package.add(path)
            if dotted(node.value) in held:
                engine.add(node.attr)
    return {path for path in package if not any(other.startswith(f"{path}.") for other in package)}, engine


def absent(package: set[str], engine: set[str], held: object) -> Iterator[str]:
    """Of these names, those that are not here."""
    for path in sorted(package):
        module, _, name = path.rpartition(".")
        try:
            if not hasattr(importlib.import_module(module), name):
                importlib.import_module(path)
        except (ImportError, AttributeError):
            yield path
    yield from (f"engine.{name}" for name in sorted(engine) if not hasattr(held, name))


def main(folder: str) -> None:
    pyzero.compat.install()
    config = {"train_batch_size": 1, "optimizer": {"type": "Adam"}}
    held = pyzero.initialize(model=torch.nn.Linear(1, 1), config=config)[0]
    whole = total = 0
    for path in sorted(Path(folder).rglob("*.py")):
        source = path.read_text()
        if "deepspeed.initialize" not in source:
            continue
        package, engine = names(source)
        lacks = list(absent(package, engine, held))
        total, whole = total + 1, whole + (not lacks)
        print(f"{path}: {len(package)} names, {len(engine)} of the engine; not here: {', '.join(lacks) or 'none'}")
    print(f"{whole} of {total} scripts have all their names")


if __name__ == "__main__":
    main(sys.argv[1])
