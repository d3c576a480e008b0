"""Qwen2-VL: the text model is named as Qwen2's, beside a tower called `visual`."""

from __future__ import annotations

from roundel.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(name="Qwen2-VL", blocks=("model.layers", "model.language_model.layers"))
