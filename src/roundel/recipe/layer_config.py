"""Which layers an entry of layer_config means, and what it asks of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from roundel.errors import RecipeError
from roundel.recipe.reading import read_mapping, read_text
from roundel.scheme import Scheme

__all__ = ["compiled", "matches", "parse_layer_config", "scheme_of_entry"]


def matches(pattern: str, names: Iterable[str]) -> set[str]:
    """The module names a pattern means.

    A plain pattern (letters, digits, `_`, `-`, `.`) means the module of that name, else every module that has it as
    whole components (`layers.1` is not `layers.10`, `gate` is not `gate_proj`), else every module it is a part of.
    Anything else is a regular expression that may match anywhere in the name.
    """
    names = list(names)
    if pattern in names:
        return {pattern}
    if re.fullmatch(r"[\w.\-]+", pattern):
        inner = re.escape(pattern.strip("."))
        whole = {n for n in names if re.search(rf"(^|\.){inner}(\.|$)", n)}
        return whole or {n for n in names if re.search(inner + r"(?!\d)" if pattern[-1].isdigit() else inner, n)}
    expression = compiled(pattern)
    return {n for n in names if expression.search(n)}


def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression. Raises RecipeError when it is not one."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RecipeError(
            f"Layer pattern {pattern!r} is not a regular expression: {error}. Escape special characters or use a "
            f"plain name."
        ) from error


def scheme_of_entry(pattern: str, value: object, default: Scheme) -> Scheme | None:
    """What one entry of layer_config asks for; None keeps the layer. Raises RecipeError naming the pattern."""
    try:
        if isinstance(value, str):
            return None if value.upper() in ("BF16", "FP16", "KEEP") else Scheme.parse(value)
        if not isinstance(value, Mapping):
            raise RecipeError(
                f"{value!r} is neither a preset's name nor a mapping of scheme, bits, group_size, sym. Write W8A16, or "
                "{bits: 8}."
            )
        if value.get("bits") == 16 or str(value.get("scheme", "")).upper() in ("BF16", "FP16"):
            return None
        return Scheme.parse(value if "scheme" in value else {"scheme": default.name, **value})
    except RecipeError as error:
        raise RecipeError(f"layer_config {pattern!r}: {error}") from error


def parse_layer_config(text: str) -> dict[str, object]:
    """JSON, YAML, the relaxed `{k_proj:{bits:8}}`, or `@file` holding one of them.

    Raises RecipeError when none of them reads as a mapping; what entries ask is read by `scheme_of_entry`.
    """
    if text.startswith("@"):
        path = Path(text[1:]).expanduser()
        return read_mapping(read_text(path), str(path))
    return read_mapping(text, "layer_config")
