"""What a transform is: the same function with weights that are easier to round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from roundel.step import Step
from roundel.unit import Unit

__all__ = ["Transform", "Transformed"]


@dataclass(frozen=True, kw_only=True)
class Transformed:
    """A unit with other weights, and what happened to its spaces.

    notes   space name -> what was done or why it was skipped; rows of the report
    """

    unit: Unit
    notes: Mapping[str, str] = field(default_factory=dict)


class Transform(Step, Protocol):
    """Makes weights easier to round. See Step for what its fields are; it is refused where it refuses any layer."""

    @property
    def copies(self) -> float:
        return 2.0

    def apply(self, unit: Unit) -> Transformed:
        """The unit with absorbed maps: same output before rounding. Returns values; changes nothing."""
