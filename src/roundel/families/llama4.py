"""Llama 4, multimodal: the text model under `language_model.`, beside vision_model and a projector."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import llama4_text

__all__ = ["FAMILY"]

FAMILY = replace(
    llama4_text.FAMILY,
    name="Llama 4",
    blocks=("language_model.model.layers", "model.language_model.layers"),
    head="language_model.lm_head",
    embedding="language_model.model.embed_tokens.weight",
)
