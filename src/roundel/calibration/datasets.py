"""A dataset's name, or rows in memory -> the tokens a model is calibrated on.

The same wish gives the same samples: rows are shuffled by the seed, and read only until there are enough; so of a
dataset of many files, only those that are needed are fetched. Everything runs in this process. Rows that are left out
are counted, and what the user should know of them stands in `Samples.notes`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from roundel.calibration.cache import cache_folder, read_samples, sha256_of_tokens, tokenizer_identity, write_samples
from roundel.calibration.grammar import Entry, parse_datasets
from roundel.calibration.origins import Origin, check_origin, known_names, origin_of, origin_of_rows
from roundel.calibration.reading import kind_of
from roundel.calibration.rows import POOL, Row
from roundel.calibration.tokenizer import Tokenizer, load_tokenizer
from roundel.calibration.tokens import Encoder, Tally, Tokens, cut_joined, cut_rows
from roundel.errors import RecipeError
from roundel.recipe import Recipe

__all__ = ["Samples", "calibration_tokens", "check_datasets"]

_LAYOUT = 1  # of what is cached: raised whenever the same wish gives other tokens than before


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a model is calibrated on.

    tokens   int64 [samples, seqlen]
    sha256   of the tokens as little-endian int64; equal samples have equal sums
    notes    what the user should know: fewer samples than asked for, rows that were left out
    """

    tokens: Tensor
    sha256: str
    notes: tuple[str, ...] = ()


@dataclass
class _Draw:
    """One dataset as samples are drawn from it: so many are wanted of it, so many more it has given."""

    entry: Entry
    origin: Origin
    samples: Iterator[Tokens]
    tally: Tally
    taken: list[Tokens] = field(default_factory=list)
    wanted: int = 0
    exhausted: bool = False
    cut_off: list[str] = field(default_factory=list)

    def take(self, count: int) -> None:
        """Draw so many more, or as many as there are."""
        found = list(islice(self.samples, count))
        self.taken += found
        self.exhausted = len(found) < count


