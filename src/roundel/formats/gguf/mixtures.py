"""Which block type each tensor of a GGUF file gets: llama.cpp's file types, most of which mix several.

A mixture has a type for most matrices; values and down projections, the output head and some blocks get better ones,
widths that a type's blocks do not divide another. Source: llama.cpp, src/llama-quant.cpp (`llama_tensor_get_type_impl`,
`tensor_type_fallback`, `tensor_allows_quantization`); numbers from include/llama.h (`llama_ftype`). Not covered: the
mixtures of IQ1 to IQ3, whose types are not written here, and rules for architectures that are not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roundel.errors import RecipeError, nearest
from roundel.io.gguf import GGML_TYPES, GgufTensor

__all__ = ["FILE_TYPES", "MIXTURES", "MixedModel", "Mixture", "mixed_model", "mixture", "type_of"]


@dataclass(frozen=True)
class Mixture:
    """One of llama.cpp's file types.

    name         as the user spells it
    file_type    its number, `general.file_type`
    type         of most matrices
    importance   whether llama.cpp writes it with an importance matrix only
    """

    name: str
    file_type: int
    type: str
    importance: bool = False

    @property
    def is_float(self) -> bool:
        """Whether nothing is rounded to codes."""
        return self.type in ("F32", "F16", "BF16")


MIXTURES: dict[str, Mixture] = {
    each.name: each
    for each in (
        Mixture("f32", 0, "F32"),
        Mixture("f16", 1, "F16"),
        Mixture("bf16", 32, "BF16"),
        Mixture("q4_0", 2, "Q4_0"),
        Mixture("q4_1", 3, "Q4_1"),
        Mixture("q5_0", 8, "Q5_0"),
        Mixture("q5_1", 9, "Q5_1"),
        Mixture("q8_0", 7, "Q8_0"),
        Mixture("q2_k", 10, "Q2_K"),
        Mixture("q2_k_s", 21, "Q2_K", importance=True),
        Mixture("q3_k_s", 11, "Q3_K"),
        Mixture("q3_k_m", 12, "Q3_K"),
        Mixture("q3_k_l", 13, "Q3_K"),
        Mixture("q4_k_s", 14, "Q4_K"),
        Mixture("q4_k_m", 15, "Q4_K"),
        Mixture("q5_k_s", 16, "Q5_K"),
        Mixture("q5_k_m", 17, "Q5_K"),
        Mixture("q6_k", 18, "Q6_K"),
        Mixture("iq4_nl", 25, "IQ4_NL"),
        Mixture("iq4_xs", 30, "IQ4_XS"),
        Mixture("tq1_0", 36, "TQ1_0"),
        Mixture("tq2_0", 37, "TQ2_0"),
        Mixture("mxfp4_moe", 38, "MXFP4"),
    )
}
FILE_TYPES: dict[str, int] = {name: each.file_type for name, each in MIXTURES.items()}
_NARROWER = {  # where a row is no whole blocks of 256, a type with blocks of 32
    "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0",
    "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_UNROUNDED = ("_norm.weight", "ffn_gate_inp.weight")


@dataclass(frozen=True, kw_only=True)
class MixedModel:
    """What the rules ask of a model.

    layers       decoder blocks
    experts      of a layer, 0 where there are none
    shared_by    query heads that share a key head
    tied         whether the embedding is the output head too
    large        whether llama.cpp calls it a model of 70 B, whose values are few
    importance   whether an importance matrix is there
    """

    layers: int
    experts: int = 0
    shared_by: int = 1
    tied: bool = False
    large: bool = False
    importance: bool = False


def mixture(name: str) -> Mixture:
    """The mixture of this name, in any case. Raises RecipeError for one that is not known."""
    found = MIXTURES.get(name.lower())
    if found is None:
        raise RecipeError(f"{name!r} is no GGUF file type of {', '.join(MIXTURES)}.{nearest(name, MIXTURES)}")
    return found


def mixed_model(
    settings: Mapping[str, Any], architecture_name: str, tensors: Sequence[str], *, importance: bool = False
) -> MixedModel:
    """What the rules ask, of a config and the names of a file's tensors."""
    layers, heads = int(settings["num_hidden_layers"]), int(settings["num_attention_heads"])
    shared = settings.get("num_key_value_heads")
    shared = 1 if architecture_name == "deepseek2" else heads if shared is None else int(shared)
    experts = next(
        (settings[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if settings.get(key)), 0
    )
    many = layers == 80 and (architecture_name == "qwen2" or (architecture_name == "llama" and heads != shared))
    return MixedModel(
        layers=layers,
        experts=int(experts),
        shared_by=heads // shared,
        tied="output.weight" not in tensors,
        large=many,
        importance=importance,
    )


def type_of(tensor: GgufTensor, mixed: Mixture, model: MixedModel) -> str:
    """The type of a tensor in a file of this mixture.

    tensor   as an unrounded file has it: its type is what it keeps where the mixture leaves it alone
    """
    if not _may_be_rounded(tensor):
        return tensor.type
    if mixed.is_float:
        return mixed.type
    matched = _BLOCK.fullmatch(tensor.name)
    part, layer = (matched[2], int(matched[1])) if matched else (tensor.name, 0)
    return _fitting(_wished(part, layer, tensor, mixed, model), tensor.shape[-1])


def _may_be_rounded(tensor: GgufTensor) -> bool:
    axes = len(tensor.shape)
    while axes and tensor.shape[len(tensor.shape) - axes] == 1:  # as ggml counts axes
        axes -= 1
    return axes >= 2 and tensor.name.endswith("weight") and not tensor.name.endswith(_UNROUNDED)


def _fitting(wished: str, width: int) -> str:
    if width % GGML_TYPES[wished].weights:
        wished = _NARROWER.get(wished, wished)
    return wished if width % GGML_TYPES[wished].weights == 0 else "F16"


def _wished(part: str, layer: int, tensor: GgufTensor, mixed: Mixture, model: MixedModel) -> str:
    if part == "output.weight" or (part == "token_embd.weight" and model.tied):
        return _of_head(tensor, mixed)
    if mixed.name == "mxfp4_moe":
        return "MXFP4" if len(tensor.shape) > 2 and tensor.shape[-3] > 1 else "Q8_0"
    if part == "token_embd.weight":
        return "Q4_K" if mixed.name in ("tq1_0", "tq2_0") else mixed.type
    if part in ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"):
        return _of_values(layer, mixed, model)
    if part == "attn_k.weight" and model.experts == 8:
        return "Q8_0"
    if part.startswith("ffn_down"):
        return _of_down(layer, mixed, model)
    if part == "attn_output.weight":
        return _of_attention_output(mixed, model)
    return mixed.type


def _of_head(tensor: GgufTensor, mixed: Mixture) -> str:
    if mixed.name == "mxfp4_moe" or mixed.type == "Q8_0" or tensor.shape[-1] % GGML_TYPES[mixed.type].weights:
        return "Q8_0"
    return "Q6_K"


def _important(layer: int, layers: int) -> bool:
    """The first and the last eighth of the blocks, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or _remainder(layer - layers // 8, 3) == 2


def _remainder(number: int, divisor: int) -> int:
    """As C takes it, with the sign of the number."""
    return number % divisor if number >= 0 else -(-number % divisor)


def _of_values(layer: int, mixed: Mixture, model: MixedModel) -> str:
    few = model.shared_by >= 4
    wished = mixed.type
    match mixed.name:
        case "q2_k":
            wished = "Q4_K" if few else "Q3_K"
        case "q2_k_s" if few:
            wished = "Q4_K"
        case "q3_k_m":
            wished = "Q5_K" if layer < 2 else "Q4_K"
        case "q3_k_l":
            wished = "Q5_K"
        case "iq4_nl" | "iq4_xs" if few:
            wished = "Q5_K"
        case "q4_k_m" | "q5_k_m" if _important(layer, model.layers):
            wished = "Q6_K"
        case "q4_k_s" if layer < 4:
            wished = "Q5_K"
    if model.large and wished in ("Q3_K", "Q4_K"):
        wished = "Q5_K"
    return "Q8_0" if model.experts == 8 else wished


def _of_down(layer: int, mixed: Mixture, model: MixedModel) -> str:
    early = layer < model.layers // 8
    match mixed.name:
        case "q2_k":
            return "Q3_K"
        case "q2_k_s" if early:
            return "Q4_K"
        case "q3_k_m":
            return "Q5_K" if layer < model.layers // 16 else "Q4_K"
        case "q3_k_l":
            return "Q5_K"
        case "q4_k_m" | "q5_k_m" if _important(layer, model.layers):
            return "Q6_K"
        case "iq4_nl" | "iq4_xs" if early and not model.importance:
            return "Q5_K"
        case "q4_k_s" if early:
            return "Q5_K"
        case "q4_0" if early and model.importance:
            return "Q4_1"
        case "q5_0" if early and model.importance:
            return "Q5_1"
    return mixed.type


def _of_attention_output(mixed: Mixture, model: MixedModel) -> str:
    if model.experts == 8:
        raised = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")
        return "Q5_K" if mixed.name in raised else mixed.type
    return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(mixed.name, mixed.type)
