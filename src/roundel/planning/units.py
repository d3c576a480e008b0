"""Pieces of work joined to decoder blocks, for steps that look at what runs through these."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from roundel.checkpoint import Checkpoint
from roundel.errors import PlanError
from roundel.families import attention_of, text_config
from roundel.families.spaces import spaces_of
from roundel.formats import Format
from roundel.formats.format import CACHE_PARTS
from roundel.planning.plan import Work

__all__ = ["check_measured", "in_units", "not_rescaled", "with_caches"]


def in_units(works: Sequence[Work], checkpoint: Checkpoint, together: int) -> tuple[Work, ...]:
    """Everything of `together` decoder blocks as one piece of work, and the output head where it is rounded: what
    stands apart from the blocks first, then the blocks in order."""
    blocks: dict[tuple[str, int], list[Work]] = {}
    apart: list[Work] = []
    heads: list[Work] = []
    layers_in_blocks = _block_count(checkpoint.source.config)
    for work in works:
        tried = (re.match(rf"({re.escape(path)})\.(\d+)\.", work.name) for path in checkpoint.family.blocks)
        found = next((match for match in tried if match), None)
        if found is not None and (layers_in_blocks is None or int(found[2]) < layers_in_blocks):
            blocks.setdefault((found[1], int(found[2])), []).append(work)
        elif work.kind == "round" and work.layer is not None and work.layer.role == "head":
            heads.append(work)
        else:
            apart.append(work)
    units: list[Work] = []
    in_order = sorted(blocks)
    for path in dict.fromkeys(path for path, _ in in_order):
        indices = [index for p, index in in_order if p == path]
        for start in range(0, len(indices), together):
            part = indices[start : start + together]
            name = f"{path}.{part[0]}" + (f"-{part[-1]}" if len(part) > 1 else "")
            inside = [work for index in part for work in blocks[path, index]]
            units.append(_unit(name, inside, [f"{path}.{index}" for index in part]))
    return (*apart, *units, *(_unit(work.name, [work], [work.name]) for work in heads))


def _unit(name: str, works: Sequence[Work], blocks: Sequence[str]) -> Work:
    return Work(
        name=name,
        blocks=tuple(blocks),
        kind="unit",
        copies=tuple(c for w in works for c in w.copies),
        layers=tuple(w.layer for w in works if w.kind == "round" and w.layer is not None),
        decodes=tuple(w.layer for w in works if w.kind == "decode" and w.layer is not None),
        shards=tuple(dict.fromkeys(s for w in works for s in w.shards)),
    )


def _block_count(config: Mapping[str, object]) -> int | None:
    count = text_config(config).get("num_hidden_layers", config.get("num_hidden_layers"))
    return count if isinstance(count, int) else None


def check_measured(works: Sequence[Work]) -> None:
    """Inputs are measured where tokens run through blocks."""
    apart = [w.layer for w in works if w.kind == "round" and w.layer is not None and w.layer.scheme.stores_input_scale]
    if apart:
        raise PlanError(
            f"{apart[0].name} stands outside the decoder blocks, where no inputs are measured, and "
            f"{apart[0].scheme.name} stores a scale of them. Keep it with --ignore-layers, or choose a scheme that "
            "scales inputs at run time, such as FP8_DYNAMIC."
        )


def not_rescaled(works: Sequence[Work], checkpoint: Checkpoint, transforms: str) -> tuple[str, ...]:
    """What to know of decoder blocks in which transforms find nothing to rescale: at most one sentence."""
    config = checkpoint.source.config
    bare: list[str] = []
    for work in works:
        if work.kind == "unit" and not any(layer.role == "head" for layer in work.layers):
            shapes: dict[str, tuple[int, ...]] = {layer.tensor: layer.shape for layer in (*work.layers, *work.decodes)}
            shapes |= {copy.spec.name: copy.spec.shape for copy in work.copies}
            bare += [block for block in work.blocks if not spaces_of(checkpoint.family, block, shapes, config)]
    if not bare:
        return ()
    more = f" (and {len(bare) - 1} more)" if bare[1:] else ""
    return (
        f"{transforms}: no rule for {checkpoint.family.name} models names channels of {bare[0]}{more} that can be "
        "rescaled, so none are",
    )


def with_caches(works: Sequence[Work], formats: Sequence[Format]) -> tuple[Work, ...]:
    """The works, their attention modules named. Scales that the source has are measured anew."""
    problems = [
        f"{f.name} has no place for scales of keys and values that its readers look at, which --kv-cache asks for. "
        "Use format llm_compressor, or leave --kv-cache out."
        for f in formats
        if not f.caches
    ]
    found: list[Work] = []
    for work in works:
        if work.kind != "unit" or any(layer.role == "head" for layer in work.layers):
            found.append(work)
            continue
        names = [layer.name for layer in (*work.layers, *work.decodes)] + [c.spec.name for c in work.copies]
        modules = tuple(dict.fromkeys(module for name in names if (module := attention_of(name))))
        if not modules:
            problems.append(
                f"{work.name} has no keys and values of its own (k_proj and v_proj, or qkv_proj), as with latent "
                "attention. Leave --kv-cache out."
            )
        again = {f"{module}.{part}" for module in modules for part in CACHE_PARTS}
        kept = tuple(copy for copy in work.copies if copy.spec.name not in again)
        found.append(replace(work, caches=modules, copies=kept))
    if problems:
        raise PlanError(problems)
    return tuple(found)
