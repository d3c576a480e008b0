"""What transforms and algorithms have in common: a step of a chain, which says what it needs and what it costs."""

from __future__ import annotations

from typing import ClassVar, Protocol

from roundel.unit import Layer

__all__ = ["Step"]


class Step(Protocol):
    """A frozen dataclass that inherits from this, by way of Algorithm or Transform: its fields are the hyperparameters
    and their defaults.

    Fields are int, float, bool, str or None unions of these, so that they can stand in a recipe and on a command line;
    `__post_init__` raises RecipeError for a value that makes no sense.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]

    @property
    def reads_activations(self) -> bool:
        """False for all steps of a plan: no model is ever built."""

    @property
    def reads_float_stream(self) -> bool:
        """Whether it asks for the streams "float" and "target" beside "quantized"."""
        return False

    def passes(self, samples: int, batch: int) -> float:
        """What it costs, in forward passes of a unit over all samples; a backward pass counts two. For estimates."""
        return 1.0 if self.reads_activations else 0.0

    @property
    def copies(self) -> float:
        """Float32 copies of a unit's weights, or what takes as much, that are held beside these. For estimates."""

    def learns_on(self, batch: int, part: int) -> int:
        """Samples it runs forward and backward at once, where a step has `batch` and `part` are run together; 0 where
        it only runs forward. For estimates."""
        return 0

    def refuse(self, layer: Layer) -> str | None:
        """Why this layer is out of reach, or None. Asked at plan time."""
