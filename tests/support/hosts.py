"""Ranks of one machine that take it for several hosts."""

from pathlib import Path

import pytest

from pyzero.comm import shared_memory


def place(patch: pytest.MonkeyPatch, number: int, folder: Path) -> None:
    """Have this process find itself on the host of that number."""
    path = folder / f"boot_id_of_{number}"
    path.write_text(f"{number}\n")
    patch.setattr(shared_memory, "_BOOT_ID", str(path))
