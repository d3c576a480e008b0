"""Reading a written checkpoint back: is everything there, finite, and as close to the source as it should be."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from roundel.cached import cache_tensors
from roundel.checkpoint import Checkpoint, Matrix, open_checkpoint
from roundel.errors import SourceError
from roundel.formats import FORMATS
from roundel.fusion import Errors
from roundel.matrices import errors_of
from roundel.report import REPORT
from roundel.tensor import FLOAT_DTYPES, TensorSpec, torch_dtype
from roundel.unit import Piece

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Check", "Verification", "verify"]

WORST_SQNR = 0.0  # decibel; below it a layer is worse than zeros
REPORT_TOLERANCE = 0.05  # decibel between what the run reported and what is read back
SLAB_BYTES = 32 << 20
ADDED = 1e-6  # what adding a number near 1 in float32, and taking it off again, may change, beside the sum


@dataclass(frozen=True, kw_only=True)
class Check:
    """One layer or tensor: what it is on, how close it is (None without a source), what is wrong with it (None:
    nothing)."""

    name: str
    scheme: str
    sqnr: float | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The checks of a checkpoint. `problems` is empty when all is well.

    rescaled   whether a transform gave it other weights than the source's, so that signal to noise is no measure of it
    """

    name: str
    against: str | None
    checks: tuple[Check, ...]
    problems: tuple[str, ...]
    rescaled: bool = False

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def mean_sqnr(self) -> float | None:
        found = [c.sqnr for c in self.checks if c.sqnr is not None and math.isfinite(c.sqnr)]
        return sum(found) / len(found) if found else None

    @property
    def worst(self) -> Check | None:
        return min((c for c in self.checks if c.sqnr is not None), key=lambda c: c.sqnr or 0.0, default=None)


def verify(
    out: str | Path, against: str | Path | None = None, progress: Callable[[str], None] | None = None
) -> Verification:
    """Read every packed weight of a checkpoint back.

    against   the model it was made from: adds signal-to-noise per layer, and that kept tensors are unchanged
    Raises SourceError when either cannot be opened at all (truncated, unfinished, not a model).
    """
    with tempfile.TemporaryDirectory(prefix="roundel-") as work, ExitStack() as opened:
        checkpoint = open_checkpoint(out)
        opened.callback(checkpoint.close)
        source = open_checkpoint(against, work=Path(work)) if against is not None else None
        if source is not None:
            opened.callback(source.close)
        return verify_checkpoint(checkpoint, source, progress)


def verify_checkpoint(
    checkpoint: Checkpoint, source: Checkpoint | None, progress: Callable[[str], None] | None = None
) -> Verification:
    """`verify` for opened checkpoints, holding one layer at a time."""
    from roundel.calibration.agreement import misfits_of

    told, origin = _told(checkpoint), _Origin(checkpoint, source) if source is not None else None
    checks: list[Check] = []
    layers = [m for m in checkpoint.matrices.values() if m.stored.scheme or m.cut or m.name in told.sqnr]
    for matrix in layers:
        checks.append(_check_layer(checkpoint, matrix, origin, told))
        if progress is not None:
            progress(matrix.name)
    packed = {piece.tensor for matrix in layers for piece in matrix.stored.parts.values()}
    for name, spec in checkpoint.source.tensors.items():
        if name not in packed and spec.dtype in ("BF16", "F16", "F32"):
            checks.append(_check_kept(checkpoint, name, None if told.transformed else origin))
            if progress is not None:
                progress(name)
    problems = [f"{c.name}: {c.problem}" for c in checks if c.problem is not None]
    problems += [f"{name}: it is missing" for name in _missing(checkpoint, origin, told)]
    problems += [str(error) for error in misfits_of(checkpoint)]
    return Verification(
        name=checkpoint.source.name,
        against=source.source.name if source else None,
        checks=tuple(checks),
        problems=tuple(problems),
        rescaled=told.transformed,
    )


