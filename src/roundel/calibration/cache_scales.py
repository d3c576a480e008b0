"""Scales of keys and values, for runtimes that keep them in FP8: the largest magnitude seen becomes the grid's largest.

Keys are measured as they enter the cache, after rotation and norms. Source: the rule of llm-compressor's
`kv_cache_scheme` ("tensor"), max|k| / 448 and max|v| / 448 over all calibration tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from roundel.errors import PlanError
from roundel.formats.format import CACHE_PARTS
from roundel.scheme import ELEMENTS

if TYPE_CHECKING:
    from torch import Tensor

    from roundel.calibration.block import Block, Blocks
    from roundel.unit import Decodable

__all__ = ["cache_scales"]


def cache_scales(
    block: Block | Blocks,
    modules: Collection[str],
    states: Iterable[Tensor],
    weights: Mapping[str, Tensor | Decodable],
) -> dict[str, Tensor]:
    """`k_scale` and `v_scale`, float32 [1], of attention modules, by tensor name; 1 where nothing but zeros was seen.

    states   what enters the block, [samples, tokens, hidden] at a time
    Raises PlanError where a module does not say what it caches.
    """
    import torch

    largest: dict[str, float] = {}

    def see(module: str, keys: Tensor, values: Tensor) -> None:
        for part, found in zip(CACHE_PARTS, (keys, values), strict=True):
            name = f"{module}.{part}"
            largest[name] = max(largest.get(name, 0.0), float(found.abs().max()))

    for x in states:
        block.observe_cache(x, weights, see, modules)
    silent = [module for module in modules if f"{module}.{CACHE_PARTS[0]}" not in largest]
    if silent:
        raise PlanError(
            f"{silent[0]} does not hand its keys and values to a cache as others do, so they cannot be measured. Leave "
            "--kv-cache out."
        )
    top = ELEMENTS["e4m3"].hi
    return {name: torch.tensor([value / top or 1.0], dtype=torch.float32) for name, value in largest.items()}
