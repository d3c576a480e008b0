"""What transformers asks a rounded model about itself, once it is loaded: it is as it is, and is not saved again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from roundel.inference.linear import unsaved

__all__ = ["Kept", "StoredConfig"]


class StoredConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of its rounding, as it stands there."""

    def __init__(self, stored: Mapping[str, Any]) -> None:
        self.quant_method = stored["quant_method"]
        self._stored = dict(stored)

    def to_dict(self) -> dict[str, Any]:
        return dict(self._stored)


class Kept(HfQuantizer):  # type: ignore[misc]
    """The quantizer of a model whose rounded layers lie as their backends like them."""

    def is_serializable(self) -> bool:
        raise unsaved()

    @property
    def is_trainable(self) -> bool:
        return False
