"""Checkpoint files byte by byte: written from any header, one value planted, hashed as a folder."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

__all__ = ["hashes", "plant", "poke", "raw_file", "spot"]


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file of this header: bytes as they are, anything else as JSON. length: what the file claims it
    is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def spot(folder: Path, tensor: str) -> tuple[Path, int, int]:
    """The file a tensor lies in, and its first and last byte there."""
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        entry = json.loads(raw[8 : 8 + length]).get(tensor)
        if entry is not None:
            begin, end = entry["data_offsets"]
            return path, 8 + length + begin, 8 + length + end
    raise KeyError(tensor)


def poke(folder: Path, tensor: str, offset: int, data: bytes) -> None:
    """Overwrite bytes of a tensor where it lies, from `offset` on; negative offsets count from its end."""
    path, begin, end = spot(folder, tensor)
    with path.open("r+b") as file:
        file.seek((begin if offset >= 0 else end) + offset)
        file.write(data)


def plant(folder: Path, tensor: str, index: int, value: float, dtype: str = "bfloat16") -> None:
    """Set one value, by its flat index, of a tensor stored as bfloat16 or float32."""
    stored = struct.pack("<f", value)
    data = stored[2:] if dtype == "bfloat16" else stored
    poke(folder, tensor, index * len(data), data)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by name; those that hold times left out."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name not in ("log.jsonl", "report.html")
    )
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
