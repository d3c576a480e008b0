"""Files of rows: .txt, .json, .jsonl, .csv and .parquet, the text ones also as .gz and .zst. Nothing is executed.

A .txt is one text, handed on in pieces that end with a line; every other file is a list of rows. parquet and .zst are
read by pyarrow, which roundel does not bring along by itself.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from roundel.calibration.rows import COLUMNS
from roundel.errors import RecipeError, SourceError

__all__ = ["kind_of", "need_pyarrow", "read_values"]

_KINDS = (".txt", ".json", ".jsonl", ".csv", ".parquet")
_PACKED = (".gz", ".zst")
PIECE_CHARACTERS = 4 << 20  # of a .txt; tokenizers take about a hundred bytes for each of its tokens at a time
_BATCH_ROWS = 256  # of a parquet file in memory at once
_FIELD_BYTES = 1 << 30  # the csv module refuses fields above 128 KiB unless told


def kind_of(name: str) -> str | None:
    """The kind of a file by its name (".jsonl" for "x.jsonl.gz"), None when it is none that is read."""
    stem, packed = name.lower(), False
    for suffix in _PACKED:
        if stem.endswith(suffix):
            stem, packed = stem[: -len(suffix)], True
    kind = next((kind for kind in _KINDS if stem.endswith(kind)), None)
    return None if packed and kind == ".parquet" else kind


def need_pyarrow(name: str) -> None:
    """Raise RecipeError where a file of this name cannot be read for want of pyarrow."""
    if name.lower().endswith((".parquet", ".zst")) and importlib.util.find_spec("pyarrow") is None:
        raise RecipeError(
            f"Reading {name} takes pyarrow, which is not installed. Run `pip install 'roundel[data]'`, or pass the "
            f"text as .jsonl or .txt."
        )


def read_values(path: Path, columns: Sequence[str] = COLUMNS) -> Iterator[object]:
    """What the file holds, row by row: mappings and strings as they stand there; of a .txt, pieces in order.

    columns   of a parquet file, those to read; where it has none of them, its only column
    Raises SourceError when the file is missing or broken, RecipeError when pyarrow is, or no column fits.
    """
    need_pyarrow(path.name)
    kind = kind_of(path.name)
    try:
        if kind == ".parquet":
            yield from _parquet(path, columns)
            return
        with _opened(path) as file:
            if kind == ".txt":
                yield from _pieces(file)
            elif kind == ".csv":
                yield from _csv(file)
            elif kind == ".jsonl":
                yield from _lines(file, path)
            else:
                yield from _json(file, path)
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:  # pyarrow's errors are ValueErrors
        raise SourceError(f"{path} cannot be read ({error}). Repair it, or pass another file.") from error


def _opened(path: Path) -> IO[str]:
    """The file's text, unpacked, without a byte order mark."""
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    if path.name.lower().endswith(".zst"):
        import pyarrow

        return io.TextIOWrapper(pyarrow.input_stream(str(path), compression="zstd"), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _pieces(file: IO[str]) -> Iterator[str]:
    """The text in pieces of about PIECE_CHARACTERS, cut after line ends."""
    while piece := file.read(PIECE_CHARACTERS):
        yield piece + file.readline()


def _lines(file: IO[str], path: Path) -> Iterator[object]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield _parsed(line, f"{path}, line {number}")


def _json(file: IO[str], path: Path) -> Iterator[object]:
    """A list of rows; a mapping that holds one list; one row; or, as many .json files are, a row on each line."""
    text = file.read()
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        if "\n" not in text.strip() or text.lstrip().startswith("["):
            raise
        yield from _lines(io.StringIO(text), path)
        return
    if isinstance(value, Mapping) and not set(COLUMNS) & set(value):
        lists = [held for held in value.values() if isinstance(held, list)]
        if len(lists) == 1:
            value = lists[0]
    yield from value if isinstance(value, list) else [value]


def _parsed(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise SourceError(f"{where} is no JSON ({error}). Repair it, or pass another file.") from error


def _csv(file: IO[str]) -> Iterator[object]:
    before = csv.field_size_limit(_FIELD_BYTES)
    try:
        rows = list(csv.DictReader(file))
    finally:
        csv.field_size_limit(before)
    yield from rows


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[object]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        held = file.schema_arrow.names
        wanted = [name for name in columns if name in held] or (held if len(held) == 1 else [])
        if not wanted:
            raise RecipeError(
                f"{path} has the columns {', '.join(held)}. It needs one of {', '.join(columns)}; rename one."
            )
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
            yield from batch.to_pylist()