def _check_layer(checkpoint: Checkpoint, matrix: Matrix, origin: _Origin | None, told: _Told) -> Check:
    """A layer: what its readers compute is finite, and as near to the source as the run reported."""
    from roundel.ops.losses import first_not_finite

    scheme, sqnr = matrix.dtype if matrix.stored.scheme is None else matrix.stored.scheme.name, None
    try:
        weight = checkpoint.weights(matrix.layer()).float()
    except SourceError as error:
        return Check(name=matrix.name, scheme=scheme, problem=str(error))
    at = first_not_finite(weight)
    if at is not None:
        return Check(name=matrix.name, scheme=scheme, problem=f"weight [{at[0]}, {at[1]}] is {float(weight[at])}")
    original = origin.weights(matrix) if origin is not None else None
    if isinstance(original, str):
        return Check(name=matrix.name, scheme=scheme, problem=original)
    problem = None
    if original is not None and origin is not None:
        sqnr = errors_of(original, weight).sqnr
        if sqnr < WORST_SQNR and not told.transformed:  # else a transform gave it numbers that are not comparable
            problem = f"signal to noise is {sqnr:.2f} dB: further from the source than zeros are"
        elif origin.is_what(told):
            problem = _contradiction(checkpoint, matrix, original, sqnr, told)
    return Check(name=matrix.name, scheme=scheme, sqnr=sqnr, problem=problem)


def _contradiction(checkpoint: Checkpoint, matrix: Matrix, original: Tensor, sqnr: float, told: _Told) -> str | None:
    """What is wrong with a layer's signal to noise, by the report of the run that wrote it."""
    reported = told.sqnr.get(matrix.name)
    if reported is None or (matrix.stored.scheme is None and matrix.name not in told.converted):
        return None  # without a scheme it was rounded once more, to the dtype it is stored in
    if reported == math.inf:
        return None if sqnr == math.inf else "it differs from the source, whose numbers were moved as they are"
    if matrix.stored.scheme is not None and told.measured_as not in (None, matrix.stored.format):
        layer, format = matrix.layer(), FORMATS[str(told.measured_as)]
        sqnr = errors_of(original, layer.stored.part(format.decode(checkpoint.unpack(layer)))).sqnr
    if abs(sqnr - reported) > REPORT_TOLERANCE:
        return f"signal to noise is {sqnr:.2f} dB, and the run that wrote it reported {reported:.2f}"
    return None


def _check_kept(checkpoint: Checkpoint, name: str, origin: _Origin | None) -> Check:
    """A tensor that is not packed: finite, and the same numbers as in the source where the source has it as floats that
    this form can hold."""
    import torch

    from roundel.ops.losses import first_not_finite

    spec = checkpoint.source.tensors[name]
    theirs = origin.spec(name) if origin is not None else None
    for start, stop in _slabs(spec.shape, spec.nbytes):
        raw = checkpoint.source.read(Piece(tensor=name, start=start, stop=stop))
        bad = first_not_finite(torch.from_numpy(raw).view(torch_dtype(spec.dtype))[None])
        if bad is not None:
            return Check(
                name=name, scheme=spec.dtype, problem=f"value {bad[1]} of rows {start} to {stop} is not finite"
            )
        if origin is None or theirs is None or theirs.shape != spec.shape:
            continue
        before = origin.source.source.read(Piece(tensor=theirs.name, start=start, stop=stop))
        if not _same(raw, spec.dtype, before, theirs.dtype):
            return Check(name=name, scheme=spec.dtype, problem="it differs from the source, and was to be kept")
    return Check(name=name, scheme=spec.dtype)


def _same(raw: np.ndarray, dtype: str, before: np.ndarray, dtype_before: str) -> bool:
    """Whether stored floats are those of the source, rounded to their dtype. In float32 where the source has 16 bits,
    they may have been added to."""
    import torch

    if dtype == dtype_before:
        return np.array_equal(raw, before)
    if not {dtype, dtype_before} <= FLOAT_DTYPES:
        return True
    found = torch.from_numpy(raw).view(torch_dtype(dtype))
    wanted = torch.from_numpy(before).view(torch_dtype(dtype_before)).to(found.dtype)
    if dtype != "F32" or dtype_before not in ("BF16", "F16"):
        return torch.equal(found, wanted)
    return bool(((found - wanted).abs() <= ADDED * (1 + wanted.abs())).all())


