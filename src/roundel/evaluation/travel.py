"""Windows through a model larger than memory: every block over all of them before the next block is read.

What travels are hidden states, in memory or in a file. What leaves the last block stays there until the head is looked
at, for all models together, so that no logits are ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from roundel.calibration.activations import Frontier
from roundel.errors import NumericsError
from roundel.evaluation.judging import Verdict, judge
from roundel.evaluation.subject import Subject
from roundel.evaluation.text import Passage
from roundel.planning.room import PART_TOKENS
from roundel.unit import Decodable

__all__ = ["judged", "slab_bytes", "through_blocks"]

Tick = Callable[[int, str], None]  # weights times windows that have been done, and what is at hand
SLAB = 8 << 20  # logits of one model at once


def through_blocks(subject: Subject, passage: Passage, states: Frontier, tick: Tick) -> None:
    """Fill `states` with what leaves the model's last block, [windows, length, hidden].

    Raises SourceError for tensors that are broken, NumericsError for states that are not finite, OutputError when the
    disk is full.
    """
    skeleton, tokens = subject.skeleton, passage.windows
    pieces = [skeleton.entry_tensors, *(block.tensors for block in skeleton.blocks), skeleton.tail.tensors]
    entry = subject.tensors(skeleton.entry_tensors)
    for batch in _batches(len(tokens), passage.length):
        states.write(batch, skeleton.enter(tokens[list(batch)].to(subject.device), entry))
    del entry
    for number, block in enumerate(skeleton.blocks):
        weights = subject.tensors(block.tensors)
        size = sum(_size(weight) for weight in weights.values())
        with torch.no_grad():
            for batch in _batches(len(tokens), passage.length):
                made = block.forward(states.read(batch).to(subject.device), weights)
                if not bool(torch.isfinite(made).all()):
                    raise NumericsError(
                        f"{subject.name}: what {block.name} computes is not finite. A tensor of it is broken: fetch "
                        "or make the checkpoint again. `roundel verify` looks at every one."
                    )
                states.write(batch, made)
                tick(size * len(batch), f"{subject.name} {block.name}")
        del weights
        subject.drop_behind(pieces, number + 1)


def judged(
    subjects: Sequence[Subject], passage: Passage, states: Sequence[Frontier], tick: Tick
) -> Iterator[list[Verdict]]:
    """Of each window, a verdict on each model, the first being the reference."""
    ends = [subject.tensors(subject.skeleton.tail.tensors) for subject in subjects]
    heads = [_matrix(end.pop(subject.head)) for subject, end in zip(subjects, ends, strict=True)]
    rest = [{name: _matrix(tensor).float() for name, tensor in end.items()} for end in ends]
    rows = max(1, SLAB // passage.length)
    for number, window in enumerate(passage.windows):
        first = passage.first[number]
        device = subjects[0].device  # all are on the same
        entering = [frontier.read([number])[:, first - 1 : -1].to(device) for frontier in states]
        yield judge(_slabs(subjects, heads, rest, entering, rows), window[first:].to(device))
        tick(sum(_size(head) for head in heads), "predictions")


def slab_bytes(subjects: Sequence[Subject]) -> int:
    """Memory that the end takes: heads, a slab of each in float32, and logits with what is made of them."""
    heads = 0
    for subject in subjects:
        heads += subject.held_bytes(subject.skeleton.tail)
    return heads + 4 * SLAB * (len(subjects) + 3)


def _slabs(
    subjects: Sequence[Subject],
    heads: Sequence[Tensor],
    rest: Sequence[dict[str, Tensor]],
    entering: Sequence[Tensor],
    rows: int,
) -> Iterator[list[Tensor]]:
    """Logits [positions, at most rows] of each model."""
    with torch.no_grad():
        for start in range(0, subjects[0].vocabulary, rows):
            part = slice(start, start + rows)
            logits = []
            for subject, head, others, x in zip(subjects, heads, rest, entering, strict=True):
                bias = subject.head.removesuffix("weight") + "bias"
                weights: dict[str, Tensor | Decodable] = {**others, subject.head: head[part].float()}
                if bias in others:
                    weights[bias] = others[bias][part]
                logits.append(subject.skeleton.tail.forward(x, weights)[0].float())
            yield logits


def _batches(windows: int, length: int) -> Iterator[range]:
    """All windows in order, as many at a time as are fast."""
    part = max(1, PART_TOKENS // length)
    for start in range(0, windows, part):
        yield range(start, min(start + part, windows))


def _matrix(tensor: Tensor | Decodable) -> Tensor:
    return tensor if isinstance(tensor, Tensor) else tensor.decode()


def _size(tensor: Tensor | Decodable) -> int:
    return int(torch.Size(tensor.shape).numel())
