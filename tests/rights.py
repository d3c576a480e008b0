"""What may not be read or written: root may do everything, so a test becomes somebody else for a while."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["public_folder", "without_rights"]

NOBODY = 65534


@contextmanager
def without_rights() -> Iterator[None]:
    """Run as a user without rights, where this process is root; else as who it is."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@contextmanager
def public_folder() -> Iterator[Path]:
    """A temporary folder that every user can reach; pytest's own are closed."""
    folder = Path(tempfile.mkdtemp(prefix="roundel-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o700)
        shutil.rmtree(folder)
