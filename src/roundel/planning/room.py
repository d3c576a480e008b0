"""How much memory a plan takes, known before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence

from roundel.formats import Format
from roundel.fusion import SLAB_BYTES, fuses, goes_by_rows, slab_rows
from roundel.planning.plan import Plan, Work
from roundel.recipe import Recipe
from roundel.tensor import ITEMSIZE

__all__ = ["PART_TOKENS", "expected_peak", "frontier_bytes", "in_memory", "part_of", "unit_memory"]

COPY_FACTOR = 8  # of a slab of what is copied in another dtype: stored, in float32, and what it becomes
COPY_BYTES = 8 << 20  # a copy goes from file to file, at most through a buffer of this size
BASE_PLAIN = 141 << 20  # interpreter, numpy, numba, rich: measured
BASE_WITH_TORCH = 330 << 20  # the same with torch: measured
BASE_CALIBRATED = 480 << 20  # the same with transformers, a tokenizer and a model's class: measured
TOKENIZER_BYTES = 105 << 20  # of transformers, by which GGUF's vocabulary is read: measured
FLOAT_BYTES = 17  # for each weight of a matrix on its way through torch: stored, decoded thrice over, codes
PART_TOKENS = 2048  # run at once on CPU where only outputs count: more is not faster, and takes memory
EXPERTS_A_TOKEN = 4
KEPT_FORWARD = 0.6  # of what a unit's layers are given and hand on, at once: measured
KEPT_LEARNED = 2.0  # of the same, where it is kept for the way back: measured
COMPARED_BYTES = 24 << 20  # of float64, while a matrix is compared with what it became


def expected_peak(plan: Plan, workers: int, device: str = "cpu") -> int:
    """Bytes of memory the run is expected to reach, the interpreter and its libraries included. What lies between units
    comes on top, where it lies in memory."""
    algorithm, formats = plan.recipe.chain.algorithm, [o.format for o in plan.outputs]
    sizes, needs_torch, copied = [], device != "cpu", all(format.copies for format in formats)
    for work in plan.works:
        plain = work.kind == "copy" and copied and all(c.piece.is_whole for c in work.copies)
        layer = work.layer if work.kind == "round" else None
        fused = layer is not None and fuses(layer, formats, algorithm, device)
        needs_torch |= not (plain or fused)
        if not fused and layer is not None and goes_by_rows(layer, formats, algorithm, device):
            sizes.append(min(layer.parameters, SLAB_BYTES // ITEMSIZE[layer.dtype]) * FLOAT_BYTES)
        else:
            sizes.append(_working_bytes(work, formats, fused, plain))
    base = (BASE_WITH_TORCH if needs_torch else BASE_PLAIN) + (0 if copied else TOKENIZER_BYTES)
    if plan.recipe.reads_activations:
        base = BASE_CALIBRATED
    apart = sum(sorted(sizes, reverse=True)[:workers])
    return base + max(apart, sum(unit_memory(plan, device)))


def unit_memory(plan: Plan, device: str = "cpu") -> tuple[int, int]:
    """Bytes of the largest unit while it is worked on: of its weights, in all copies that the steps hold, and of
    the activations of the samples that run through it at once. What lies between units comes on top."""
    found = (0, 0)
    for work in plan.works:
        if work.kind == "unit":
            found = max(found, _unit_bytes(work, plan.recipe, plan.tokens, device), key=sum)
    return found


def frontier_bytes(plan: Plan, hidden: int, samples: int, tokens: int) -> int:
    """Bytes of activations that are held at once: each stream in front of a block and behind it."""
    each = samples * tokens * hidden * {"float32": 4, "bfloat16": 2}[plan.recipe.activation_dtype]
    return each * (4 if plan.recipe.chain.reads_float_stream else 2)


def in_memory(offload: str, activations: int, free: int) -> bool:
    """Whether what lies between units lies in memory: "ram", or "auto" where it fits into half of what is free."""
    return offload == "ram" or (offload == "auto" and activations < free // 2)


def part_of(recipe: Recipe, tokens: int, device: str) -> int:
    """Samples of so many tokens that are run at once where only outputs count."""
    return min(recipe.together, max(1, PART_TOKENS // tokens)) if device == "cpu" else recipe.together


def _unit_bytes(work: Work, recipe: Recipe, tokens: int, device: str) -> tuple[int, int]:
    """(weights, activations). Where a step learns, all that layers are given and hand on is kept for the way back; else
    the largest of it. Of experts about EXPERTS_A_TOKEN count."""
    layers = (*work.layers, *work.decodes)
    largest = max((layer.parameters for layer in layers), default=0)
    stored = sum(layer.parameters * ITEMSIZE[layer.dtype] for layer in layers)
    weights = stored + 4 * (recipe.chain.copies * sum(layer.parameters for layer in layers) + 2 * largest)
    experts = [sum(layer.shape) for layer in layers if layer.role == "expert"]
    width = sum(sum(layer.shape) for layer in layers if layer.role != "expert")
    width += 3 * EXPERTS_A_TOKEN * max(experts, default=0)
    part = part_of(recipe, tokens, device)
    learned = recipe.chain.learns_on(recipe.together, part)
    return int(weights), int(4 * tokens * width * max(KEPT_LEARNED * learned, KEPT_FORWARD * part))


def _working_bytes(work: Work, formats: Sequence[Format], fused: bool, plain: bool) -> int:
    """Bytes one piece of work holds at its peak: a slab and the packed parts, or matrices in float and in codes."""
    if plain:
        return COPY_BYTES
    if work.kind == "unit":
        return 0
    if work.layer is None:
        return max(
            COPY_FACTOR * min(c.spec.nbytes, SLAB_BYTES if c.piece.in_rows else c.spec.nbytes) for c in work.copies
        )
    layer = work.layer
    packed = sum(s.nbytes for f in formats for s in f.outputs(layer)) if work.kind == "round" else layer.parameters * 2
    if fused:
        codes = layer.shape[1] * min(slab_rows(layer), layer.shape[0])
        return packed + codes * (1 + ITEMSIZE[layer.dtype])
    return packed + layer.parameters * FLOAT_BYTES + COMPARED_BYTES
