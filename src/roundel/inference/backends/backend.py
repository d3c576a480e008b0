"""What a backend is: something that can multiply by a rounded weight on some device, while it stays packed."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import ClassVar, Protocol

from roundel.inference.gradient import Kernel
from roundel.tensor import QuantizedTensor
from roundel.unit import Layer

__all__ = ["Backend", "missing"]


class Backend(Protocol):
    """Makes modules that multiply.

    name      as `backend=` calls it
    priority  among those that take a layer, the highest is chosen
    needs     the command that installs what it is missing here; None when nothing is missing
    """

    name: ClassVar[str]
    priority: ClassVar[int]

    @property
    def needs(self) -> str | None:
        """The command that installs what is missing here, or None."""

    def refuse(self, layer: Layer, device: str) -> str | None:
        """Why this layer cannot be run on this device ("cpu", "cuda", "xpu"), or None. Missing packages aside."""

    def make(self, layer: Layer, quantized: QuantizedTensor) -> Kernel:
        """What multiplies, without the bias.

        quantized   on the device where the module is to be; what the module keeps of it is its own
        """


@cache
def missing(module: str, extra: str | None = None) -> str | None:
    """The command that installs a module, which an extra of ours asks for (by default one of its name), or None where
    it is there."""
    return None if find_spec(module) else f"pip install 'roundel[{extra or module}]'"
