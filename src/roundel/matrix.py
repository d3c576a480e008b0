"""A 2-D weight of a checkpoint, and the parts that a format stores one in (`Format.cuts`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from roundel.errors import PlanError, SourceError
from roundel.formats import Format
from roundel.scheme import PRESETS, Scheme
from roundel.unit import Cut, Layer, Piece, Stored

__all__ = ["JOINED", "Matrix", "cut_for", "joined"]

JOINED = "joined"  # `Stored.format` of a matrix that lies in several


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A 2-D weight of the checkpoint, before anyone decided what becomes of it.

    name      module name; shape [out, in]; dtype as stored ("BF16"), or what it decodes to
    stored    how it lies in the checkpoint
    bias      the bias that belongs to it: its name as it will be written, and the part of a tensor it is
    reason    why it is no linear layer to be rounded; None when it is one
    role      "expert", "head" or "linear"
    cut       which part of which matrix of the model it is, where that one is stored in parts; None: it is whole
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    stored: Stored
    bias: tuple[str, Piece] | None = None
    reason: str | None = None
    role: str = "linear"
    cut: Cut | None = None

    @property
    def is_split(self) -> bool:
        """Whether it is a part of a larger tensor."""
        return any(not piece.is_whole for piece in self.stored.parts.values())

    def layer(self, scheme: Scheme | None = None) -> Layer:
        """The layer, to be put on `scheme`; without one, as it is stored (a plain matrix takes a nominal scheme)."""
        found = scheme or self.stored.scheme or PRESETS["W8A16"]
        return Layer(
            name=self.name, shape=self.shape, dtype=self.dtype, scheme=found, stored=self.stored, role=self.role,
            bias=self.bias[0] if self.bias else None, cut=self.cut,
        )  # fmt: skip


def joined(parts: Sequence[Matrix]) -> Matrix:
    """The matrix of the model of which these are all parts; float32 unless all are floats of one dtype.

    Raises SourceError where they do not fit together.
    """
    cuts = [part.cut for part in parts if part.cut is not None]
    name, heads = cuts[0].of, cuts[0].heads
    widths = {cut.width(part.shape) for cut, part in zip(cuts, parts, strict=True)}
    width = widths.pop()
    if widths or any(part.shape != cut.shape(width) for cut, part in zip(cuts, parts, strict=True)):
        sizes = " and ".join(f"{part.name} {list(part.shape)}" for part in parts)
        raise SourceError(f"{sizes} do not make the {heads} heads of one {name}. Fetch the checkpoint again.")
    dtypes = {part.dtype if part.stored.scheme is None else "F32" for part in parts}
    pieces = {f"{part.name}.{key}": piece for part in parts for key, piece in part.stored.parts.items()}
    return Matrix(
        name=name,
        shape=(heads * max(cut.stop for cut in cuts), width),
        dtype=dtypes.pop() if len(dtypes) == 1 else "F32",
        stored=Stored(format=JOINED, parts=pieces),
    )


def cut_for(
    formats: Sequence[Format], config: Mapping[str, object], wholes: Mapping[str, Matrix], stored: Mapping[str, Matrix]
) -> dict[str, Matrix]:
    """The matrices that formats store: in place of one that they store in parts, these.

    wholes   as the model has them; stored: as the checkpoint has them, so that a part that is there is taken as it is
    Raises PlanError where formats store a matrix in different parts, SourceError for one that has other rows.
    """
    found: dict[str, Matrix] = {}
    for name, whole in wholes.items():
        ways = [dict(format.cuts(name, config)) for format in formats]
        for format, parts in zip(formats, ways, strict=True):
            if parts != ways[0]:
                raise PlanError(
                    f"{formats[0].name} and {format.name} do not store {name} in the same parts. Write them in two "
                    "runs."
                )
        if not ways[0]:
            found[name] = whole
        for part, cut in ways[0].items():
            found[part] = stored[part] if part in stored else _part(part, cut, whole, ways[0])
    return found


def _part(name: str, cut: Cut, whole: Matrix, cuts: Mapping[str, Cut]) -> Matrix:
    rows = cut.heads * max(each.stop for each in cuts.values())
    if whole.shape[0] != rows:
        raise SourceError(
            f"{whole.name} has {whole.shape[0]} rows, and by config.json its {cut.heads} heads have {rows}. Fetch both "
            "again from one place."
        )
    if whole.bias is not None:
        raise PlanError(
            f"{whole.name} has a bias, for which there is no place beside its parts. Choose another format."
        )
    return replace(whole, name=name, shape=cut.shape(whole.shape[1]), stored=replace(whole.stored, cut=cut), cut=cut)
