"""What llama.cpp's converter changes in a tensor's values, and the tensors it makes itself.

Source: llama.cpp, conversion/gemma.py, llama.py, phi.py and base.py (`prepare_tensors`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from roundel.errors import SourceError
from roundel.formats.gguf.architectures import architecture
from roundel.formats.gguf.rope import rope_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["extra_tensors", "is_float32", "long_rope_factor", "norm_offset"]

_ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


def norm_offset(hf_name: str, architecture_name: str) -> float:
    """What is added to a tensor's values: 1 for the norms of models that scale by 1 + weight, else 0."""
    return architecture(architecture_name).norm_offset if hf_name.endswith("norm.weight") else 0.0


def is_float32(gguf_name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is kept in float32 in every file: vectors, norms, routers, everything that is no weight."""
    if len(shape) <= 1 or gguf_name.endswith("_norm.weight") or not gguf_name.endswith(".weight"):
        return True
    return gguf_name.endswith(_ROUTERS)


def extra_tensors(settings: Mapping[str, Any], architecture_name: str) -> dict[str, Tensor]:
    """float32 tensors of a GGUF file that the checkpoint has not: factors of rotary frequencies, by name.

    Llama 3.1's scaling becomes `rope_freqs.weight`, Phi-3's long context two lists. Raises SourceError for a list
    whose length does not fit the heads.
    """
    import torch

    if architecture_name == "phi3":
        lists = _phi3_lists(settings)
        return {
            f"rope_factors_{name}.weight": torch.tensor(values, dtype=torch.float32) for name, values in lists.items()
        }
    if architecture_name == "llama" and str(rope_of(settings).get("rope_type", "")).lower() == "llama3":
        return {"rope_freqs.weight": _llama3_factors(settings)}
    return {}


def _llama3_factors(settings: Mapping[str, Any]) -> Tensor:
    """[head_dim / 2], what each frequency is divided by: 1 for short waves, `factor` for long ones, between them a mean
    whose weight goes by the wavelength."""
    import torch

    rope = rope_of(settings)
    size = settings.get("head_dim") or int(settings["hidden_size"]) // int(settings["num_attention_heads"])
    frequencies = 1.0 / (rope.get("rope_theta", 10000.0) ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    factor, low, high = rope.get("factor", 8.0), rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    context = rope.get("original_max_position_embeddings", 8192)
    waves = 2 * math.pi / frequencies
    smooth = (context / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    longest = torch.where(waves > context / low, torch.full_like(waves, factor), between)
    return torch.where(waves < context / high, torch.ones_like(waves), longest)


def _phi3_lists(settings: Mapping[str, Any]) -> dict[str, list[float]]:
    rope = rope_of(settings)
    if not rope.get("long_factor"):
        return {}
    wanted = _phi3_dimensions(settings, rope) // 2
    lists = {name: rope.get(f"{name}_factor") for name in ("long", "short")}
    for name, values in lists.items():
        if not isinstance(values, list) or len(values) != wanted:
            found = len(values) if isinstance(values, list) else 0
            raise SourceError(
                f"config.json gives {found} numbers as {name}_factor of its rotary embedding, not {wanted}."
            )
    return lists  # type: ignore[return-value]


def _phi3_dimensions(settings: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    return int(rope.get("partial_rotary_factor", 1.0) * settings["hidden_size"]) // int(settings["num_attention_heads"])


def long_rope_factor(settings: Mapping[str, Any]) -> float | None:
    """By what Phi-3 multiplies attention at long contexts; None without the lists of factors."""
    rope = rope_of(settings)
    if not rope.get("long_factor"):
        return None
    before = rope["original_max_position_embeddings"]
    scale = settings["max_position_embeddings"] / before
    kind = str(rope.get("rope_type", "")).lower()
    if scale <= 1.0:
        return 1.0
    if kind in ("su", "longrope"):
        return math.sqrt(1 + math.log(scale) / math.log(before))
    if kind == "yarn":
        return 0.1 * math.log(scale) + 1.0
    raise SourceError(f"The rotary scaling {kind!r} of this Phi-3 model has no place in a GGUF file.")
