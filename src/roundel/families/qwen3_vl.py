"""Qwen3-VL, dense: the text model under `model.language_model.`, the tower under `model.visual.`."""

from __future__ import annotations

from roundel.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="Qwen3-VL",
    blocks=("model.language_model.layers",),
    embedding="model.language_model.embed_tokens.weight",
)
