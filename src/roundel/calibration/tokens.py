"""Rows -> tokens -> samples of one length.

A row that is long enough gives one sample, its first tokens; joined rows are one long row, cut into consecutive
samples. A plain text is tokenized without special tokens, and each sample of it begins and ends with those the
tokenizer puts around a text (a BOS, say), as if that piece alone had been tokenized. A conversation has its special
tokens from the chat template, token ids are taken as they are: to these nothing is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from roundel.calibration.rows import Chat, Ids, Row, Text
from roundel.calibration.tokenizer import Tokenizer
from roundel.errors import RecipeError, SourceError

__all__ = ["SEPARATOR", "Encoder", "Tally", "Tokens", "cut_joined", "cut_rows"]

Tokens = npt.NDArray[np.int64]
SEPARATOR = "\n\n"  # between joined texts


@dataclass
class Tally:
    """What became of the rows of one dataset, counted as they are read.

    short     rows with too few tokens, and the fewest and most tokens of them
    rest      tokens at the end of joined rows that fill no sample
    uniform   samples of which one token fills more than half
    refused   rows the chat template does not take, and what it said of the first
    plain     conversations taken as plain text, because the tokenizer has no chat template
    """

    rows: int = 0
    short: int = 0
    shortest: int = 0
    longest: int = 0
    rest: int = 0
    uniform: int = 0
    refused: int = 0
    refusal: str = ""
    plain: int = 0

    @property
    def dropped(self) -> int:
        """Rows that gave no sample."""
        return self.short + self.uniform + self.refused

    def add_short(self, tokens: int) -> None:
        """Count a row of so few tokens."""
        self.shortest = min(self.shortest, tokens) if self.short else tokens
        self.longest = max(self.longest, tokens)
        self.short += 1


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """How the rows of one dataset become tokens.

    tokenizer       None where every row is token ids
    chat            whether rows go through the chat template; None: conversations do, where there is one
    system_prompt   the first turn of every conversation, instead of the row's own system turn
    before, after   the tokens that every sample of plain text begins and ends with

    Raises RecipeError when the tokenizer has no chat template and one was asked for, or its template takes no system
    prompt.
    """

    tokenizer: Tokenizer | None
    chat: bool | None = None
    system_prompt: str | None = None
    before: tuple[int, ...] = field(init=False, default=())
    after: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            return
        before, after = _special_tokens(self.tokenizer)
        object.__setattr__(self, "before", before)
        object.__setattr__(self, "after", after)
        if self.chat and not self.tokenizer.chat_template:
            raise RecipeError(
                "The chat template is asked for, and the model's tokenizer has none. Drop apply_chat_template."
            )
        if self.system_prompt is not None:
            try:
                self._rendered((("user", "Hello"),))
            except _template_errors() as error:
                raise RecipeError(
                    f"The model's chat template takes no system prompt ({error}). Drop system_prompt."
                ) from error

    def is_plain(self, row: Row) -> bool:
        """Whether the row is tokenized as plain text, so that special tokens are to be put around its samples."""
        if isinstance(row, Chat):
            return self.chat is False or self.tokenizer is None or not self.tokenizer.chat_template
        return isinstance(row, Text) and not self.chat

    def encode(self, row: Row, tally: Tally, separator: str = "") -> Tokens | None:
        """The row's tokens, without special tokens where it is plain; None where the template does not take it.

        separator   what to put behind a plain text
        """
        if isinstance(row, Ids):
            tally.rows += 1
            return np.array(row.ids, np.int64)
        text = self.text(row, tally, separator)
        return None if text is None else self.tokens(text)

    def text(self, row: Text | Chat, tally: Tally, separator: str = "") -> str | None:
        """What of a row is tokenized: a plain text with a separator behind it, or a conversation as the template
        writes it; None where the template does not take it.
        """
        tally.rows += 1
        if self.is_plain(row):
            tally.plain += isinstance(row, Chat) and self.chat is None
            return (row.text if isinstance(row, Text) else row.plain) + separator
        try:
            return self._rendered((("user", row.text),) if isinstance(row, Text) else row.turns)
        except _template_errors() as error:
            tally.refusal = tally.refusal or str(error)
            tally.refused += 1
            return None

    def tokens(self, text: str) -> Tokens:
        """A text's tokens, int64, without special ones but those that stand in it."""
        if self.tokenizer is None:
            raise RecipeError("The data holds text, and there is no tokenizer. Pass one, or token ids.")
        return np.array(self.tokenizer.encode(text, add_special_tokens=False, verbose=False), np.int64)

    def _rendered(self, turns: Sequence[tuple[str, str]]) -> str:
        """The conversation as the template writes it; one that ends with the user is handed to the assistant."""
        assert self.tokenizer is not None
        if self.system_prompt is not None:
            own = [turn for turn in turns if turn[0] != "system"]
            turns = [("system", self.system_prompt), *own]
        conversation = [{"role": role, "content": text} for role, text in turns]
        answered = bool(turns) and turns[-1][0] == "assistant"
        return str(self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=not answered))


