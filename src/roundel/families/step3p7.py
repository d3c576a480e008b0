"""Step-3.7, multimodal: the text model is named as Step-3.5's, beside vision_model and vit_large_projector."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import step3p5

__all__ = ["FAMILY"]

FAMILY = replace(step3p5.FAMILY, name="Step-3.7")
