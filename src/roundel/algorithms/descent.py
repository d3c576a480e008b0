"""The loop of SignRound: run the unit on learned weights, go back through it, step. What a step does to a matrix is in
`roundel.ops.learned_descent`; the hyperparameters are the fields of `SignRound`.

A matrix is rounded when its layer runs, and once more on the way back; it steps as soon as its gradient is there. So
beside the weights as they are stored a unit holds their shifts, and of one layer at a time the rounded weights and
their gradient.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from roundel.algorithms.algorithm import Rounded
from roundel.algorithms.inputs import Inputs, mean_squares
from roundel.ops.encode import encode
from roundel.ops.learned_descent import descend, remember
from roundel.ops.learned_rounding import Learned, begin, finish, fit_range, round_matrix
from roundel.ops.search import search
from roundel.ops.unbiased import unbiased
from roundel.tensor import QuantizedTensor
from roundel.unit import Decodable, Layer, Stream, Unit

if TYPE_CHECKING:
    from roundel.algorithms.signround import SignRound

__all__ = ["learn"]

MEASURED = 32  # samples on which states are compared
PLAIN_WON = "plain rounding: nothing that was learned has a lower error"
STATES = 4  # how many are, evenly over the steps; the last is one of them


def learn(unit: Unit, how: SignRound) -> dict[str, Rounded]:
    """Codes for all layers of a unit: the state of lowest error among plain rounding, the start and what was learned.

    The error of a layer is its unit's: the mean squared difference of output and target, over at most MEASURED samples,
    evenly chosen. With keep_best False the last state is taken whatever its error.
    """
    inputs = mean_squares(unit, _stream(how))
    plainly = {layer.name: _plainly(unit, layer, how) for layer in unit.layers}
    kept: Mapping[str, QuantizedTensor] = plainly
    baseline = best = _error(unit, how, plainly)
    fallbacks = {layer.name: _fallback(layer, inputs, how) for layer in unit.layers}
    matrices = [
        _Matrix(layer, how, _begin(unit, layer, how, inputs, plainly), moves=fallbacks[layer.name] is None)
        for layer in unit.layers
    ]
    del plainly
    learned = False
    for state in _states(unit, how, matrices):
        error = _error(unit, how, state)
        if error < best or not how.keep_best:
            best, kept, learned = error, state, True
    return {
        layer.name: Rounded(
            tensor=kept[layer.name],
            error=best,
            baseline=baseline,
            tokens=inputs[layer.name].tokens if layer.name in inputs else 0,
            inputs=inputs.get(layer.name),
            fallback=fallbacks[layer.name] or (None if learned else PLAIN_WON),
        )
        for layer in unit.layers
    }


def _stream(how: SignRound) -> Stream:
    return "quantized" if how.quantized_inputs else "float"


def _fallback(layer: Layer, inputs: Mapping[str, Inputs], how: SignRound) -> str | None:
    tokens = inputs[layer.name].tokens if layer.name in inputs else 0
    if tokens is None or tokens >= how.min_tokens:
        return None
    seen = f"{tokens} tokens reached it, fewer than {how.min_tokens}" if tokens else "no token reached it"
    return f"{seen}: it is rounded as learning would have started"


def _plainly(unit: Unit, layer: Layer, how: SignRound) -> QuantizedTensor:
    """Rounded to nearest, on scales of the dtype that is asked for."""
    found = encode(unit.weight(layer), layer.scheme.weight)
    if how.scale_dtype == "float16" or not layer.scheme.weight.is_plain_integer:
        return found
    return finish(begin(unit.weights[layer.tensor].contiguous(), found, narrow=True))


def _begin(
    unit: Unit,
    layer: Layer,
    how: SignRound,
    inputs: Mapping[str, Inputs],
    plainly: Mapping[str, QuantizedTensor],
) -> Learned:
    start, weight, grid = plainly[layer.name], unit.weights[layer.tensor], layer.scheme.weight
    few = layer.scheme.bits <= 2 and grid.rule != "ggml"
    if how.start == "search" or (how.start == "auto" and not (few and not grid.symmetric)):
        importance = inputs[layer.name].mean_square if layer.name in inputs else None
        start = search(unit.weight(layer), grid, importance, torch.get_num_threads()).tensor
        if few and grid.is_plain_integer:
            start = unbiased(weight, start, importance)
    return begin(weight.contiguous(), start, narrow=how.scale_dtype == "bfloat16")


def _states(unit: Unit, how: SignRound, matrices: Sequence[_Matrix]) -> Iterator[Mapping[str, QuantizedTensor]]:
    """What is to be compared: the start, and STATES on the way; with keep_best False, only the last."""
    compared = {round(how.iters * i / STATES) for i in range(STATES + 1)} if how.keep_best else {how.iters}
    for step in _descent(unit, how, matrices):
        if step in compared:
            yield {matrix.layer.name: finish(matrix.learned) for matrix in matrices}


def _descent(unit: Unit, how: SignRound, matrices: Sequence[_Matrix]) -> Iterator[int]:
    """Take the steps one by one, changing what is learned; yields how many are done, from 0 on."""
    entering = unit.entering()
    batch = min(how.batch_size, entering.samples)
    size = min(batch * how.gradient_accumulation, entering.samples)
    part = 1 if how.low_memory else min(batch, entering.part)
    drawn = _draw(entering.samples, size, how.seed)
    yield 0
    for step in range(how.iters):
        for matrix in matrices:
            matrix.prepare(_decay(how.schedule, step / how.iters))
        started = time.perf_counter()
        loss = _backward(unit, how, matrices, next(drawn), part)
        speed = size * entering.tokens / (time.perf_counter() - started)
        entering.tick((step + 1) / how.iters, f"loss {loss:.4g}, {speed:,.0f} tokens/s")
        yield step + 1


class _Matrix:
    """A layer whose rounding is learned: decodes to its rounded weights, and moves along their gradient.

    moves     whether it steps at all
    is_last   whether the pass is the last of a step, so that the gradient is whole once all its uses have answered
    """

    def __init__(self, layer: Layer, how: SignRound, learned: Learned, *, moves: bool) -> None:
        self.layer, self.learned, self.moves = layer, learned, moves
        self.rate, self.range_rate = how.rates(layer)
        self.memory = remember(learned) if how.optimizer == "adam" else None
        self.steps, self.uses, self.is_last = 0, 0, True
        self.gradient: Tensor | None = None
        self._anchor = torch.zeros((), dtype=torch.float32, device=learned.weight.device, requires_grad=True)

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.shape

    def decode(self) -> Tensor:
        """The rounded weights [out, in] float32; going back through them ends in `take`."""
        rounded: Tensor = _Rounding.apply(self._anchor, self)  # type: ignore[no-untyped-call]
        return rounded

    def rounded(self) -> Tensor:
        return round_matrix(self.learned, self.range)

    def prepare(self, decay: float) -> None:
        """For a step whose sizes are `decay` times the first."""
        self.decay, self.uses, self.range = decay, 0, fit_range(self.learned)

    def take(self, gradient: Tensor) -> None:
        """The gradient [out, in] of one use; once all have come, step."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient
        self.uses -= 1
        if self.uses == 0 and self.is_last:
            self.move()

    def move(self) -> None:
        """Step along the gradient, and let it go; without one, no token reached the layer."""
        gradient, self.gradient = self.gradient, None
        if gradient is None or not self.moves:
            return
        self.steps += 1
        descend(
            self.learned,
            self.range,
            gradient,
            rate=self.rate * self.decay,
            range_rate=self.range_rate * self.decay,
            memory=self.memory,
            step=self.steps,
        )


