"""Scales of keys and values in the cache that a checkpoint carries: whether they go along into other formats.

They are tensors of attention modules, beside a `kv_cache_scheme` in config.json that says how runtimes use them. One
FP8 scale for keys and one for values goes along where all formats that are written have a place for it. Everything else
(scales of queries, of heads, of blocks, integers) is left out, and said to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from roundel.checkpoint import Checkpoint
from roundel.formats import Format
from roundel.formats.format import CACHE_PARTS

__all__ = ["Carried", "cache_tensors", "carried_cache"]

_PARTS = (*CACHE_PARTS, "q_scale", "k_zero_point", "v_zero_point", "q_zero_point", "kv_scale", "k_global_scale",
          "v_global_scale", "q_global_scale")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What becomes of the scales of a cache.

    scheme   "fp8" where the source's own go along; None where it has none, or they do not
    left     tensors that are not written
    notes    what is lost, in words
    """

    scheme: str | None = None
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def cache_tensors(checkpoint: Checkpoint) -> list[str]:
    """The tensors of a checkpoint that say how keys, values and queries are rounded."""
    return [name for name in (*checkpoint.loose, *checkpoint.dropped) if name.rpartition(".")[2] in _PARTS]


def carried_cache(checkpoint: Checkpoint, formats: Sequence[Format], measured: str | None) -> Carried:
    """What becomes of the scales that a quantized source has. measured: what is measured anew, None: nothing."""
    reader = checkpoint.reader
    if reader is None:
        return Carried()
    found = cache_tensors(checkpoint)
    said = reader.cached()
    loose = {name for name in found if name in checkpoint.loose}
    if measured is not None or not (found or said):
        return Carried(left=tuple(name for name in loose if name.rpartition(".")[2] not in CACHE_PARTS))
    placeless = [f.name for f in formats if not f.caches]
    if said == "fp8" and found and not placeless and loose == set(found) and _is_plain(checkpoint, found):
        return Carried(scheme="fp8")
    if not found:
        reason = "and config.json asks for them without any tensor"
    elif placeless:
        reason = f"for which {placeless[0]} has no place"
    else:
        reason = "and written are one FP8 scale for keys and one for values of each attention module"
    named = f" ({len(found)} tensors, such as {found[0]})" if found else ""
    kind = said or "of no kind that is named"
    note = f"the source's scales of keys and values are left out{named}: they are {kind}, {reason}"
    return Carried(left=tuple(loose), notes=(note,))


def _is_plain(checkpoint: Checkpoint, names: Sequence[str]) -> bool:
    """Whether each module has both scales, and each is one number."""
    modules = {name.rpartition(".")[0] for name in names}
    wanted = {f"{module}.{part}" for module in modules for part in CACHE_PARTS}
    tensors = checkpoint.source.tensors
    return wanted == set(names) and all(tensors[name].shape in ((), (1,)) for name in names)
