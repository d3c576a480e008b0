"""The loop of SignRound: round, run the unit, go back through it, step. What a step does to a matrix is in
`roundel.ops.learned_rounding`; the hyperparameters are the fields of `SignRound`.

A matrix steps as soon as its gradient is there, while that is still in cache, and the gradient is let go: beside the
weights a unit holds their shifts and rounded values, and one layer's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from roundel.algorithms.algorithm import Rounded
from roundel.ops.encode import encode
from roundel.ops.learned_rounding import Learned, begin, descend, finish, fit_range, remember, round_matrix
from roundel.ops.search import search
from roundel.tensor import QuantizedTensor
from roundel.unit import Layer, Stream, Unit

if TYPE_CHECKING:
    from roundel.algorithms.signround import SignRound

__all__ = ["learn"]

MEASURED = 32  # samples on which states are compared
STATES = 4  # how many are, evenly over the steps; the last is one of them


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What entered each layer: the sum of squares [in] of every input channel, float64, and the number of tokens."""

    squares: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, module: str, x: Tensor) -> None:
        found = x.float().square().sum(0).double()
        self.squares[module] = self.squares[module] + found if module in self.squares else found
        self.tokens[module] = self.tokens.get(module, 0) + x.shape[0]


def learn(unit: Unit, how: SignRound) -> dict[str, Rounded]:
    """Codes for all layers of a unit: the state of lowest error among plain rounding, the start and what was learned.

    The error of a layer is its unit's: the mean squared difference of output and target, over at most MEASURED samples,
    evenly chosen. With keep_best False the last state is taken whatever its error.
    """
    seen = _Seen()
    unit.entering().observe(seen.add, unit.weights, stream=_stream(how))
    rounded = {layer.tensor: torch.empty_like(unit.weight(layer)) for layer in unit.layers}
    plainly = {layer.name: encode(unit.weight(layer), layer.scheme.weight) for layer in unit.layers}
    kept: Mapping[str, QuantizedTensor] = plainly
    baseline = best = _error(unit, how, plainly, rounded)
    starts = {layer.name: _start(unit, layer, how, seen, plainly) for layer in unit.layers}
    for state in _states(unit, how, starts, rounded):
        error = _error(unit, how, state, rounded)
        if error < best or not how.keep_best:
            best, kept = error, state
    return {
        layer.name: Rounded(
            tensor=kept[layer.name],
            error=best,
            baseline=baseline,
            tokens=seen.tokens.get(layer.name, 0),
            fallback=_fallback(layer, seen, kept is plainly),
        )
        for layer in unit.layers
    }


def _stream(how: SignRound) -> Stream:
    return "quantized" if how.quantized_inputs else "float"


def _fallback(layer: Layer, seen: _Seen, plain_won: bool) -> str | None:
    if not seen.tokens.get(layer.name):
        return "no token reached it: it is rounded as learning would have started"
    return "plain rounding: nothing that was learned has a lower error" if plain_won else None


def _start(
    unit: Unit, layer: Layer, how: SignRound, seen: _Seen, plainly: Mapping[str, QuantizedTensor]
) -> QuantizedTensor:
    if how.start == "rtn":
        return plainly[layer.name]
    threads = torch.get_num_threads()
    return search(unit.weight(layer), layer.scheme.weight, seen.squares.get(layer.name), threads).tensor


def _states(
    unit: Unit, how: SignRound, starts: Mapping[str, QuantizedTensor], rounded: Mapping[str, Tensor]
) -> Iterator[Mapping[str, QuantizedTensor]]:
    """What is to be compared: the start, and STATES on the way; with keep_best False, only the last."""
    learned = {layer.name: begin(unit.weight(layer).contiguous(), starts[layer.name]) for layer in unit.layers}
    compared = {round(how.iters * i / STATES) for i in range(STATES + 1)} if how.keep_best else {how.iters}
    if 0 in compared:
        yield starts
    for step in _descent(unit, how, learned, rounded):
        if step in compared:
            yield {name: finish(each) for name, each in learned.items()}


def _descent(
    unit: Unit, how: SignRound, learned: Mapping[str, Learned], rounded: Mapping[str, Tensor]
) -> Iterator[int]:
    """Take the steps one by one, changing `learned` in place; yields how many are done.

    rounded   room for every layer's weights, by tensor name
    """
    entering = unit.entering()
    batch = min(how.batch_size or entering.batch, entering.samples)
    size = min(batch * how.gradient_accumulation, entering.samples)
    drawn = _draw(entering.samples, size, how.seed)
    movers = [_Mover(layer, how, learned[layer.name], rounded[layer.tensor]) for layer in unit.layers]
    for step in range(how.iters):
        for mover in movers:
            mover.prepare(_decay(how.schedule, step / how.iters))
        leaves = {name: each.detach().requires_grad_() for name, each in rounded.items()}
        loss = _backward(unit, how, leaves, movers, next(drawn), 1 if how.low_memory else batch)
        entering.tick((step + 1) / how.iters, f"loss {loss:.4g}")
        yield step + 1


class _Mover:
    """Moves one matrix' shift and factors along a gradient.

    rounded   room for its rounded weights
    """

    def __init__(self, layer: Layer, how: SignRound, learned: Learned, rounded: Tensor) -> None:
        self.tensor, self.learned, self.rounded = layer.tensor, learned, rounded
        self.rate, self.range_rate = how.rates(layer)
        self.memory = remember(learned) if how.optimizer == "adam" else None
        self.steps = 0

    def prepare(self, decay: float) -> None:
        """Fill `rounded` for a step whose sizes are `decay` times the first."""
        self.decay = decay
        self.range = fit_range(self.learned)
        round_matrix(self.learned, self.range, self.rounded)

    def move(self, leaf: Tensor) -> None:
        """Step along the gradient of `leaf`, and let it go; without one, no token reached the layer."""
        gradient, leaf.grad = leaf.grad, None
        if gradient is None:
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


def _backward(
    unit: Unit,
    how: SignRound,
    leaves: Mapping[str, Tensor],
    movers: Sequence[_Mover],
    samples: Sequence[int],
    part: int,
) -> float:
    """The mean squared error over `samples`, run `part` at a time; every matrix moves once its gradient is whole."""
    entering, total = unit.entering(), 0.0
    for start in range(0, len(samples), part):
        some = samples[start : start + part]
        if start + part >= len(samples):
            for mover in movers:
                leaves[mover.tensor].register_post_accumulate_grad_hook(mover.move)  # type: ignore[no-untyped-call]
        target = entering.inputs(some, "target").float()
        output = entering.forward(entering.inputs(some, _stream(how)), leaves)
        loss = (output.float() - target).square().mean()
        # Summed over channels, so that gradients by single weights stay far from the least float32.
        (loss * (output.shape[-1] * len(some) / len(samples))).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) * len(some) / len(samples)
    for mover in movers:
        mover.move(leaves[mover.tensor])  # an expert that earlier parts reached and the last did not
    return total


@torch.no_grad()
def _error(unit: Unit, how: SignRound, state: Mapping[str, QuantizedTensor], rounded: Mapping[str, Tensor]) -> float:
    """The mean squared difference of output and target on the measured samples. `rounded` is room for the weights."""
    entering = unit.entering()
    for layer in unit.layers:
        rounded[layer.tensor].copy_(state[layer.name].decode())
    count = min(MEASURED, entering.samples)
    chosen = [entering.samples * i // count for i in range(count)]
    part = 1 if how.low_memory else entering.part
    total = 0.0
    for start in range(0, count, part):
        some = chosen[start : start + part]
        output = entering.forward(entering.inputs(some, _stream(how)), rounded)
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
