"""What a run over decoder blocks will take: bytes of activations and memory, and time, after a short measured probe.

The probe runs one block on a few tokens, with random numbers in place of its weights. Every step says how many passes
over all samples it costs; the rest is multiplication. Kernels that look at weights only are small beside passes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from roundel.checkpoint import Checkpoint
from roundel.planning import Plan, Work
from roundel.planning.room import frontier_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from roundel.calibration.skeleton import Block

__all__ = ["Estimate", "estimate"]

PROBE_TOKENS = 256
PROBE_SECONDS = 1.0  # repeated until this long has passed


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is foreseen.

    seconds       of the whole run; None where the model cannot be probed
    activations   bytes that lie between blocks, in memory or on disk
    probe         seconds that finding out took
    """

    seconds: float
    activations: int
    probe: float


def estimate(plan: Plan, checkpoint: Checkpoint, trust_remote_code: bool = False) -> Estimate:
    """Raises PlanError when the model cannot be run block by block, SourceError when a tensor has another shape."""
    import torch

    from roundel.calibration.skeleton import Skeleton

    started = time.perf_counter()
    recipe, tokens = plan.recipe, plan.tokens
    skeleton = Skeleton.of(checkpoint, trust_remote_code=trust_remote_code)
    units = [work for work in plan.works if work.kind == "unit"]
    first = next(block for block in skeleton.blocks if block.name == units[0].blocks[0])
    shown = min(tokens, PROBE_TOKENS)
    entry = {name: _random(checkpoint, name) for name in skeleton.entry_tensors}
    states = skeleton.enter(torch.zeros((1, shown), dtype=torch.int64), entry)
    per_token = _seconds(first, {name: _random(checkpoint, name) for name in first.tensors}, states) / shown
    passes = 1.0 + recipe.chain.reads_float_stream  # to move on
    passes += sum(step.passes(recipe.nsamples, recipe.together) for step in recipe.chain.steps)
    size = sum(_weights(work) for work in units) * len(units[0].blocks) / max(1, _weights(units[0]))
    return Estimate(
        seconds=per_token * recipe.nsamples * tokens * passes * size,
        activations=frontier_bytes(plan, skeleton.hidden, recipe.nsamples, tokens),
        probe=time.perf_counter() - started,
    )


def _weights(work: Work) -> int:
    return sum(layer.parameters for layer in (*work.layers, *work.decodes))


def _seconds(block: Block, weights: Mapping[str, Tensor], states: Tensor) -> float:
    """The fastest of a few runs; the first one, which warms up, does not count."""
    import torch

    best, begun = float("inf"), time.perf_counter()
    with torch.no_grad():
        block.forward(states, weights)
        while best == float("inf") or time.perf_counter() - begun < PROBE_SECONDS:
            started = time.perf_counter()
            block.forward(states, weights)
            best = min(best, time.perf_counter() - started)
    return best


def _random(checkpoint: Checkpoint, name: str) -> Tensor:
    import torch

    return torch.randn(checkpoint.shape(name), generator=torch.Generator().manual_seed(0)) * 0.02
