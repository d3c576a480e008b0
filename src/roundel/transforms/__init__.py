"""The same function, easier weights; one file for each transform."""

from __future__ import annotations

from roundel.transforms.transform import Transform, Transformed

__all__ = ["TRANSFORMS", "Transform", "Transformed"]

TRANSFORMS: dict[str, Transform] = {}