def _slabs(shape: tuple[int, ...], nbytes: int) -> list[tuple[int, int]]:
    rows = shape[0] if shape else 1
    step = max(1, SLAB_BYTES * rows // max(1, nbytes))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What the run that wrote a checkpoint reported; nothing for other tools' files.

    sqnr           of each layer, in decibel; infinite where its numbers moved as they are
    converted      layers that were quantized in the source of a conversion
    measured_as    the format whose readers these numbers speak of: of several that were written together, the first
    source_format  what the source was quantized in, "plain" where it was not; None: not told
    transformed    whether a transform gave layers other numbers, whose distance from the source's means nothing alone
    """

    sqnr: Mapping[str, float]
    converted: frozenset[str]
    measured_as: str | None
    source_format: str | None
    transformed: bool


def _told(checkpoint: Checkpoint) -> _Told:
    report = _report(checkpoint)
    rows, measured_as, source_format = report.get("rows"), report.get("measured_as"), report.get("source_format")
    sqnr: dict[str, float] = {}
    converted: set[str] = set()
    try:
        for row in rows if isinstance(rows, list) else ():
            if "noise" in row:
                converted.add(str(row["name"]))
                sqnr[str(row["name"])] = Errors(float(row["energy"]), float(row["noise"])).sqnr
            if "sqnr" in row:
                sqnr[str(row["name"])] = float(row["sqnr"])
    except (ValueError, TypeError, KeyError):
        sqnr = {}
    return _Told(
        sqnr=sqnr,
        converted=frozenset(converted),
        measured_as=measured_as if isinstance(measured_as, str) and measured_as in FORMATS else None,
        source_format=source_format if isinstance(source_format, str) else None,
        transformed=bool(report.get("transforms")),
    )


def _report(checkpoint: Checkpoint) -> Mapping[str, object]:
    if REPORT not in checkpoint.source.files.files:
        return {}
    try:
        found = json.loads(checkpoint.source.files.fetch(REPORT).read_text())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _missing(checkpoint: Checkpoint, origin: _Origin | None, told: _Told) -> list[str]:
    """Layers the run reported or the source has, and the checkpoint lacks; and kept tensors likewise."""
    missing = [name for name in told.sqnr if name not in checkpoint.matrices]
    if origin is not None:
        missing += [m for m in origin.matrices if m not in checkpoint.wholes and m not in missing]
        missing += [n for n in origin.others if n not in checkpoint.source.tensors]
    return missing


class _Origin:
    """The source, by the names that the checkpoint made from it has.

    tensors, matrices   those names -> the source's; others: names of tensors that belong to no matrix
    """

    def __init__(self, checkpoint: Checkpoint, source: Checkpoint) -> None:
        self.source = source
        reader, config = checkpoint.reader, source.source.config

        def ours(tensor: str) -> str | None:
            return tensor if reader is None else reader.name_of(tensor, config)

        tensors = {ours(name): name for name in source.source.tensors}
        self.tensors = {name: theirs for name, theirs in tensors.items() if name is not None}
        weights = {ours(f"{name}.weight"): name for name in source.wholes}
        self.matrices = {w.removesuffix(".weight"): name for w, name in weights.items() if w is not None}
        held = {p.tensor for m in source.matrices.values() for p in m.stored.parts.values()} | set(source.dropped)
        if reader is None or reader.cached() is None:
            held |= set(cache_tensors(source))
        held |= {m.bias[1].tensor for m in source.matrices.values() if m.bias is not None}
        self.others = [name for name, theirs in self.tensors.items() if theirs not in held]

    def is_what(self, told: _Told) -> bool:
        """Whether the report can be of this source: the model that a converted one was rounded from is another."""
        return told.source_format in (None, self.source.format_name)

    def spec(self, name: str) -> TensorSpec | None:
        """The source's tensor."""
        return self.source.source.tensors.get(self.tensors.get(name, ""))

    def weights(self, matrix: Matrix) -> Tensor | str:
        """The source's weights of a layer, or what is wrong."""
        source, cut = self.source, matrix.cut
        found = source.wholes.get(self.matrices.get(matrix.name if cut is None else cut.of, ""))
        if found is None and matrix.name == source.family.head and source.is_tied:
            found = source.tied_head()
        if found is None:
            return "the source has no such layer"
        shape = found.shape if cut is None else cut.shape(found.shape[1])
        if shape != matrix.shape or (cut is not None and found.shape[0] % cut.heads):
            return f"it is {list(matrix.shape)}, in the source {list(shape)}"
        weight = source.weights(found.layer()).float()
        return weight if cut is None else cut.take(weight)
