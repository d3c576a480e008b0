"""What stands in the files of a format: its tensors, those of experts in one, and whether their names go together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from roundel.choosing import Choice
from roundel.errors import PlanError
from roundel.formats import Format
from roundel.formats.format import CACHE_PARTS
from roundel.io.safetensors import stacked
from roundel.planning.plan import Work
from roundel.planning.works import tensors_of
from roundel.tensor import TensorSpec
from roundel.unit import Layer

__all__ = ["check_names", "check_stacks", "specs_of", "stacks_of"]


def specs_of(works: Sequence[Work], format: Format, order: Mapping[str, int]) -> list[TensorSpec]:
    """Every tensor of a format's files by its name in the plan, those of experts each by itself.

    order   of the source's tensors
    """
    placed: list[tuple[int, TensorSpec]] = []
    for work in works:
        first = min(order[tensor] for tensor in tensors_of(work))
        for layer in work.rounded:
            at = min(order[piece.tensor] for piece in layer.stored.parts.values())
            parts = format.outputs(layer)
            placed += [(at, TensorSpec(f"{layer.name}.{s.name}", s.dtype, s.shape)) for s in parts]
        placed += [
            (first, TensorSpec(f"{module}.{part}", "F32", (1,))) for module in work.caches for part in CACHE_PARTS
        ]
        decoded = work.decodes if work.layer is None or work.kind == "round" else (work.layer,)
        stay = [(first, TensorSpec(layer.tensor, layer.dtype, layer.shape)) for layer in decoded]
        stay += [(order[copy.piece.tensor], copy.spec) for copy in work.copies]
        placed += [(at, kept) for at, spec in stay if (kept := format.kept(spec)) is not None]
    if format.in_order:
        placed.sort(key=lambda found: found[0])  # stable
    extras = [TensorSpec(name, "F32", tuple(tensor.shape)) for name, tensor in format.extras().items()]
    return extras + [spec for _, spec in placed]


def stacks_of(layers: Sequence[Layer], format: Format) -> dict[str, tuple[str, int]]:
    """The tensors of experts that a format has in one, and where."""
    found: dict[str, tuple[str, int]] = {}
    for layer in layers:
        stack = format.stack(layer.name)
        if stack is not None:
            parts = [s.name for s in format.outputs(layer)] + ["bias"] * (layer.bias is not None)
            found |= {f"{layer.name}.{part}": (f"{stack[0]}.{part}", stack[1]) for part in parts}
    return found


def check_stacks(layers: Sequence[Layer], choices: Mapping[str, Choice], formats: Sequence[Format]) -> None:
    """Experts that share a tensor are all rounded, and alike."""
    schemes = {layer.name: layer.scheme for layer in layers}
    problems: list[str] = []
    for format in formats:
        stacks: dict[str, dict[int, str]] = {}
        for name in choices:
            stack = format.stack(name)
            if stack is not None:
                stacks.setdefault(stack[0], {})[stack[1]] = name
        for stack_name, members in stacks.items():
            kinds = Counter(schemes[name].name if name in schemes else "kept" for name in members.values())
            if len(kinds) > 1 or (set(members) != set(range(len(members))) and "kept" not in kinds):
                problems.append(
                    f"{format.name} holds the {len(members)} experts of {stack_name} in one tensor, and they are "
                    f"{', '.join(f'{count} {kind}' for kind, count in kinds.items())}. Give them one scheme."
                )
    if problems:
        raise PlanError(problems)


def check_names(works: Sequence[Work], formats: Sequence[Format], order: Mapping[str, int], source: str) -> None:
    """A file holds a name once, and a journal too."""
    layers = [layer for work in works for layer in work.rounded]
    files = [stacked(specs_of(works, f, order), stacks_of(layers, f)) for f in formats]
    for names in ([w.name for w in works], *([s.name for s in specs] for specs in files)):
        if len(set(names)) < len(names):
            double = Counter(names).most_common(1)[0][0]
            raise PlanError(
                f"{source} would need the name {double!r} twice: a tensor of this name is in the way of a layer's. "
                "Rename it, or keep the layer with --ignore-layers."
            )
