"""Kimi K2.5, multimodal: a Kimi K2 under `language_model.`, its experts in int4, beside a tower and a projector."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import kimi_k2

__all__ = ["FAMILY"]

FAMILY = replace(
    kimi_k2.FAMILY,
    name="Kimi K2.5",
    blocks=("language_model.model.layers", "model.language_model.layers"),
    head="language_model.lm_head",
    embedding="language_model.model.embed_tokens.weight",
)
