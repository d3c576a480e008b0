"""Matrices that runtimes stack into one before they multiply, and which therefore have to share what belongs to a
matrix as a whole: in NVFP4 the float that its scales are relative to.

Source: `packed_modules_mapping` of vLLM's models, and the matrices for which llm-compressor (model_free/microscale.py)
and auto-round (update_fused_layer_global_scales) make it equal. Names are those of Llama's descendants; matrices that a
checkpoint has stacked already stand alone.
"""

from __future__ import annotations

__all__ = ["stacked_with"]

_STACKED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def stacked_with(module: str) -> tuple[str, ...]:
    """The module's name and the names of those that are stacked with it, whether they exist or not; () where it stands
    alone."""
    parent, _, name = module.rpartition(".")
    found = next((names for names in _STACKED if name in names), ())
    return tuple(f"{parent}.{name}" if parent else name for name in found)
