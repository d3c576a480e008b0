"""OPT: learned positions (embed_positions), project_in and project_out are linear layers, a tied head."""

from __future__ import annotations

from roundel.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="OPT",
    blocks=("model.decoder.layers", "decoder.layers"),
    embedding="model.decoder.embed_tokens.weight",
)
