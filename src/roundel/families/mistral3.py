"""Mistral Small 3.1 and later, multimodal: a Mistral under `language_model.` beside a Pixtral tower and a projector."""

from __future__ import annotations

from roundel.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="Mistral 3",
    blocks=("language_model.model.layers", "model.language_model.layers"),
    head="language_model.lm_head",
    embedding="language_model.model.embed_tokens.weight",
)
