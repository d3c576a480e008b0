"""The same function, easier weights; one file for each transform."""

from __future__ import annotations

from roundel.transforms.awq import Awq
from roundel.transforms.smoothquant import SmoothQuant
from roundel.transforms.teq import Teq, Training
from roundel.transforms.transform import Transform, Transformed

__all__ = ["TRANSFORMS", "Awq", "SmoothQuant", "Teq", "Training", "Transform", "Transformed"]

TRANSFORMS: dict[str, Transform] = {t.name: t for t in (Awq(), Teq(), SmoothQuant())}