def calibration_tokens(
    dataset: str | Sequence[object] | Tensor,
    tokenizer: Path | str | Tokenizer | None,
    *,
    nsamples: int = Recipe.nsamples,
    seqlen: int = Recipe.seqlen,
    seed: int = Recipe.seed,
    cache: Path | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> Samples:
    """The samples a wish comes to.

    dataset     names, files and options as `parse_datasets` reads them ("pile-10k:num=64,my.jsonl:concat"); or rows:
                texts, token ids, tensors [tokens], mappings with "text", "messages" or "input_ids"
    tokenizer   the folder of a model, or a transformers tokenizer; None where all rows are token ids
    seqlen      tokens of one sample: rows with fewer are dropped, unless they are joined
    cache       the folder where samples are kept; None: `cache_folder()`
    offline     whether to use only what the Hugging Face cache holds, as with HF_HUB_OFFLINE

    Raises RecipeError for a wish that means nothing, names nothing, or leaves no sample; SourceError for files, a
    tokenizer or a Hub that cannot be read.
    """
    if nsamples < 1 or seqlen < 1:
        raise RecipeError(f"nsamples={nsamples} and seqlen={seqlen} make no samples. Use 1 or more of both.")
    if isinstance(tokenizer, str):
        tokenizer = Path(tokenizer)
    wished = _wished(dataset, nsamples, offline)
    if all(origin.bare for _, origin in wished):
        tokenizer = None
    kept = _kept(wished, tokenizer, nsamples, seqlen, seed, cache if cache is not None else cache_folder())
    found = None if kept is None else read_samples(kept, nsamples, seqlen)
    if found is not None:
        return Samples(tokens=found[0], sha256=sha256_of_tokens(found[0]), notes=found[1])
    if isinstance(tokenizer, Path):
        tokenizer = load_tokenizer(tokenizer, trust_remote_code)
    draws = [_draw(entry, origin, tokenizer, seqlen, seed) for entry, origin in wished]
    _fill(draws, nsamples)
    tokens, notes = _gathered(draws, seqlen, seed, dataset), _notes(draws, nsamples, seqlen)
    if kept is not None:
        try:
            write_samples(kept, tokens, notes)
        except OSError as error:
            notes = (*notes, f"The samples could not be cached under {kept.parent} ({error}).")
    return Samples(tokens=tokens, sha256=sha256_of_tokens(tokens), notes=notes)


def _wished(dataset: str | Sequence[object] | Tensor, nsamples: int, offline: bool) -> list[tuple[Entry, Origin]]:
    """Each dataset asked for, and where its rows come from."""
    if not isinstance(dataset, str):
        return [(Entry(name="rows"), origin_of_rows(list(dataset)))]
    return [(entry, origin_of(entry, offline)) for entry in _entries(dataset, nsamples)]


def check_datasets(dataset: str, nsamples: int) -> None:
    """What can be said of a wish before anything is fetched or tokenized. Raises as `calibration_tokens` does."""
    for entry in _entries(dataset, nsamples):
        check_origin(entry)


def _entries(dataset: str, nsamples: int) -> tuple[Entry, ...]:
    """The datasets of a list, whose numbers of samples fit together."""
    entries = parse_datasets(dataset)
    asked = sum(entry.num or 0 for entry in entries)
    if asked > nsamples:
        raise RecipeError(
            f"The datasets' num= ask for {asked} samples, nsamples is {nsamples}. Raise nsamples, or lower a num."
        )
    if asked == nsamples and any(entry.num is None for entry in entries):
        none = next(entry.name for entry in entries if entry.num is None)
        raise RecipeError(f"The datasets' num= take all {nsamples} samples, and none is left for {none}. Lower a num.")
    return entries


def _kept(
    wished: list[tuple[Entry, Origin]],
    tokenizer: Path | Tokenizer | None,
    nsamples: int,
    seqlen: int,
    seed: int,
    folder: Path,
) -> Path | None:
    """The file these samples are kept in; None where what they depend on cannot be told."""
    identity = tokenizer_identity(tokenizer)
    if identity is None or any(origin.identity is None for _, origin in wished):
        return None
    # A registered dataset's name or a file's is no part of its content.
    parts = [(origin.identity, repr(replace(entry, name="", split=None))) for entry, origin in wished]
    wish = json.dumps([_LAYOUT, POOL, parts, identity, nsamples, seqlen, seed])
    return folder / f"{hashlib.sha256(wish.encode()).hexdigest()}.safetensors"


def _draw(entry: Entry, origin: Origin, tokenizer: Tokenizer | None, seqlen: int, seed: int) -> _Draw:
    encoder = Encoder(tokenizer=tokenizer, chat=entry.chat, system_prompt=entry.system_prompt)
    tally, cut_off = Tally(), list[str]()
    if origin.stream:
        samples = _windows(origin, encoder, seqlen, seed, tally, cut_off)
    else:
        joined = origin.joined if entry.concat is None else entry.concat
        samples = (cut_joined if joined else cut_rows)(origin.rows(seed), encoder, seqlen, tally)
    return _Draw(entry=entry, origin=origin, samples=samples, tally=tally, cut_off=cut_off)


def _windows(
    origin: Origin, encoder: Encoder, seqlen: int, seed: int, tally: Tally, cut_off: list[str]
) -> Iterator[Tokens]:
    """Of one text, consecutive samples that do not overlap, in an order drawn by the seed."""
    pieces: list[Row] = []
    size = 0
    for piece in origin.rows(seed):
        pieces.append(piece)
        size += piece.size
        if size >= POOL:
            cut_off.append(f"Only the first {size:,} characters of {origin.label} were read.")
            break
    windows = list(cut_joined(pieces, encoder, seqlen, tally, separator=""))
    random.Random(str(seed)).shuffle(windows)
    yield from windows


def _fill(draws: list[_Draw], nsamples: int) -> None:
    """Draw the samples: as many as `num` says, the others evenly; what one of these lacks, the others give."""
    for draw in draws:
        if draw.entry.num is not None:
            draw.wanted = draw.entry.num
            draw.take(draw.wanted)
    free = [draw for draw in draws if draw.entry.num is None]
    missing = nsamples - sum(len(draw.taken) for draw in draws)
    while missing and free:
        share, more = divmod(missing, len(free))
        for place, draw in enumerate(free):
            count = share + (place < more)
            draw.wanted = draw.wanted or count
            draw.take(count)
        free = [draw for draw in free if not draw.exhausted]
        missing = nsamples - sum(len(draw.taken) for draw in draws)


def _gathered(draws: list[_Draw], seqlen: int, seed: int, dataset: str | Sequence[object] | Tensor) -> Tensor:
    """All samples [samples, seqlen], those of several datasets shuffled together. Raises RecipeError for none."""
    samples = [sample for draw in draws for sample in draw.taken]
    if not samples:
        what = " ".join(_dropped(draw, seqlen) for draw in draws)
        texts = [] if isinstance(dataset, str) else [row for row in dataset if isinstance(row, str)]
        if any(text in known_names() or kind_of(text) for text in texts):
            what += " A list holds rows; datasets are named in one string, with commas between them."
        raise RecipeError(f"There is not one calibration sample of {seqlen:,} tokens. {what} {_remedy(draws)}")
    if len(draws) > 1:
        random.Random(f"{seed}/all").shuffle(samples)
    return torch.from_numpy(np.stack(samples))


def _remedy(draws: list[_Draw]) -> str:
    """What to do where no sample is left."""
    if not any(draw.tally.short or draw.tally.rest or draw.tally.dropped for draw in draws):
        return "Pass texts that hold something."
    if all(draw.origin.stream for draw in draws):
        return "Use a smaller seqlen, or a longer text."
    return (
        "Use a smaller seqlen, longer texts, or join rows with `:concat` (a list of rows: register it as a dataset "
        "first)."
    )


def _notes(draws: list[_Draw], nsamples: int, seqlen: int) -> tuple[str, ...]:
    """What the user should know of these samples, in sentences."""
    notes = [note for draw in draws for note in (*draw.origin.notes, *draw.cut_off)]
    taken = sum(len(draw.taken) for draw in draws)
    if taken < nsamples:
        notes.append(f"{_count(taken, 'calibration sample')} of {seqlen:,} tokens, not the {nsamples:,} asked for.")
    for draw in draws:
        short = len(draw.taken) < draw.wanted
        left_out = draw.origin.mine and not draw.origin.stream and draw.tally.dropped
        if short or left_out or draw.tally.refused or draw.tally.plain:
            gave = f"gave {len(draw.taken):,} of {draw.wanted:,} samples; " if short else ""
            notes.append(_dropped(draw, seqlen, gave))
    return tuple(notes)


def _dropped(draw: _Draw, seqlen: int, gave: str = "") -> str:
    """What was read of a dataset and what of it was left out, with the numbers."""
    tally = draw.tally
    text = "the text read" if tally.rows else "the text is empty"
    said = [f"{draw.origin.label}: {gave}{text if draw.origin.stream else _count(tally.rows, 'row') + ' read'}"]
    if tally.short:
        lengths = f"{tally.shortest:,}" if tally.short == 1 else f"{tally.shortest:,} to {tally.longest:,}"
        said.append(f"{tally.short:,} shorter than {seqlen:,} tokens ({lengths}) dropped")
    if tally.rest and draw.exhausted:
        said.append(f"{_count(tally.rest, 'token')} at the end fill no sample")
    if tally.uniform:
        said.append(f"{_count(tally.uniform, 'sample')} dropped, more than half of which is one token")
    if tally.refused:
        said.append(f"{_count(tally.refused, 'row')} dropped that the chat template does not take ({tally.refusal})")
    if tally.plain:
        said.append(
            f"{_count(tally.plain, 'conversation')} taken as plain text, because the tokenizer has no chat template"
        )
    return "; ".join(said) + "."


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
