"""How the tokens of a text are chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from roundel.errors import RecipeError

__all__ = ["Drawing"]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The wish; a value out of range raises RecipeError.

    tokens        at most so many; fewer when the model ends
    temperature   0 takes the likeliest token each time; None: as the checkpoint's generation_config says
    top_p         only the likeliest tokens that together have this probability; None: as temperature
    seed          of what is drawn; None: another text each time
    """

    tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise RecipeError(f"{self.tokens} tokens are none to write. Ask for 1 or more.")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise RecipeError(f"A temperature of {self.temperature} is not possible. Use 0 or more.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RecipeError(f"top_p={self.top_p} is not possible. Use a number above 0, at most 1.")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 64:
            raise RecipeError(f"A seed of {self.seed} does not fit into 64 bits. Use a smaller one.")

    def options(self, room: int) -> dict[str, Any]:
        """What `generate` is told, when there is room for so many tokens."""
        found: dict[str, Any] = {"max_new_tokens": min(self.tokens, room)}
        if self.temperature == 0:
            return found | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature is not None:
            found |= {"do_sample": True, "temperature": self.temperature}
        if self.top_p is not None:
            found |= {"do_sample": True, "top_p": self.top_p}
        return found
