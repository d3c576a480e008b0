"""Activations of a unit whose layers are fed given tensors: no block is run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from roundel.unit import Decodable, Stream


@dataclass(frozen=True)
class Fed:
    """`roundel.unit.Activations` as far as algorithms that do not learn need it.

    fed      layer name -> batches [tokens, in]
    passes   of each look at them: which layers were asked for, and which weights were given
    """

    fed: Mapping[str, list[Tensor]]
    passes: list[tuple[set[str], set[str]]] = field(default_factory=list)
    samples: int = 4
    tokens: int = 16
    batch: int = 4
    part: int = 4

    def observe(
        self,
        see: Callable[[str, Tensor], None],
        weights: Mapping[str, Tensor | Decodable],
        *,
        modules: Collection[str] | None = None,
        stream: Stream = "quantized",
        every_expert: bool = False,
    ) -> None:
        assert stream == "quantized"
        asked = set(self.fed) if modules is None else set(modules)
        self.passes.append((asked, set(weights)))
        for number in range(max(len(batches) for batches in self.fed.values())):
            for name, batches in self.fed.items():
                if name in asked and number < len(batches):
                    see(name, batches[number])

    def tick(self, done: float, text: str) -> None:
        assert 0 <= done <= 1
