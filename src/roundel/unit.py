"""What is in memory together.

Piece is a part of a stored tensor, Cut a part of a matrix, Layer one linear weight, Unit a group of them; Space is a
channel basis inside a unit, and Activations what enters it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from roundel.regrid import obstacle
from roundel.scheme import Scheme
from roundel.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Activations",
    "Call",
    "Cut",
    "Decodable",
    "Inputs",
    "Layer",
    "Piece",
    "Space",
    "Stored",
    "Stream",
    "Unit",
    "Writer",
]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor of the checkpoint, or the part of it that one layer needs.

    tensor       its name in the checkpoint
    index        leading indices taken first: (3,) is expert 3 of a fused [experts, out, in] tensor
    start, stop, step   then rows start:stop:step of what is left; stop None means to the end
    transposed   whether the part is stored [in, out] and is turned after reading, before rows are taken
    """

    tensor: str
    index: tuple[int, ...] = ()
    start: int = 0
    stop: int | None = None
    step: int = 1
    transposed: bool = False

    @property
    def is_whole(self) -> bool:
        return self.index == () and (self.start, self.stop, self.step) == (0, None, 1) and not self.transposed

    @property
    def in_rows(self) -> bool:
        """Whether its rows stand one after the other as they are stored."""
        return self.step == 1 and not self.transposed

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """The part's shape, given the whole tensor's spec."""
        shape = spec.shape[len(self.index) :]
        if self.transposed:
            shape = (*reversed(shape[:2]), *shape[2:])
        if not shape:
            return shape
        return (len(range(*slice(self.start, self.stop, self.step).indices(shape[0]))), *shape[1:])


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The same rows of every head of a matrix [heads * rows, in], as a matrix of its own.

    of            module name of the whole matrix
    heads         how many it has
    start, stop   which rows of each head
    turned        whether each head's rows are turned: [heads * in, stop - start], else [heads * (stop - start), in]
    """

    of: str
    heads: int
    start: int
    stop: int
    turned: bool = False

    def shape(self, width: int) -> tuple[int, int]:
        """[out, in] of the part, of a matrix whose rows are so wide."""
        rows = self.stop - self.start
        return (self.heads * width, rows) if self.turned else (self.heads * rows, width)

    def width(self, shape: tuple[int, int]) -> int:
        """How wide the rows of the whole matrix are, of which a part has this shape."""
        return shape[0] // self.heads if self.turned else shape[1]

    def take(self, whole: Tensor) -> Tensor:
        """The part, of the whole matrix."""
        part = self._view(whole)
        return (part.transpose(1, 2) if self.turned else part).reshape(self.shape(whole.shape[1]))

    def put(self, part: Tensor, whole: Tensor) -> None:
        """The inverse of `take`: the numbers of a part go to their places in the whole matrix."""
        target = self._view(whole)
        if self.turned:
            target = target.transpose(1, 2)
        target.copy_(part.reshape(target.shape))

    def _view(self, whole: Tensor) -> Tensor:
        return whole.view(self.heads, -1, whole.shape[1])[:, self.start : self.stop]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How a layer lies in the checkpoint it is read from.

    format   the name of the Format that unpacks it, "plain" for a float matrix, or "joined" for one that lies there in
             several matrices (`Cut`)
    scheme   the grid it is on there; None for "plain"
    parts    part name as the format calls it ("weight", "weight_scale_inv", "qweight") -> where it is
    permuted whether columns of a group may lie anywhere, as its group index says
    cut      which part of what is decoded is the layer; None: all of it
    """

    format: str = "plain"
    scheme: Scheme | None = None
    parts: Mapping[str, Piece] = field(default_factory=dict)
    permuted: bool = False
    cut: Cut | None = None

    def part(self, decoded: Tensor) -> Tensor:
        """The layer's weights, of what its parts decode to."""
        return decoded if self.cut is None else self.cut.take(decoded)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One linear weight [out, in].

    name     its module path in the written checkpoint ("model.layers.0.mlp.experts.3.up_proj")
    shape    (out, in)
    dtype    the source's dtype of the float weight ("BF16"); for a packed source what it decodes to
    scheme   the grid it is to be on
    stored   how it lies in the source
    bias     the bias tensor's name in the checkpoint, if the layer has one
    role     "expert" for a routed expert's matrix, "head" for the output head, else "linear"
    permuted whether its groups' columns need not lie side by side, so that the format has to store a group index
    cut      which part of which matrix of the model it is, where the format stores that one in parts; None: it is whole
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    scheme: Scheme
    stored: Stored
    bias: str | None = None
    role: str = "linear"
    permuted: bool = False
    cut: Cut | None = None

    @property
    def moves(self) -> bool:
        """Whether it is stored on a grid whose numbers the one it is to be on can hold, groups included, so that codes
        move over without rounding. Whether it holds these very numbers shows only when they are read (`regrid`)."""
        stored = self.stored.scheme
        if stored is None or self.stored.cut is not None or self.stored.permuted > self.permuted:
            return False
        return obstacle(stored.weight, self.scheme.weight, self.shape) is None

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def tensor(self) -> str:
        """The name of its weight as a tensor."""
        return self.name + ".weight"


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A tensor that writes a space's channels, one along its first axis: a norm's weight, a layer's rows, a bias.

    offset   what the module adds to the stored numbers before it uses them: 1.0 for norms that scale by 1 + weight
    start    the row that writes the first channel: values stand behind queries and keys in a fused matrix
    run, step   channels stand in runs of `run` rows, each beginning `step` rows after the one before (the values of
             latent attention); 0 where all stand together
    """

    tensor: str
    offset: float = 0.0
    start: int = 0
    run: int = 0
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Space:
    """A channel basis inside a unit. Dividing what every writer writes by s, and multiplying the columns of every
    reader by s, changes nothing but rounding (a diagonal map, s > 0 per channel).

    name      as reports call it: the writer's module ("model.layers.0.input_layernorm")
    size      channels
    writers   all tensors that write the channels (a linear layer's weight and its bias are two)
    readers   module names of all matrices [out, in] that read them: rounded layers, and routers that stay
    parent    the module whose output shows what rounding the readers costs ("model.layers.0.self_attn"); it holds all
              readers, or is the only one
    head, repeat   for values under grouped-query attention: channels stand in heads of `head`, and a reader's inputs
              repeat every head `repeat` times; 0 and 1 where a reader's columns are the channels themselves
    """

    name: str
    size: int
    writers: tuple[Writer, ...]
    readers: tuple[str, ...]
    parent: str
    head: int = 0
    repeat: int = 1

    def columns(self, scale: Tensor) -> Tensor:
        """A scale per channel [size] -> a scale per input column of a reader [size * repeat]."""
        if self.repeat == 1:
            return scale
        return scale.view(-1, 1, self.head).expand(-1, self.repeat, -1).reshape(-1)


Stream = Literal["quantized", "float", "target"]


class Decodable(Protocol):
    """A matrix that is made when it is needed: one that is rounded (`QuantizedTensor`), or being learned."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""

    def decode(self) -> Tensor:
        """The float32 weights [out, in]."""


class Activations(Protocol):
    """What enters a unit, and the unit as a function of its weights.

    Three streams of hidden states [samples, tokens, hidden]: "quantized" is what earlier units, rounded, hand on;
    "float" is what they would hand on unrounded; "target" is this unit's unrounded output on "float". Where a plan
    keeps one stream, "quantized" and "float" are the same. Weights are given by tensor name, as `Unit.weights` has
    them, or as what they can be decoded from; names that are left out are taken from the unit's own.
    """

    @property
    def samples(self) -> int:
        """How many samples there are."""

    @property
    def tokens(self) -> int:
        """Tokens of one sample."""

    @property
    def batch(self) -> int:
        """Samples of a step of learning."""

    @property
    def part(self) -> int:
        """Samples to run together where only outputs count, for the sake of memory; at most `batch`."""

    def inputs(self, samples: Sequence[int], stream: Stream = "quantized") -> Tensor:
        """[len(samples), tokens, hidden], on the unit's device, in the dtype it computes in."""

    def forward(self, x: Tensor, weights: Mapping[str, Tensor | Decodable]) -> Tensor:
        """The unit's output on x [any number of samples, tokens, hidden]. Differentiable in x and in weights."""

    def observe(
        self,
        see: Callable[[str, Tensor], None],
        weights: Mapping[str, Tensor | Decodable],
        *,
        modules: Collection[str] | None = None,
        stream: Stream = "quantized",
        every_expert: bool = False,
    ) -> None:
        """Run every input once, without gradients; call see(module name, x [tokens, in]) for what enters each linear.

        modules        only these; None: the unit's layers. Routers and other matrices that stay may be asked for
        every_expert   send all tokens to all experts for `see`; outputs do not change
        """

    def calls(self, module: str, samples: Sequence[int], stream: Stream = "float") -> Call:
        """What enters a module of the unit on these samples: its arguments, to be run again by `call`."""

    def call(self, call: Call, weights: Mapping[str, Tensor | Decodable]) -> Tensor:
        """The module's output (the first one, where there are several) with other weights."""

    def tick(self, done: float, text: str) -> None:
        """Tell whoever watches how far the unit is (0 to 1) and what the loss is."""


@dataclass(frozen=True)
class Inputs:
    """What entered a layer: the mean square of each channel [in] float32, and over how many tokens; None: unknown."""

    mean_square: Tensor
    tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a module inside a unit, caught: positional and named arguments as they were."""

    module: str
    arguments: tuple[object, ...]
    named: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The smallest group of weights that must be in memory together: a layer, or a decoder block.

    name         "model.layers.3", or the layer's name
    layers       the matrices to be rounded
    weights      float tensors by tensor name ("model.layers.3.mlp.up_proj.weight"): every layer's [out, in] matrix, in
                 float32 or in the 16 bits it is stored in; and in a decoder block also what stays (norms, biases,
                 routers), in float32
    spaces       where a transform may act, proven on this unit
    activations  None unless an algorithm or a transform of the plan reads them
    reach        layer name -> the largest magnitude that the scale of its whole matrix has to cover, where runtimes ask
                 several matrices for one such scale (NVFP4); other layers are not in it
    known        what is known of layers' inputs without looking: layer name -> mean squares, from a file
    """

    name: str
    layers: tuple[Layer, ...]
    weights: Mapping[str, Tensor]
    spaces: tuple[Space, ...] = ()
    activations: Activations | None = None
    reach: Mapping[str, float] = field(default_factory=dict)
    known: Mapping[str, Inputs] = field(default_factory=dict)

    def weight(self, layer: Layer) -> Tensor:
        """A layer's matrix [out, in] in float32."""
        return self.weights[layer.tensor].float()

    def entering(self) -> Activations:
        """The activations of a unit that must have them."""
        assert self.activations is not None, f"{self.name} has no activations"
        return self.activations
