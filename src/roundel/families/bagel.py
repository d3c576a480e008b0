"""BAGEL: a Qwen2 whose every matrix has a twin for image generation (`_moe_gen`), between an encoder and a decoder."""

from __future__ import annotations

from roundel.families.family import Family, Keep
from roundel.families.generic import TOWER

__all__ = ["FAMILY"]

KEPT = (
    Keep(
        pattern=r"\b\w+_moe_gen\b",
        reason="image generation: rounding errors add up over denoising steps",
    ),
    Keep(pattern=r"^(connector|vae2llm|llm2vae|time_embedder|latent_pos_embed)\b", reason=TOWER),
)

FAMILY = Family(
    name="BAGEL",
    kept=KEPT,
    blocks=("language_model.model.layers",),
    head="language_model.lm_head",
    embedding="language_model.model.embed_tokens.weight",
)