Alive = dict[int, tuple["weakref.ref[Tensor]", _Matrix]]  # where rounded weights are, while they are there


class _Rounding(torch.autograd.Function):
    """A matrix' rounded weights; the anchor makes them part of the graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, matrix: _Matrix) -> Tensor:
        ctx.matrix = matrix
        matrix.uses += 1
        return matrix.rounded()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.matrix.take(gradient)
        return None, None


class _Noted:
    """A matrix, and a note of where its rounded weights are while they are used."""

    def __init__(self, matrix: _Matrix, alive: Alive) -> None:
        self.matrix, self.alive, self.shape = matrix, alive, matrix.shape

    def decode(self) -> Tensor:
        rounded = self.matrix.decode()
        self.alive[rounded.untyped_storage().data_ptr()] = weakref.ref(rounded), self.matrix
        return rounded


def _forgotten(matrices: Sequence[_Matrix]) -> tuple[dict[str, Decodable], saved_tensors_hooks]:
    """Weights for a pass, and what is to be entered meanwhile: rounded weights are then not kept for the way back, but
    rounded again there."""
    alive: Alive = {}

    def pack(saved: Tensor) -> object:
        found = alive.get(saved.untyped_storage().data_ptr())
        if found is None or found[0]() is None:  # none of them, or in the memory of one that is gone
            return saved
        return found[1], saved.shape, saved.stride()

    def unpack(packed: object) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        assert isinstance(packed, tuple)
        matrix, shape, stride = packed
        rounded: Tensor = matrix.rounded().as_strided(shape, stride)
        return rounded

    return {m.layer.tensor: _Noted(m, alive) for m in matrices}, saved_tensors_hooks(pack, unpack)


def _backward(unit: Unit, how: SignRound, matrices: Sequence[_Matrix], samples: Sequence[int], part: int) -> float:
    """The mean squared error over `samples`, run `part` at a time; every matrix moves once its gradient is whole."""
    entering, total = unit.entering(), 0.0
    for start in range(0, len(samples), part):
        some = samples[start : start + part]
        for matrix in matrices:
            matrix.is_last = start + part >= len(samples)
        target = entering.inputs(some, "target").float()
        weights, hooks = _forgotten(matrices)
        with hooks:
            output = entering.forward(entering.inputs(some, _stream(how)), weights)
            loss = (output.float() - target).square().mean()
        # Summed over channels, so that gradients by single weights stay far from the least float32.
        (loss * (output.shape[-1] * len(some) / len(samples))).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) * len(some) / len(samples)
    for matrix in matrices:
        matrix.move()  # an expert that earlier parts reached and the last did not
    return total


@torch.no_grad()
def _error(unit: Unit, how: SignRound, state: Mapping[str, QuantizedTensor]) -> float:
    """The mean squared difference of output and target on the measured samples."""
    entering = unit.entering()
    weights = {layer.tensor: state[layer.name] for layer in unit.layers}
    count = min(MEASURED, entering.samples)
    chosen = [entering.samples * i // count for i in range(count)]
    part = 1 if how.low_memory else entering.part
    total = 0.0
    for start in range(0, count, part):
        some = chosen[start : start + part]
        output = entering.forward(entering.inputs(some, _stream(how)), weights)
        total += float((output.float() - entering.inputs(some, "target").float()).square().mean()) * len(some)
    return total / count


def _draw(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """`size` of `count` samples again and again: shuffled, in turn; what does not fill a last draw is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def _decay(schedule: str, done: float) -> float:
    """What is left of the first step size when `done` of all steps are taken."""
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
