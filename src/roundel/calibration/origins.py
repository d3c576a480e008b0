"""Where the rows of a dataset come from: a name and its options -> rows, and what identifies them.

Own datasets are registered here; the Hub's stand in `hub_datasets.HUB_DATASETS`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from roundel.calibration.grammar import Entry
from roundel.calibration.hub_datasets import HUB_DATASETS, HubDataset, HubFiles, patterns_of, row_from_hub
from roundel.calibration.reading import kind_of, need_pyarrow, read_values
from roundel.calibration.rows import Ids, Row, Text, row_of, shuffled
from roundel.data.bundled import bundled_text
from roundel.errors import RecipeError, SourceError, nearest

__all__ = [
    "Origin",
    "check_origin",
    "known_names",
    "name_of_rows",
    "origin_of",
    "origin_of_rows",
    "register_dataset",
]

BUNDLED = "bundled"
_OF_ROWS = re.compile(r"\(a list of \d+\)")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the rows of one dataset come from.

    label      how messages call it
    identity   what its rows depend on: equal identities mean equal rows; None where that cannot be known
    rows       begins to read them, in an order drawn by the seed it is given; None: as they lie there
    stream     whether the rows are pieces of one text, to be joined as they are and cut
    joined     whether rows are joined unless the entry says otherwise
    bare       whether all rows are known to be token ids, so that no tokenizer is needed
    mine       whether the user brought it: then every row that is left out is worth a note
    notes      what happened on the way to it
    """

    label: str
    identity: str | None
    rows: Callable[[int | None], Iterator[Row]]
    stream: bool = False
    joined: bool = False
    bare: bool = False
    mine: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Registered:
    rows: Callable[[], Iterable[object]]
    version: str | None


_REGISTERED: dict[str, _Registered] = {}


def register_dataset(name: str, rows: Callable[[], Iterable[object]], *, version: str | None = None) -> None:
    """Make a dataset of your own known under a name, for this process; a name of yours may be given again.

    rows      a function that begins anew at each call and yields texts, {"text"}, {"messages"}, {"input_ids"} or token
              ids; they are taken in this order and only as needed, so it may be endless
    version   what identifies its content; without it, its tokens are not cached

    Raises RecipeError for a name that roundel uses, or that could not be written in a list of datasets.
    """
    if name.casefold() in {known.casefold() for known in _built_in()}:
        raise RecipeError(f"The dataset {name} comes with roundel. Register yours under another name.")
    if not name.strip() or set(name) & set(',:"') or name != name.strip():
        raise RecipeError(f"{name!r} cannot be written in a list of datasets. Use a name without commas and colons.")
    _REGISTERED[name] = _Registered(rows, version)


def known_names() -> tuple[str, ...]:
    """Every name a dataset can be asked for by, registered ones first."""
    return (*_REGISTERED, *_built_in())


def origin_of(
    entry: Entry, offline: bool = False, bundled: Literal["calibration", "evaluation"] = "calibration"
) -> Origin:
    """What an entry of a list of datasets names.

    offline   whether to use only what the Hugging Face cache holds
    bundled   which of the texts that come with roundel "bundled" is

    Raises RecipeError for an unknown name and for options that do not go with the dataset, SourceError when it is out
    of reach.
    """
    origin = _named(entry, offline, bundled)
    if origin.stream and (entry.concat is False or entry.chat):
        option = "apply_chat_template" if entry.chat else "concat=False"
        raise RecipeError(
            f"Dataset {entry.name} is one text, cut into samples: {option} means nothing there. Drop it, or pass "
            f"rows as .jsonl."
        )
    return origin


def check_origin(entry: Entry) -> None:
    """What `origin_of` raises, but for what only the Hub can tell: nothing is fetched."""
    dataset = _of_hub(entry)
    if dataset is None:
        origin_of(entry)
    else:
        _check_hub(dataset, entry)


def origin_of_rows(rows: Sequence[object]) -> Origin:
    """The rows a caller holds in memory, taken in their order."""
    found = [row_of(value, f"row {number} of the calibration data") for number, value in enumerate(rows)]
    content = hashlib.sha256()
    for row in found:
        content.update(repr(row).encode("utf-8", "surrogatepass"))
    bare = all(isinstance(row, Ids) for row in found)
    return Origin(label="your rows", identity=content.hexdigest(), rows=lambda seed: iter(found), bare=bare)


def _built_in() -> tuple[str, ...]:
    return (BUNDLED, *(name for dataset in HUB_DATASETS for name in (dataset.repo, *dataset.aliases)))


