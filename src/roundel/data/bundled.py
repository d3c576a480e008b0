"""Where the bundled model and its texts lie. PROVENANCE.md beside each says where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

__all__ = ["bundled_model", "bundled_text"]

_FOLDER = Path(__file__).resolve().parent


def bundled_model() -> Path:
    """The folder of tinybook, a Llama of 3.8 M parameters, as a Hugging Face checkpoint of 7.7 MB in bfloat16."""
    return _FOLDER / "tinybook"


def bundled_text(name: Literal["calibration", "evaluation"]) -> Path:
    """A UTF-8 text sampled from the bundled model, one passage a line.

    "calibration" has about 60,000 of its tokens, "evaluation" about 25,600 others.
    """
    return _FOLDER / "text" / f"{name}.txt"
