"""Mistral, dense: laid out like Llama."""

from __future__ import annotations

from dataclasses import replace

from roundel.families import llama

__all__ = ["FAMILY"]

FAMILY = replace(llama.FAMILY, name="Mistral")
