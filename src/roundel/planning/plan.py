"""What a plan is: the pieces of work, and every output file laid out.

A plan knows every output tensor's name, dtype, shape and file offset. It is a value: nothing here reads or decides.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from roundel import __version__
from roundel.formats import Format
from roundel.importance import Importances
from roundel.io.safetensors import ShardLayout
from roundel.recipe import Recipe
from roundel.scheme import PRESETS, Scheme
from roundel.tensor import TensorSpec
from roundel.unit import Layer, Piece

__all__ = ["Copy", "Kept", "Output", "Plan", "Work", "most_common"]


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A tensor that is written as it is stored: its name in the output, and where it lies in the source."""

    spec: TensorSpec
    piece: Piece


@dataclass(frozen=True, kw_only=True)
class Work:
    """The smallest piece of work that is done, committed and resumed as a whole.

    name     unique; the layer's, the tensor's or the unit's name
    kind     "round" a layer, "decode" a packed matrix that stays in full precision, "copy" tensors, or a "unit":
             decoder blocks, mostly one, or the output head, of which all is needed at once
    layer    for "round" and "decode"
    copies   tensors written along with it: its bias, all of a "copy", what stays of a unit
    layers   the matrices of a unit that are rounded
    decodes  the packed matrices of a unit that stay in full precision
    blocks   the names of a unit's blocks, in the order they are run
    caches   attention modules of a unit whose keys and values are measured
    beside   layers rounded elsewhere that have a scale in common with `layer`, so that they are read, too
    shards   source files it reads
    """

    name: str
    kind: Literal["round", "decode", "copy", "unit"]
    layer: Layer | None = None
    copies: tuple[Copy, ...] = ()
    layers: tuple[Layer, ...] = ()
    decodes: tuple[Layer, ...] = ()
    blocks: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    beside: tuple[Layer, ...] = ()
    shards: tuple[str, ...] = ()

    @property
    def rounded(self) -> tuple[Layer, ...]:
        """The layers it rounds."""
        if self.kind == "round":
            assert self.layer is not None
            return (self.layer,)
        return self.layers


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A matrix that stays in full precision, and why."""

    name: str
    shape: tuple[int, int]
    dtype: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Output:
    """One format of a run: the settled format, its config, and its files, each laid out."""

    format: Format
    config: Mapping[str, object]
    shards: tuple[ShardLayout, ...]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that will be written.

    source_format  the format the source is quantized in, "plain" where it is not
    origins      layer name -> where its scheme was decided
    kept         matrices that stay, each with its reason
    outputs      one for each format
    tokens       of a sample, where the recipe looks at data: what it asks for, or what the model takes
    importances  what a file says of layers' inputs, where the recipe names one
    notes        fallbacks and facts the user should know; an error under `strict` where they are fallbacks
    """

    recipe: Recipe
    source_name: str
    source_revision: str | None
    source_fingerprint: str
    source_format: str
    family: str
    works: tuple[Work, ...]
    layers: tuple[Layer, ...]
    origins: Mapping[str, str]
    kept: tuple[Kept, ...]
    outputs: tuple[Output, ...]
    untied: bool
    source_bytes: int
    tokens: int
    demoted: Mapping[str, str] = field(default_factory=dict)
    calibration: str | None = None
    importances: Importances | None = None
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """sha256 of what shapes the output: recipe, source headers, and every output tensor."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode())
        for output in self.outputs:
            for shard in output.shards:
                digest.update(shard.header)
        return digest.hexdigest()

    def identity(self) -> dict[str, object]:
        """The fields that name a plan, for comparing with an unfinished one."""
        return {
            "roundel": __version__,
            "source": self.source_name,
            "source_fingerprint": self.source_fingerprint,
            **{f"recipe.{k}": v for k, v in self.recipe.to_dict().items()},
            "demoted": dict(self.demoted),
            **({"calibration": self.calibration} if self.calibration else {}),
            **({"importances": self.importances.sha256} if self.importances else {}),
        }

    @property
    def parameters(self) -> int:
        """Weights in the layers that are rounded."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def extent(self) -> str:
        """What is rounded, and how wide it is stored, in words."""
        if not self.layers:
            return "no layer is rounded"
        return f"{len(self.layers)} layers at {self.bits_per_weight:.3f} bits per weight"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per rounded weight in the first format, scales and zero points included."""
        stored = sum(s.nbytes for layer in self.layers for s in self.outputs[0].format.outputs(layer))
        return 8 * stored / max(1, self.parameters)

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


def most_common(layers: Sequence[Layer]) -> Scheme:
    """The scheme that most layers have; the first of these, where several do. Of no layers a nominal one, which nobody
    looks at."""
    if not layers:
        return PRESETS["W8A16"]
    return Counter(layer.scheme for layer in layers).most_common(1)[0][0]
