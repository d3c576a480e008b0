"""Gemma 3, multimodal: the text model under `language_model.`, beside a SigLIP tower and a projector."""

from __future__ import annotations

from roundel.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="Gemma 3, multimodal",
    blocks=("language_model.model.layers", "model.language_model.layers"),
    head="language_model.lm_head",
    embedding="language_model.model.embed_tokens.weight",
    norm_offset=1.0,
)
