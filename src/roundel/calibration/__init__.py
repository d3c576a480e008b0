"""Text -> tokens -> activations, one block at a time."""

from roundel.calibration.datasets import Samples, calibration_tokens
from roundel.calibration.origins import register_dataset

__all__ = ["Samples", "calibration_tokens", "register_dataset"]
