"""A text or a dataset -> the windows of tokens that models are measured on.

Rows are read in the order they lie in, joined with a blank line between them, and cut into windows of one length. With
a stride below a window's length, windows overlap: what an earlier one has scored is looked at again, not scored again.
Each window begins with the special tokens that the tokenizer puts before a text (a BOS, say).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from roundel.calibration.grammar import Entry, parse_datasets
from roundel.calibration.origins import Origin, origin_of
from roundel.calibration.rows import POOL, Ids
from roundel.calibration.tokenizer import Tokenizer, load_tokenizer
from roundel.calibration.tokens import SEPARATOR, Encoder, Tally, Tokens
from roundel.errors import RecipeError

__all__ = ["WINDOW", "Passage", "read_passage"]

WINDOW = 2048  # tokens, unless the model takes fewer


@dataclass(frozen=True, kw_only=True)
class Passage:
    """What is predicted: windows of tokens [windows, length], int64.

    first            in each window, the first token that is scored; from there on all are
    bytes_per_token  UTF-8 bytes of text for each token; None where the rows are token ids
    label            as the user called it
    notes            what the user should know: rows left out, text that was not read
    """

    windows: Tensor
    first: tuple[int, ...]
    bytes_per_token: float | None
    label: str
    notes: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return int(self.windows.shape[1])

    @property
    def scored(self) -> int:
        """Tokens that are predicted."""
        return sum(self.length - first for first in self.first)


@dataclass
class _Read:
    """Tokens and bytes of one dataset, as far as they were read; special tokens of a window are not among them."""

    pieces: list[Tokens]
    tokens: int = 0
    nbytes: int | None = 0
    cut_off: bool = False


def read_passage(
    dataset: str,
    tokenizer: Path | Tokenizer | None,
    *,
    window: int,
    stride: int | None = None,
    limit: int | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> Passage:
    """The windows that a wish comes to.

    dataset     names, files and options as `parse_datasets` reads them; num= is a number of windows
    tokenizer   the folder of a model, or a transformers tokenizer; None where all rows are token ids
    window      tokens of a window, special ones included
    stride      tokens by which a window lies behind the one before; None: they do not overlap
    limit       windows at most, over all datasets

    Raises RecipeError for a wish that means nothing or a text shorter than a window, SourceError for files, a tokenizer
    or a Hub that cannot be read.
    """
    if window < 2:
        raise RecipeError(f"A window of {window} tokens predicts nothing. Use 2 or more.")
    if limit is not None and limit < 1:
        raise RecipeError(f"limit={limit} leaves no window. Use 1 or more.")
    entries = parse_datasets(dataset)
    origins = [origin_of(entry, offline, bundled="evaluation") for entry in entries]
    if all(origin.bare for origin in origins):
        tokenizer = None
    elif isinstance(tokenizer, Path):
        tokenizer = load_tokenizer(tokenizer, trust_remote_code)
    windows: list[Tensor] = []
    firsts: list[int] = []
    notes: list[str] = []
    tokens, nbytes = 0, list[int | None]()
    for entry, origin in zip(entries, origins, strict=True):
        wanted = _least(entry.num, None if limit is None else limit - len(firsts))
        if wanted == 0:
            break
        encoder = Encoder(tokenizer=tokenizer, chat=entry.chat, system_prompt=entry.system_prompt)
        before = () if origin.bare else encoder.before
        body = window - len(before)
        step = body if stride is None else stride
        if not 1 <= step <= body:
            raise RecipeError(f"A stride of {step} leaves tokens out, or moves nowhere. Use 1 to {body}.")
        tally = Tally()
        read = _read(entry, origin, encoder, tally, None if wanted is None else body + (wanted - 1) * step)
        found = _cut(read, before, body, step, wanted)
        if not len(found):
            raise RecipeError(
                f"{origin.label} has {read.tokens:,} tokens, a window {body:,}. Use a longer text, or a shorter "
                f"--window."
            )
        windows.append(found)
        firsts += [max(1, len(before)), *([max(1, window - step)] * (len(found) - 1))]
        tokens, nbytes = tokens + read.tokens, [*nbytes, read.nbytes]
        notes += [*origin.notes, *_notes(origin, read, tally)]
    known = [count for count in nbytes if count is not None]
    text_bytes = sum(known) if len(known) == len(nbytes) else 0
    return Passage(
        windows=torch.cat(windows),
        first=tuple(firsts),
        bytes_per_token=text_bytes / tokens if text_bytes else None,
        label=dataset,
        notes=tuple(notes),
    )


def _read(entry: Entry, origin: Origin, encoder: Encoder, tally: Tally, enough: int | None) -> _Read:
    """Tokens of a dataset, until there are enough of them or POOL characters have been read."""
    if entry.concat is False:
        raise RecipeError(f"Dataset {entry.name}: rows are joined to be measured on. Drop concat=false.")
    read, size, separator = _Read([]), 0, "" if origin.stream else SEPARATOR
    for row in origin.rows(None):
        if isinstance(row, Ids):
            found, read.nbytes = encoder.encode(row, tally), None
        else:
            text = encoder.text(row, tally, separator)
            if text is None:
                continue
            found = encoder.tokens(text)
            if read.nbytes is not None:
                read.nbytes += len(text.encode("utf-8", "surrogatepass"))
        assert found is not None
        read.pieces.append(found)
        read.tokens += len(found)
        size += row.size
        if enough is not None and read.tokens >= enough:
            break
        if size >= POOL:
            read.cut_off = True
            break
    return read


def _cut(read: _Read, before: Sequence[int], body: int, step: int, wanted: int | None) -> Tensor:
    """Windows [n, length]; what does not fill one is dropped."""
    joined = np.concatenate(read.pieces) if read.pieces else np.empty(0, np.int64)
    starts = range(0, len(joined) - body + 1, step)[:wanted]
    made = np.empty((len(starts), len(before) + body), np.int64)
    made[:, : len(before)] = before
    for number, start in enumerate(starts):
        made[number, len(before) :] = joined[start : start + body]
    return torch.from_numpy(made)


def _notes(origin: Origin, read: _Read, tally: Tally) -> Iterator[str]:
    if read.cut_off:
        yield f"Only the first {read.tokens:,} tokens of {origin.label} were read."
    if tally.refused:
        yield f"{origin.label}: {tally.refused:,} rows dropped that the chat template does not take ({tally.refusal})."
    if tally.plain:
        yield (
            f"{origin.label}: {tally.plain:,} conversations taken as plain text, because the tokenizer has no chat "
            f"template."
        )


def _least(*numbers: int | None) -> int | None:
    known = [number for number in numbers if number is not None]
    return min(known) if known else None
