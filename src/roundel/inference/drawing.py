"""How the tokens of a text are chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from roundel.errors import RecipeError

__all__ = ["Drawing"]

COLDEST = 1e-6  # below, the likeliest token is all that is left, and logits over the temperature are no numbers
ONE_BY_ONE: dict[str, Any] = {  # one text, token by token, also where a checkpoint's generation_config wants another
    "num_beams": 1,
    "num_beam_groups": None,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
    "token_healing": None,
    "cache_implementation": None,
    "return_dict_in_generate": False,
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The wish; a value out of range raises RecipeError.

    tokens        at most so many; fewer when the model ends
    temperature   0, or next to it, takes the likeliest token each time; None: as generation_config says
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
        found = ONE_BY_ONE | {"max_new_tokens": min(self.tokens, room)}
        if self.temperature is not None and self.temperature < COLDEST:
            return found | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature is not None:
            found |= {"do_sample": True, "temperature": self.temperature}
        if self.top_p is not None:
            found |= {"do_sample": True, "top_p": self.top_p}
        return found
