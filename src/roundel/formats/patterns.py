"""Regular expressions that a checkpoint's config brings along, tried on names of modules.

A file is not trusted to bring one that ends: repeats inside repeats, and many in a row, may take longer than anybody
waits.
"""

from __future__ import annotations

import re
from functools import lru_cache

from roundel.errors import SourceError

__all__ = ["begins", "occurs"]

REPEATS = 6  # in a pattern; each multiplies the time by the length of a name
_SINGLE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)  # an escape or a set: stands for one letter
_REPEAT = re.compile(r"[*+]|\{\d*,\d*\}|\{\d{2,}\}")


def begins(pattern: str, module: str) -> bool:
    """Whether a module's name begins with what the pattern says. False for what is no pattern. Raises SourceError."""
    found = _compiled(pattern)
    return found is not None and found.match(module) is not None


def occurs(pattern: str, module: str) -> bool:
    """Whether what the pattern says is in a module's name. False for what is no pattern. Raises SourceError."""
    found = _compiled(pattern)
    return found is not None and found.search(module) is not None


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str] | None:
    plain = _SINGLE.sub("x", pattern)
    if len(_REPEAT.findall(plain)) > REPEATS or _is_nested(plain):
        raise SourceError(
            f"The config names layers by {pattern:.80}, which may take forever to try: it repeats what repeats. Mend "
            "its quantization_config."
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return None  # a name with special characters


def _is_nested(plain: str) -> bool:
    """Whether a group that is repeated holds a repeat."""
    inside = [False]
    for place, letter in enumerate(plain):
        if letter == "(":
            inside.append(False)
        elif letter == ")" and len(inside) > 1:
            holds = inside.pop()
            if holds and _REPEAT.match(plain, place + 1):
                return True
            inside[-1] |= holds
        elif _REPEAT.match(plain, place):
            inside[-1] = True
    return False
