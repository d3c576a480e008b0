"""What a transform is: the same function with weights that are easier to round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from roundel.unit import Layer, Unit

__all__ = ["Transform", "Transformed"]


@dataclass(frozen=True, kw_only=True)
class Transformed:
    """A unit with other weights, and what happened to its spaces.

    notes   space name -> what was done or why it was skipped; rows of the report
    """

    unit: Unit
    notes: Mapping[str, str] = field(default_factory=dict)


class Transform(Protocol):
    """A frozen dataclass that inherits from this: its fields are the hyperparameters, as an algorithm's are."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]

    @property
    def reads_activations(self) -> bool:
        """Whether it needs activations."""

    @property
    def reads_float_stream(self) -> bool:
        """Whether it asks for the streams "float" and "target" beside "quantized"."""

    def passes(self, samples: int, batch: int) -> float:
        """What it costs, in forward passes of a unit over all samples; a backward pass counts two. For estimates."""

    @property
    def copies(self) -> float:
        """Float32 copies of a unit's weights, or what takes as much, that are held beside these. For estimates."""
        return 2.0

    def learns_on(self, batch: int, part: int) -> int:
        """Samples it runs forward and backward at once, where a step has `batch` and `part` are run together; 0 where
        it only runs forward. For estimates."""
        return 0

    def refuse(self, layer: Layer) -> str | None:
        """Why a layer makes this transform impossible, or None. Asked at plan time."""

    def apply(self, unit: Unit) -> Transformed:
        """The unit with absorbed maps: same output before rounding. Returns values; changes nothing."""
