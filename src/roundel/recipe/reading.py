"""Texts of a command line and of files: sizes, and mappings in JSON, YAML or a relaxed spelling of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from roundel.errors import RecipeError

__all__ = ["parse_size", "read_mapping", "read_text"]

_SIZE_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def parse_size(size: str | int) -> int:
    """Bytes from 5000000000, "5GB" or "500MiB". Raises RecipeError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if found is None or found[2].upper() not in _SIZE_UNITS:
        raise RecipeError(
            f"{size!r} is not a size. Write bytes, or a number with KB, MB, GB, KiB, MiB or GiB, such as 5GB."
        )
    count = int(float(found[1]) * _SIZE_UNITS[found[2].upper()])
    if count < 1:
        raise RecipeError(f"{size!r} is too small a size for a file. Ask for 1 byte or more.")
    return count


def read_text(path: Path) -> str:
    """A file's text, UTF-8. Raises RecipeError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}. Pass a JSON or YAML file.") from error


def read_mapping(text: str, what: str) -> dict[str, object]:
    """The mapping that a text is, without empty values. what: how an error names it. Raises RecipeError."""
    import yaml

    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = yaml.safe_load(_relaxed(text) if text.lstrip().startswith("{") else text)
        except (yaml.YAMLError, ValueError, RecursionError):
            found = None
    if isinstance(found, dict) and all(isinstance(k, str) and found[k] is not None for k in found):
        return found
    raise RecipeError(
        f"{what} is not a mapping in JSON or YAML: {text[:80]!r}. Write {{k_proj: {{bits: 8}}}} or @file."
    )


def _relaxed(text: str) -> str:
    """`{k_proj:{bits:8}}` -> YAML: a space after every colon outside quotes."""
    return re.sub(r"(\"[^\"]*\"|'[^']*')|:(?=\S)", lambda m: m[1] or ": ", text)
