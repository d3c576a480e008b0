"""roundel rounds the weights of large language models to few bits, without loading the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from roundel.inference.registration import register_when_imported

__version__ = "0.1.0"
__all__ = ["Recipe", "Scheme", "__version__", "convert", "load", "plan", "quantize", "register"]

if TYPE_CHECKING:
    from roundel.api import convert, plan, quantize
    from roundel.inference.loading import load
    from roundel.inference.registration import register
    from roundel.recipe import Recipe
    from roundel.scheme import Scheme

_HOMES = {
    "Recipe": "roundel.recipe",
    "Scheme": "roundel.scheme",
    "convert": "roundel.api",
    "load": "roundel.inference.loading",
    "plan": "roundel.api",
    "quantize": "roundel.api",
    "register": "roundel.inference.registration",
}
register_when_imported()


def __getattr__(name: str) -> object:
    """Public names are imported when first used, so that importing roundel costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'roundel' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