def _of_hub(entry: Entry) -> HubDataset | None:
    folded = entry.name.casefold()
    named = (each for each in HUB_DATASETS if folded in {name.casefold() for name in (each.repo, *each.aliases)})
    return next(named, None)


def _named(entry: Entry, offline: bool, bundled: Literal["calibration", "evaluation"]) -> Origin:
    folded = entry.name.casefold()
    dataset = _of_hub(entry)
    if dataset is not None:
        return _hub(dataset, entry, offline)
    if entry.split is not None:
        raise RecipeError(f"Dataset {entry.name} has no splits. Drop split={'+'.join(entry.split)}.")
    if entry.name in _REGISTERED:
        return _registered(entry.name)
    path = Path(entry.name).expanduser()
    if folded == BUNDLED:
        return _file(bundled_text(bundled), BUNDLED)
    if path.is_file() and kind_of(path.name):
        return _file(path, entry.name)
    raise _unknown(entry.name, path)


def _registered(name: str) -> Origin:
    found = _REGISTERED[name]

    def rows(seed: int | None) -> Iterator[Row]:
        for number, value in enumerate(found.rows()):
            yield row_of(value, f"row {number} of {name}")

    identity = None if found.version is None else json.dumps(["registered", name, found.version])
    return Origin(label=name, identity=identity, rows=rows)


def _file(path: Path, label: str) -> Origin:
    need_pyarrow(path.name)
    stream = kind_of(path.name) == ".txt"

    def read() -> Iterator[Row]:
        for number, value in enumerate(read_values(path)):
            yield Text(str(value)) if stream else row_of(value, f"row {number} of {label}")

    def rows(seed: int | None) -> Iterator[Row]:
        return read() if stream or seed is None else shuffled(read(), str(seed))

    identity = json.dumps([kind_of(path.name), _sha256(path)])
    bare = not stream and isinstance(next(read(), None), Ids)  # a file of token ids needs no tokenizer
    return Origin(label=label, identity=identity, rows=rows, stream=stream, bare=bare)


def _check_hub(dataset: HubDataset, entry: Entry) -> None:
    for pattern in dataset.splits.values():
        need_pyarrow(pattern)
    patterns_of(dataset, entry.split)


def _hub(dataset: HubDataset, entry: Entry, offline: bool) -> Origin:
    _check_hub(dataset, entry)
    files = HubFiles(dataset, entry.split, offline)

    def read(name: str) -> Iterator[Row]:
        for number, value in enumerate(read_values(files.fetch(name), (*dataset.columns, *dataset.only))):
            row = row_from_hub(value, dataset, f"row {number} of {name} of {dataset.repo}")
            if row is not None:
                yield row

    def split(names: tuple[str, ...], seed: int | None) -> Iterator[Row]:
        for name in names:  # a pool never spans two files, so that the second is fetched only where it is needed
            yield from read(name) if seed is None else shuffled(read(name), f"{seed}/{name}")

    def rows(seed: int | None) -> Iterator[Row]:
        for turn in zip_longest(*(split(names, seed) for names in files.names)):
            yield from (row for row in turn if row is not None)

    # What a cache lists may be less than what there is: then the same commit does not mean the same rows.
    listed = [] if files.complete else list(files.names)
    identity = json.dumps([repr(dataset), files.commit, entry.split, listed])
    return Origin(
        label=dataset.repo, identity=identity, rows=rows, joined=dataset.joined, mine=False, notes=files.notes
    )


def name_of_rows(count: int) -> str:
    """What rows that were passed in memory are called, in recipes among others."""
    return f"(a list of {count})"


def _unknown(name: str, path: Path) -> RecipeError | SourceError:
    kinds = "a .txt, .json, .jsonl, .csv or .parquet file"
    if path.is_dir():
        return RecipeError(f"Dataset {name} is a folder. Name {kinds} in it.")
    if path.exists():
        return RecipeError(f"Dataset {name} is a file of a kind that is not read. Pass {kinds}, by its whole name.")
    if kind_of(path.name):
        return SourceError(f"Dataset {name}: there is no such file in {path.absolute().parent}. Check the path.")
    if _OF_ROWS.fullmatch(name):
        return RecipeError(
            f"Dataset {name!r} was passed from memory to the run that wrote this recipe, and is not in it. Pass it "
            "again (dataset=ROWS), or name another with --dataset."
        )
    known = ", ".join((*_REGISTERED, BUNDLED, *(dataset.repo for dataset in HUB_DATASETS)))
    return RecipeError(
        f"There is no dataset {name!r}.{nearest(name, known_names())} Known are {known}; or pass {kinds}, or "
        f"register your own with `roundel.calibration.register_dataset`."
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error}). Check its rights, or pass another file.") from error
    return digest.hexdigest()
