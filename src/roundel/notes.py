"""What the user should know of a plan before it is carried out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from roundel.checkpoint import Checkpoint, Matrix
from roundel.recipe import Recipe
from roundel.unit import Layer

__all__ = ["notes_of"]


def notes_of(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layers: Sequence[Layer],
    matrices: Mapping[str, Matrix],
    demoted: Mapping[str, str],
    untied: bool,
) -> tuple[str, ...]:
    """The notes of a plan for these layers of these matrices. demoted, untied: as the plan has them."""
    notes = [f"fallback: {name} stays in full precision: {reason}" for name, reason in demoted.items()]
    if checkpoint.family.guess:
        notes.append(
            f"no family is named after model_type {checkpoint.source.config.get('model_type')!r}: the general "
            f"rules decide what is a linear layer"
        )
    notes += _of_the_wish(recipe)
    for layer in layers:
        reason = matrices[layer.name].reason
        if reason is None or layer.role == "head" or layer.stored.scheme is not None:
            continue
        if layer.scheme.weight.rule == "range":
            notes.append(f"{layer.name} is rounded because it is named exactly; by rule it stays ({reason})")
    if untied:
        notes.append(
            "the output head is rounded, so it no longer shares the embedding's tensor: tie_word_embeddings "
            "becomes false"
        )
    same = sum(layer.moves for layer in layers)
    if same:
        notes.append(
            f"{same} layers are stored on grids within the asked ones: their codes are moved over without rounding"
        )
    notes += _changes(layers)
    if checkpoint.dropped:
        kinds = Counter(name.rpartition(".")[2] for name in checkpoint.dropped)
        notes.append(
            f"{len(checkpoint.dropped)} tensors of the source's own format are not needed any more ("
            f"{', '.join(f'{count} {kind}' for kind, count in kinds.items())}), such as {checkpoint.dropped[0]}"
        )
    odd = [layer for layer in layers if layer.shape[1] % layer.scheme.weight.block_of(layer.shape)[1]]
    if odd:
        notes.append(
            f"{len(odd)} layers have a short last group, such as {odd[0].name} {list(odd[0].shape)}: not every "
            f"runtime loads these"
        )
    return tuple(notes)


def _of_the_wish(recipe: Recipe) -> list[str]:
    """What a recipe's steps make of what stands beside them, and of the numbers that a report gives."""
    found = []
    transforms = " and ".join(step.name for step in recipe.chain.transforms)
    if transforms:
        found.append(
            f"signal to noise compares with the source's weights, which {transforms} rescales: it may be low, even "
            "below 0 dB, where nothing is lost"
        )
    if recipe.dataset != Recipe.dataset and not recipe.reads_activations and recipe.conversion is None:
        found.append(f"{recipe.algorithm} looks at no data: {recipe.dataset} is not read")
    return found


def _changes(layers: Sequence[Layer]) -> list[str]:
    """What becomes of layers that are quantized already, beside their codes: (before, after) -> how many."""
    anew: Counter[tuple[str, str]] = Counter()
    wider: Counter[tuple[str, str]] = Counter()
    inputs: Counter[tuple[str, str]] = Counter()
    for layer in layers:
        stored, asked = layer.stored.scheme, layer.scheme
        if stored is None:
            continue
        names = stored.name, asked.name
        if not layer.moves:
            anew[names] += 1
        elif asked.bits > stored.bits:
            wider[names] += 1
        if (asked.input, asked.dynamic) != (stored.input, stored.dynamic):
            inputs[names] += 1
    return [
        *(f"{count} layers are rounded anew, {old} to {new}" for (old, new), count in anew.items()),
        *(f"{count} layers take more bits for the same numbers, {old} to {new}" for (old, new), count in wider.items()),
        *(f"inputs of {count} layers are treated otherwise, {old} to {new}" for (old, new), count in inputs.items()),
    ]
