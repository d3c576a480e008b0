"""Every error roundel raises, as one tree.

QuantizationError
├─ RecipeError         the wish makes no sense by itself          (unknown scheme, bits out of range)
├─ PlanError           the wish does not fit this model           carries all problems, not the first
│  ├─ ConversionError  numbers of a layer do not fit another format   names layer and number
│  ├─ PlanChanged      the output folder belongs to another plan  carries the differing fields
│  └─ OutputError      the output cannot be written               (not empty, no permission, disk too small)
├─ SourceError         the checkpoint is broken or out of reach   (missing shard, bad header, gated)
├─ GridError           numbers and grid disagree: our bug
├─ NumericsError       non-finite weights                         names layer and first bad index
├─ VerificationError   a written checkpoint does not hold what its plan says
└─ BackendError        nothing can run this model here            lists every backend and its reason

A message is one sentence of what, one of why, one of what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "BackendError",
    "ConversionError",
    "GridError",
    "NumericsError",
    "OutputError",
    "PlanChanged",
    "PlanError",
    "QuantizationError",
    "RecipeError",
    "SourceError",
    "VerificationError",
    "nearest",
]


class QuantizationError(Exception):
    """The root: catch this to catch everything roundel raises on purpose."""

    exit_code = 1


class RecipeError(QuantizationError):
    """The wish makes no sense by itself, whatever the model."""

    exit_code = 2


class PlanError(QuantizationError):
    """The wish does not fit this model. `problems` holds every reason, not only the first."""

    exit_code = 3

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            text = f"{len(self.problems)} problems:\n" + "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(text)


class ConversionError(PlanError):
    """The numbers of a layer cannot be stored in another format as they are. Known once they are read."""


class PlanChanged(PlanError):
    """The output folder was begun under another plan. `fields` maps a name to (then, now)."""

    def __init__(self, folder: str, fields: dict[str, tuple[object, object]]) -> None:
        self.fields = fields
        differing = "; ".join(f"{name}: begun with {then}, now {now}" for name, (then, now) in fields.items())
        super().__init__(
            f"{folder} holds an unfinished run of another plan ({differing}). Its files would mix two plans. "
            "Repeat the command it was begun with to continue, or pass --overwrite to start anew."
        )


class OutputError(PlanError):
    """The output cannot be written where it was asked for."""

    exit_code = 4


class SourceError(QuantizationError):
    """The checkpoint is broken, incomplete or out of reach."""

    exit_code = 5


class NumericsError(QuantizationError):
    """Weights are not finite, or leave the range of the scale's type. Names layer and first bad index.

    reason   the part of the message that says what is wrong with a layer that cannot be rounded; else empty
    """

    exit_code = 6

    def __init__(self, text: str, reason: str = "") -> None:
        self.reason = reason
        super().__init__(text)


class VerificationError(QuantizationError):
    """A checkpoint does not hold what it should."""

    exit_code = 7


class BackendError(QuantizationError):
    """A checkpoint cannot be run here: no backend takes a layer, the memory is too small, or it lies elsewhere."""

    exit_code = 8


class GridError(QuantizationError):
    """Numbers and grid disagree. This is a bug of ours."""

    exit_code = 70


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean X?` with the nearest known name, or the empty string."""
    by_folded = {k.casefold(): k for k in known}
    found = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.5)
    return f" Did you mean {by_folded[found[0]]!r}?" if found else ""
