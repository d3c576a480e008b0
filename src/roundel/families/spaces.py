"""The spaces of one decoder block, from its family's rules and its tensors' names and shapes.

A rule that does not fit what is there (other widths, a missing neighbour) gives no space. What it gives is believed
only: `transforms.proof` tries every space on the real block before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from roundel.families import text_config
from roundel.families.family import Family, SpaceRule
from roundel.families.generic import SPACES
from roundel.unit import Space, Writer

__all__ = ["spaces_of"]

Shapes = Mapping[str, tuple[int, ...]]


def spaces_of(family: Family, block: str, tensors: Shapes, config: Mapping[str, object]) -> tuple[Space, ...]:
    """Where the channels of a decoder block may be rescaled, in the order data flows.

    block    the block's module name ("model.layers.0"); no tensor outside it is ever named by a space
    tensors  shapes by tensor name as `Unit.weights` has them: experts one by one, every matrix [out, in]
    config   config.json
    """
    inside = {n[len(block) + 1 :]: tuple(shape) for n, shape in tensors.items() if n.startswith(block + ".")}
    modules = [n.removesuffix(".weight") for n in inside if n.endswith(".weight")]
    found: dict[str, Space] = {}
    for rule in SPACES if family.spaces is None else family.spaces:
        if _fits(rule, text_config(config)):
            for writer, readers in _pairs(rule, modules):
                space = _space(rule, writer, readers, inside, family, text_config(config))
                if space is not None:
                    found[writer] = _merged(found[writer], space) if writer in found else space
    return tuple(_under(block, space) for space in found.values())


def _fits(rule: SpaceRule, config: Mapping[str, object]) -> bool:
    """Whether the config allows the rule at all. An MLP that clamps its channels ties them to their scale."""
    if rule.kind == "inner" and any(key.startswith("swiglu_limit") and value for key, value in config.items()):
        return False
    activation = config.get("activation_function", config.get("hidden_act"))
    return rule.activation is None or activation == rule.activation


def _pairs(rule: SpaceRule, modules: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(writer, its readers), for every writer that the first fruitful alternative names."""
    for pattern in rule.writers:
        matches = [m for m in (re.fullmatch(pattern, module) for module in modules) if m]
        if matches:
            pairs = [(m[0], m.groupdict().get("scope", "")) for m in matches]
            names = set(modules)
            return [
                (writer, tuple(m for m in _candidates(rule, scope, modules, names) if m != writer))
                for writer, scope in pairs
                if rule.beside is None or rule.beside.replace("{scope}", scope) in names
            ]
    return []


def _candidates(rule: SpaceRule, scope: str, modules: list[str], names: set[str]) -> list[str]:
    pattern = rule.readers.replace("{scope}", re.escape(scope))
    plain = rule.readers.replace("{scope}", scope).replace("\\.", ".")
    if plain in names:  # one reader, spelled out: hundreds of experts need no search through thousands of modules
        return [plain]
    return [module for module in modules if re.fullmatch(pattern, module)]


def _space(
    rule: SpaceRule, writer: str, readers: tuple[str, ...], inside: Shapes, family: Family, config: Mapping[str, object]
) -> Space | None:
    widths = {shape[1] for shape in (inside[f"{r}.weight"] for r in readers) if len(shape) == 2}
    if len(widths) != 1 or any(len(inside[f"{r}.weight"]) != 2 for r in readers):
        return None
    width, rows = widths.pop(), inside[f"{writer}.weight"][0]
    heads = config.get("num_attention_heads")
    shared = config.get("num_key_value_heads", heads)
    place = _place(
        rule.kind, rows, width, heads if isinstance(heads, int) else 0, shared if isinstance(shared, int) else 0
    )
    if place is None:
        return None
    size, layout = place
    repeat = width // size
    offset = rule.offset if rule.offset is not None else family.norm_offset if rule.kind == "norm" else 0.0
    writers = [replace(layout, tensor=f"{writer}.weight", offset=offset)]
    if f"{writer}.bias" in inside:
        writers.append(replace(layout, tensor=f"{writer}.bias"))
    head = 0 if repeat == 1 else size if rule.kind == "norm" else width // int(str(heads))
    return Space(
        name=writer, size=size, writers=tuple(writers), readers=readers, parent=_parent(writer, readers),
        head=head, repeat=repeat,
    )  # fmt: skip


def _place(kind: str, rows: int, width: int, heads: int, shared: int) -> tuple[int, Writer] | None:
    """(channels, where their rows are) for readers `width` wide and a writer of `rows` rows; None: they do not fit."""
    if kind == "norm":
        return (rows, Writer(tensor="")) if width % rows == 0 else None
    if kind == "inner":
        return (width, Writer(tensor="", start=rows - width)) if rows in (width, 2 * width) else None
    if not heads or not shared or width % heads or heads % shared:
        return None
    head = width // heads
    if kind == "values":
        size = shared * head
        return (size, Writer(tensor="", start=rows - size)) if rows in (size, width + 2 * size) else None
    step = rows // heads
    if rows % heads or step < head:
        return None
    return width, Writer(tensor="", start=step - head, run=head, step=step)


def _parent(writer: str, readers: tuple[str, ...]) -> str:
    """The module all readers are in; a lone reader itself, where its writer is in the same module; "" for the block."""
    paths = [reader.split(".")[:-1] for reader in readers]
    shared = paths[0]
    for path in paths[1:]:
        while path[: len(shared)] != shared:
            shared = shared[:-1]
    if shared and shared[-1] == "experts":  # a list, not a module that is called
        shared = shared[:-1]
    if len(readers) == 1 and writer.split(".")[: len(shared)] == shared:
        return readers[0]
    return ".".join(shared)


def _merged(first: Space, second: Space) -> Space:
    """One space whose writer two rules name: both rules' readers read it."""
    readers = tuple(dict.fromkeys((*first.readers, *second.readers)))
    return replace(first, readers=readers, parent=_parent(first.name, readers))


def _under(block: str, space: Space) -> Space:
    return replace(
        space,
        name=f"{block}.{space.name}",
        writers=tuple(replace(w, tensor=f"{block}.{w.tensor}") for w in space.writers),
        readers=tuple(f"{block}.{r}" for r in space.readers),
        parent=f"{block}.{space.parent}" if space.parent else block,
    )
