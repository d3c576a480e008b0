"""How datasets are spelled: `name[:key=value...][,name...]`.

Values and names may be quoted with "..."; inside, commas and colons are characters like any other, and \\" is a quote.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from roundel.errors import RecipeError, nearest

__all__ = ["Entry", "parse_datasets"]

_OPTION = re.compile(r"[A-Za-z_]+(=.*)?", re.DOTALL)
_PIECE = re.compile(r'"((?:[^"\\]|\\.)*)"|([^",:]+)|([,:])', re.DOTALL)
_KEYS = ("num", "split", "concat", "apply_chat_template", "system_prompt")
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One dataset of a list, as asked for. None: not said, the dataset's own way holds.

    name            a known name, a registered one, or a file
    num             samples to take from it
    split           names of the parts to read, in this order
    concat          whether rows are joined and cut, instead of one sample from each row that is long enough
    chat            whether rows go through the tokenizer's chat template
    system_prompt   the system turn of every conversation
    """

    name: str
    num: int | None = None
    split: tuple[str, ...] | None = None
    concat: bool | None = None
    chat: bool | None = None
    system_prompt: str | None = None


def parse_datasets(text: str) -> tuple[Entry, ...]:
    """The entries of a list of datasets, in order. Raises RecipeError for what the grammar does not know."""
    entries: list[Entry] = []
    parts: list[str] = [""]
    open_quote = re.sub(_PIECE, "", text)
    if open_quote:
        raise RecipeError(f'Datasets {text!r}: a quote is not closed. Quote like this: system_prompt="Be brief: yes".')
    for piece in _PIECE.finditer(text):
        if piece[3] == ",":
            entries.append(_entry(parts, text))
            parts = [""]
        elif piece[3] == ":":
            parts.append("")
        else:
            parts[-1] += piece[2] if piece[1] is None else re.sub(r"\\(.)", r"\1", piece[1])
    entries.append(_entry(parts, text))
    return tuple(entries)


def _entry(parts: list[str], text: str) -> Entry:
    """An entry from its parts between colons. A part that is no option belongs to the name: paths may hold colons."""
    name = parts[0].strip()
    options = parts[1:]
    while options and name and not _OPTION.fullmatch(options[0].strip()):
        name += f":{options.pop(0)}"
    if not name.strip():
        raise RecipeError(f"Datasets {text!r}: an entry has no name. Write `name[:key=value...][,name...]`.")
    found: dict[str, object] = {}
    for option in options:
        key, value = _option(option.strip(), name)
        if key in found:
            raise RecipeError(f"Dataset {name}: {key} is given twice. Give it once.")
        found[key] = value
    if found.get("system_prompt") is not None and found.setdefault("chat", True) is False:
        raise RecipeError(f"Dataset {name}: a system_prompt needs the chat template. Drop one of the two.")
    return Entry(name=name, **found)  # type: ignore[arg-type]


def _option(option: str, name: str) -> tuple[str, object]:
    """The field an option sets, and its value."""
    key, equals, value = option.partition("=")
    key = key.strip()
    if key not in _KEYS:
        raise RecipeError(
            f"Dataset {name} has the option {option!r}.{nearest(key, _KEYS)} Options are {', '.join(_KEYS)}; a name "
            f"that holds a colon or a comma is written in double quotes."
        )
    if key == "num":
        if not value.strip().isdecimal() or int(value) < 1:
            raise RecipeError(f"Dataset {name}: num={value} is no number of samples. Use 1 or more.")
        return key, int(value)
    if key == "split":
        splits = tuple(split.strip() for split in value.split("+"))
        if not all(splits):
            raise RecipeError(f"Dataset {name}: split={value} names no split. Write split=train or split=train+test.")
        return key, splits
    if key == "system_prompt":
        if not equals:
            raise RecipeError(f'Dataset {name}: system_prompt has no text. Write system_prompt="...".')
        return key, value
    truth = _TRUTH.get(value.strip().lower()) if equals else True
    if truth is None:
        raise RecipeError(f"Dataset {name}: {key}={value} is neither true nor false. Use one of these, or just {key}.")
    return "concat" if key == "concat" else "chat", truth
