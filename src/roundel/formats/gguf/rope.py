"""The rotary embedding's parameters as config.json has them, under whichever of its spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["rope_of", "sliding_rope_of"]

_BESIDE = {  # key of the parameters -> keys of the config that may say the same
    "rope_theta": ("global_rope_theta", "rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rope_pct"),
    "original_max_position_embeddings": ("original_max_position_embeddings",),
}
_LOCAL = ("local_rope_theta", "rope_local_base_freq")


def rope_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of full attention."""
    given = _given(settings)
    full = given.get("full_attention")
    if isinstance(full, dict):
        return full
    found = dict(given)
    for key, names in _BESIDE.items():
        value = next((settings[name] for name in names if settings.get(name) is not None), None)
        if key not in found and value is not None:
            found[key] = value
    if "rope_type" not in found and found.get("type") is not None:
        found["rope_type"] = found["type"]
    return found


def sliding_rope_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of sliding attention, where they differ."""
    given = _given(settings)
    sliding = given.get("sliding_attention")
    if isinstance(sliding, dict):
        return sliding
    if "full_attention" in given:
        return {}
    theta = next((settings[name] for name in _LOCAL if settings.get(name) is not None), None)
    return {} if theta is None else {"rope_theta": theta}


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = settings.get("rope_parameters", settings.get("rope_scaling"))
    return found if isinstance(found, dict) else {}
