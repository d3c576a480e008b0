"""What a dataset's row is: a text, a conversation, or token ids; and in which order rows are taken."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roundel.errors import RecipeError

__all__ = ["COLUMNS", "POOL", "Chat", "Ids", "Row", "Text", "row_of", "shuffled"]

COLUMNS = ("text", "messages", "conversations", "input_ids")  # what a row may be stored under, in this order
POOL = 128 << 20  # characters shuffled together; all 10,000 texts of the default dataset are 60 million
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "function": "tool"}  # ShareGPT's names


@dataclass(frozen=True)
class Text:
    """A plain text."""

    text: str

    @property
    def size(self) -> int:
        """Its characters."""
        return len(self.text)


@dataclass(frozen=True)
class Chat:
    """A conversation: (role, text) of each turn, roles as chat templates spell them."""

    turns: tuple[tuple[str, str], ...]

    @property
    def size(self) -> int:
        """Its characters."""
        return sum(len(text) for _, text in self.turns)

    @property
    def plain(self) -> str:
        """The turns' texts without their roles, a blank line between them."""
        return "\n\n".join(text for _, text in self.turns)


@dataclass(frozen=True)
class Ids:
    """Tokens of the model to be calibrated, none negative. Nothing is added to them."""

    ids: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its tokens."""
        return len(self.ids)


Row = Text | Chat | Ids


def row_of(value: object, where: str) -> Row:
    """A row from what a file or a caller holds.

    value   a string; a mapping with "text", "messages", "conversations" or "input_ids", or with one string only; a
            list of token ids; a tensor or array [tokens] or [1, tokens]; or a Row
    where   how messages call it ("row 3 of texts.jsonl")
    Raises RecipeError for anything else: a row that cannot be read is never left out in silence.
    """
    if isinstance(value, (Text, Chat, Ids)):
        return value
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, Mapping):
        return _from_mapping(value, where)
    return _ids(value, where)


def shuffled(rows: Iterable[Row], seed: str) -> Iterator[Row]:
    """The rows in an order drawn by the seed, a pool of POOL characters (or tokens) at a time: memory stays bounded."""
    rows, pools = iter(rows), 0
    while True:
        pool: list[Row] = []
        size = 0
        for row in rows:
            pool.append(row)
            size += row.size
            if size >= POOL:
                break
        if not pool:
            return
        random.Random(f"{seed}/{pools}").shuffle(pool)
        yield from pool
        pools += 1


def _from_mapping(value: Mapping[Any, object], where: str) -> Row:
    key = next((name for name in COLUMNS if value.get(name) is not None), None)
    if key is None and len(value) == 1:
        key = next(iter(value))
        if isinstance(value[key], str):
            return Text(str(value[key]))
    if key in ("messages", "conversations"):
        return _chat(value[key], where)
    if key == "input_ids":
        return _ids(value[key], where)
    if key == "text" and isinstance(value[key], str):
        return Text(str(value[key]))
    held = ", ".join(repr(name) for name in value) or "nothing"
    raise RecipeError(
        f"{where} has no text: it holds {held}. A row needs a string under 'text', turns under 'messages' or "
        f"'conversations', or tokens under 'input_ids'."
    )


def _chat(value: object, where: str) -> Chat:
    turns = []
    for turn in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        role = content = None
        if isinstance(turn, Mapping):
            role, content = (turn.get(a, turn.get(b)) for a, b in (("role", "from"), ("content", "value")))
        if not isinstance(role, str):
            raise RecipeError(
                f"{where} has a turn that is not one: {_short(turn)}. A turn is {{'role': ..., 'content': ...}} or "
                f"{{'from': ..., 'value': ...}}."
            )
        turns.append((_ROLES.get(role, role), _content(content, where)))
    return Chat(tuple(turns))


def _content(content: object, where: str) -> str:
    """A turn's text: itself, or the text parts of a list of parts; a turn that only calls tools has none."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else [content]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise RecipeError(
            f"{where} has a turn that is not text: {_short(content)}. Only text is calibrated on; leave such rows out."
        )
    return "".join(str(text) for text in texts)


def _ids(value: object, where: str) -> Ids:
    import numpy as np

    try:
        numbers = np.asarray(_host(value))
    except ValueError:  # lists of different lengths
        numbers = np.asarray(None)
    if numbers.ndim == 2 and len(numbers) == 1:
        numbers = numbers[0]
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise RecipeError(
            f"{where} is {_short(value)}. A row is a text, a mapping that holds one, or token ids [tokens] as integers."
        )
    if numbers.size and int(numbers.min()) < 0:
        raise RecipeError(f"{where} holds the token {int(numbers.min())}. No token is negative: leave padding out.")
    return Ids(tuple(numbers.tolist()))


def _host(value: object) -> object:
    """A tensor in the CPU's memory; anything else as it is."""
    import torch

    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value


def _short(value: object) -> str:
    """A value's repr, cut to fit a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
