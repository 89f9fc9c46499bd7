"""Makes ranks of one machine believe that they are on several hosts."""

from pathlib import Path

import pytest

from pyzero.comm import shared_memory


def place(patch: pytest.MonkeyPatch, number: int, folder: Path) -> None:
    """Make this process believe that it is on host `number`."""
    path = folder / f"boot_id_of_{number}"
    path.write_text(f"{number}\n")
    patch.setattr(shared_memory, "_BOOT_ID", str(path))