def cut_rows(rows: Iterable[Row], encoder: Encoder, seqlen: int, tally: Tally) -> Iterator[Tokens]:
    """One sample [seqlen], int64, from every row that has the tokens for it."""
    for row in rows:
        found = encoder.encode(row, tally)
        if found is None:
            continue
        before, after = (encoder.before, encoder.after) if encoder.is_plain(row) else ((), ())
        body = _body(seqlen, before, after)
        if len(found) < body:
            tally.add_short(len(found) + len(before) + len(after))
        else:
            yield from _kept(found[:body], before, after, tally)


def cut_joined(
    rows: Iterable[Row], encoder: Encoder, seqlen: int, tally: Tally, separator: str = SEPARATOR
) -> Iterator[Tokens]:
    """Consecutive samples [seqlen], int64, of all rows in a row; no token is left out but those of the last rest.

    separator   text between plain texts
    """
    waiting: dict[bool, list[Tokens]] = {True: [], False: []}  # plain rows and others do not mix in one sample
    for row in rows:
        found = encoder.encode(row, tally, separator)
        if found is None:
            continue
        plain = encoder.is_plain(row)
        before, after = (encoder.before, encoder.after) if plain else ((), ())
        body = _body(seqlen, before, after)
        waiting[plain].append(found)
        if sum(map(len, waiting[plain])) >= body:
            joined = np.concatenate(waiting[plain])
            whole = len(joined) // body * body
            waiting[plain] = [joined[whole:]]
            for start in range(0, whole, body):
                yield from _kept(joined[start : start + body], before, after, tally)
    tally.rest = sum(len(tokens) for tokens in (*waiting[True], *waiting[False]))


def _special_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before and after a text."""
    bare = tokenizer.encode("a", add_special_tokens=False, verbose=False)
    full = tokenizer.encode("a", add_special_tokens=True, verbose=False)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    raise SourceError(f"The tokenizer makes {full} of 'a', and {bare} without special tokens. Give token ids instead.")


def _body(seqlen: int, before: Sequence[int], after: Sequence[int]) -> int:
    """Tokens of a sample that are text."""
    body = seqlen - len(before) - len(after)
    if body < 1:
        raise RecipeError(f"A sample of {seqlen} tokens has no room beside the tokenizer's special ones. Use more.")
    return body


def _kept(text: Tokens, before: Sequence[int], after: Sequence[int], tally: Tally) -> Iterator[Tokens]:
    """The sample, unless one token fills more than half of it: padding, or a table of zeros."""
    sample = np.concatenate([np.array(before, np.int64), text, np.array(after, np.int64)])
    if len(sample) > 2 and np.unique(sample, return_counts=True)[1].max() > len(sample) // 2:
        tally.uniform += 1
    else:
        yield sample


def _template_errors() -> tuple[type[Exception], ...]:
    """What rendering a chat template raises on a conversation it is not made for."""
    from jinja2 import TemplateError

    return (TemplateError, TypeError, LookupError, ValueError)
