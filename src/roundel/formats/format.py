"""What a format is: a way to lay quantized layers out in a file. Pure functions of values: no files, no modules.

A stored layer is a handful of tensors called *parts*: the tensor `NAME.PART` for a layer NAME ("qweight", "scales").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from roundel.errors import GridError
from roundel.formats.patterns import occurs
from roundel.io.safetensors import ShardLayout, Stacks, lay_out
from roundel.scheme import Scheme
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Cut, Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CACHE_PARTS", "Contents", "Format", "Found", "Model", "WordLayout", "matching_override"]

CACHE_PARTS = ("k_scale", "v_scale")  # of an attention module: what its keys and its values are divided by


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a whole checkpoint will hold: what a format needs to know to write its config.

    layers    every quantized layer
    kept      module names of the matrices that stay in full precision
    default   the scheme most layers share
    blocks    module paths that hold the decoder blocks ("model.layers")
    head      module name of the output head
    embedding module name of the token embedding
    kv_cache  "fp8" where scales of keys and values are stored
    """

    layers: Sequence[Layer]
    kept: Sequence[str]
    default: Scheme
    blocks: Sequence[str] = ("model.layers",)
    head: str = "lm_head"
    embedding: str = "model.embed_tokens"
    kv_cache: str | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a format that writes more than tensors is told of the model.

    config       config.json of the source
    folder       where its small files lie (tokenizer, generation config ...)
    name         as people call it
    matrices     shapes of all matrices by module name, rounded or not
    importance   whether inputs are counted when types are rounded to
    """

    config: Mapping[str, object]
    folder: Path
    name: str
    matrices: Mapping[str, tuple[int, int]]
    importance: bool = False


@dataclass(frozen=True, kw_only=True)
class Found:
    """A layer recognized among stored tensors: its shape, its grid, which parts belong to it, and whether the columns
    of a group may lie anywhere (a group index is among the parts)."""

    shape: tuple[int, int]
    scheme: Scheme
    parts: tuple[str, ...]
    permuted: bool = False


@dataclass(frozen=True, kw_only=True)
class WordLayout:
    """How integer codes lie in 32-bit words: in GPTQ's three tensors, or in those of compressed-tensors.

    order         "gptq": words along in, [words, out]; "awq": eight columns of out a word, interleaved; "rows": words
                  along in, [out, words], under compressed-tensors' names
    zero_offset   what is subtracted from a zero point before it is stored: 1 for GPTQ v1, else 0
    group_index   whether `g_idx` is written
    """

    order: str
    zero_offset: int = 0
    group_index: bool = False


class Format(Protocol):
    """A way to lay quantized layers out, and to read them back. Bodies given here are what most formats need."""

    name: ClassVar[str]
    summary: ClassVar[str]
    writes: ClassVar[bool] = True
    copies: ClassVar[bool] = True  # whether tensors that stay are stored as they are
    caches: ClassVar[bool] = False  # whether CACHE_PARTS of attention modules have a place
    embeds: ClassVar[bool] = False  # whether readers take an embedding that is rounded
    keeps_codes: ClassVar[bool] = True  # whether what is stored are codes, not floats that are rounded once more
    rounds_inputs: ClassVar[bool] = False  # whether readers round the inputs of every layer, whatever they were before
    floats: ClassVar[str | None] = None  # the dtype of all weights, of a format that has no codes at all
    packs_rows: ClassVar[bool] = False  # whether every part of a layer has its rows, each packed by itself
    in_order: ClassVar[bool] = False  # whether the file has all tensors in the source's order, biases among them
    splits: ClassVar[bool] = False  # whether experts that the source has in one tensor are taken apart in any case

    @property
    def packing(self) -> str | None:
        """Which of several layouts it is, by the name that configs have for it; None where there is one."""
        return None

    def for_model(self, model: Model) -> Format:
        """The format for this model. Raises PlanError where it has no place for it."""
        return self

    def schemes(self) -> Mapping[str, Scheme | None] | None:
        """The schemes by module name, of a format that decides on them itself; None in it: the matrix stays."""
        return None

    def cuts(self, module: str, config: Mapping[str, object]) -> Mapping[str, Cut]:
        """The parts that a matrix of the model (config.json: `config`) is stored in, by module name; the same for the
        name of one of the parts. Empty for a matrix that is stored whole."""
        return {}

    compound: ClassVar[tuple[str, ...]] = ()  # part names that have a dot in them: "weight.absmax"

    def refuse(self, layer: Layer) -> str | None:
        """Why this layer cannot be stored, or None. Asked at plan time, and for the support matrix."""
        return f"{self.name} is only read"

    def blurs(self, layer: Layer) -> str | None:
        """Why readers of a layer on this grid compute other numbers than the grid's, or None."""
        return None

    def settle(self, layers: Sequence[Layer]) -> Format:
        """The variant that fits all these layers together. Raises PlanError when none does."""
        return self

    def grid_of(self, scheme: Scheme) -> Scheme:
        """The scheme with the limits of this format's readers written into its grid."""
        return scheme

    def outputs(self, layer: Layer) -> tuple[TensorSpec, ...]:
        """Parts, shapes and dtypes that `pack` will return; names are part names. Exact: file offsets follow."""
        raise GridError(f"{self.name} is only read")

    def pack(self, layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Part name -> tensor. The format's conventions (order of bits, stored zero - 1) live here."""
        raise GridError(f"{self.name} is only read")

    def kept(self, spec: TensorSpec) -> TensorSpec | None:
        """How a tensor that stays is stored, under the same name; None where it is left out."""
        return spec

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """The values of a tensor that stays, or of some of its rows, as they are stored; `kept` says of which dtype."""
        return tensor

    def rows_together(self, tensor: str) -> int:
        """Rows of a tensor that go together: `keep`, and `pack` where it `packs_rows`, take any number of such runs, in
        order."""
        return 1

    def name_of(self, tensor: str, config: Mapping[str, object]) -> str | None:
        """What a checkpoint of this format, when it is read, calls a tensor of the model it was made from, whose
        config.json is `config`; None where it has none."""
        return tensor

    def extras(self) -> Mapping[str, Tensor]:
        """Tensors that are stored and no part of the source."""
        return {}

    def lay_out(
        self, specs: Sequence[TensorSpec], layers: Sequence[Layer], shard_bytes: int, stacks: Stacks
    ) -> tuple[ShardLayout, ...]:
        """The files, each laid out. Places go by the names of `specs`, whatever the file calls them."""
        return lay_out(specs, shard_bytes, stacks=stacks)

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        """Inverse of `pack`, bit for bit. `layer.stored.scheme` says on which grid."""
        ...

    def decode(self, weight: QuantizedTensor) -> Tensor:
        """The float weights that readers of this format compute, [out, in]."""
        from roundel.ops.decode import decode

        return decode(weight)

    def config(self, contents: Contents) -> dict[str, object]:
        """The `quantization_config` a loader must find in config.json."""
        raise GridError(f"{self.name} is only read")

    def settings(self, source: Mapping[str, object], quantization: Mapping[str, object]) -> dict[str, object]:
        """What config.json holds: the source's config, which has no quantization, and what `config` returned."""
        return {**source, "quantization_config": quantization} if quantization else dict(source)

    def caveats(self, contents: Contents) -> tuple[str, ...]:
        """What a reader of this format is known not to load, or to load wrong without a word. Notes of the plan."""
        return ()

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        """A reader for a checkpoint with this `quantization_config`, or None when it is another format's."""
        ...

    def known(
        self, module: str, parts: Mapping[str, TensorSpec], read: Callable[[str], bytes]
    ) -> Mapping[str, TensorSpec]:
        """A module's parts as `find` takes them: those of the file's header, where that is enough.

        read   the bytes of a part
        """
        return parts

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        """Whether these tensors are one layer of this format. Raises SourceError when one of them is missing."""
        ...

    def cached(self) -> str | None:
        """How the checkpoint that is read has keys and values rounded in the cache: "fp8" by one stored scale each, or
        other words; None: not at all."""
        return None

    def stack(self, module: str) -> tuple[str, int] | None:
        """For a format that has all experts of a block in one tensor [experts, ...]: the name of the module that holds
        them, and this expert's index there. None for a module that stands by itself."""
        return None

    def unstacked(self, module: str) -> str | None:
        """The inverse: the name of one of the modules that a stack holds, with {index} in it; None for no stack."""
        return None

    def words(self, layer: Layer) -> WordLayout | None:
        """The word layout, where the format stores this layer in one; None otherwise."""
        return None


def matching_override(module: str, overrides: Mapping[str, object]) -> Mapping[str, object]:
    """The entry for a module among per-layer settings: its exact name, else the first pattern that is found in it.

    Raises SourceError for a pattern that may take forever."""
    exact = overrides.get(module)
    if isinstance(exact, Mapping):
        return exact
    for pattern, value in overrides.items():
        if isinstance(value, Mapping) and occurs(pattern.removeprefix("+:"), module):
            return value
    return {}
