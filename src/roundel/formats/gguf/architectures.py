"""Which of llama.cpp's architectures a model is, and the config it is described by.

An architecture is llama.cpp's word for the code that runs a model: several model types share one (Llama, Mistral and
Mixtral are all "llama"). Source: the classes of llama.cpp's convert_hf_to_gguf.py (folder conversion/) and the tensors
of gguf-py/gguf/constants.py. Text models only: of a multimodal checkpoint the language model is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

from roundel.errors import SourceError, nearest

__all__ = ["ARCHITECTURES", "Architecture", "architecture", "architecture_of", "settings_of"]

Vocabulary = Literal["llama", "piece or bytes", "bytes", "piece", "phi3"]

_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_FOUR_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERTS = {
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_DENSE = _ATTENTION | _MLP | _NORMS


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp's code for some model types wants a model described.

    name           as `general.architecture` says it
    model_types    of config.json
    block          module name below a decoder block -> name below "blk.N."; of an expert's module without its number
    special        the same for whole tensor names, where the ending is not just "weight" or "bias"
    rotated        True where rows of q_proj and k_proj are reordered (`names.rows_permuted`)
    norm_offset    what is added to the weights of norms
    headless       True where a stored output head is left out: llama.cpp takes the embedding
    vocabulary     which of its kinds of tokenizer it has: `vocabulary.vocabulary`
    """

    name: str
    model_types: tuple[str, ...]
    block: Mapping[str, str] = field(repr=False)
    special: Mapping[str, str] = field(default_factory=dict, repr=False)
    rotated: bool = False
    norm_offset: float = 0.0
    headless: bool = False
    vocabulary: Vocabulary = "bytes"


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        name="llama",
        model_types=("llama", "mistral", "mixtral"),
        block=_DENSE
        | {
            "block_sparse_moe.gate": "ffn_gate_inp",
            "block_sparse_moe.experts.w1": "ffn_gate_exps",
            "block_sparse_moe.experts.w2": "ffn_down_exps",
            "block_sparse_moe.experts.w3": "ffn_up_exps",
        },
        rotated=True,
        vocabulary="llama",
    ),
    Architecture(name="qwen2", model_types=("qwen2",), block=_DENSE, vocabulary="piece or bytes"),
    Architecture(
        name="qwen2moe",
        model_types=("qwen2_moe",),
        block=_DENSE
        | _EXPERTS
        | {
            "mlp.gate": "ffn_gate_inp",
            "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
            "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
            "mlp.shared_expert.up_proj": "ffn_up_shexp",
            "mlp.shared_expert.down_proj": "ffn_down_shexp",
        },
    ),
    Architecture(name="qwen3", model_types=("qwen3",), block=_DENSE | _HEAD_NORMS, vocabulary="piece or bytes"),
    Architecture(
        name="qwen3moe",
        model_types=("qwen3_moe",),
        block=_DENSE | _HEAD_NORMS | _EXPERTS | {"mlp.gate": "ffn_gate_inp"},
    ),
    Architecture(
        name="gemma",
        model_types=("gemma",),
        block=_DENSE,
        norm_offset=1.0,
        headless=True,
        vocabulary="piece",
    ),
    Architecture(
        name="gemma2",
        model_types=("gemma2",),
        block=_ATTENTION | _MLP | _FOUR_NORMS,
        norm_offset=1.0,
        headless=True,
        vocabulary="piece",
    ),
    Architecture(
        name="gemma3",
        model_types=("gemma3_text", "gemma3"),
        block=_ATTENTION | _HEAD_NORMS | _MLP | _FOUR_NORMS,
        norm_offset=1.0,
        vocabulary="piece or bytes",
    ),
    Architecture(
        name="phi3",
        model_types=("phi3",),
        block={
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }
        | _NORMS,
        vocabulary="phi3",
    ),
    Architecture(
        name="deepseek2",
        model_types=("deepseek_v2", "deepseek_v3"),
        block={
            "self_attn.q_proj": "attn_q",
            "self_attn.q_a_proj": "attn_q_a",
            "self_attn.q_a_layernorm": "attn_q_a_norm",
            "self_attn.q_b_proj": "attn_q_b",
            "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
            "self_attn.kv_a_layernorm": "attn_kv_a_norm",
            "self_attn.kv_b_proj": "attn_kv_b",  # in files of older releases; now in the two parts that follow
            "self_attn.k_b_proj": "attn_k_b",
            "self_attn.v_b_proj": "attn_v_b",
            "self_attn.o_proj": "attn_output",
            "mlp.gate": "ffn_gate_inp",
            "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
            "mlp.shared_experts.up_proj": "ffn_up_shexp",
            "mlp.shared_experts.down_proj": "ffn_down_shexp",
        }
        | _MLP
        | _NORMS
        | _EXPERTS,
        special={"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"},
    ),
    Architecture(
        name="gpt-oss",
        model_types=("gpt_oss",),
        block=_ATTENTION
        | _EXPERTS
        | {
            "mlp.router": "ffn_gate_inp",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm",
        },
        special={"self_attn.sinks": "attn_sinks.weight"},
    ),
)
_BY_NAME = {each.name: each for each in ARCHITECTURES}
_BY_TYPE = {model_type: each for each in ARCHITECTURES for model_type in each.model_types}


def architecture(name: str) -> Architecture:
    """The architecture of this name, one of ours."""
    return _BY_NAME[name]


def architecture_of(config: Mapping[str, Any]) -> str:
    """llama.cpp's name for what config.json describes. Raises SourceError where no GGUF file of it can be written."""
    model_type = config.get("model_type")
    found = _BY_TYPE.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise SourceError(
            f"GGUF files of the model type {model_type!r} cannot be written: the names and keys that llama.cpp expects "
            f"are known for {', '.join(sorted(_BY_TYPE))} only.{nearest(str(model_type), _BY_TYPE)} Choose another "
            "format."
        )
    return found.name


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's settings, with the defaults of transformers that config.json may leave out.

    Raises SourceError where transformers refuses the config.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    settings = dict(config)
    if model_type in CONFIG_MAPPING:
        try:
            settings = CONFIG_MAPPING[model_type].from_dict(deepcopy(settings)).to_dict()  # it changes what it is given
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SourceError(f"config.json does not describe a {model_type} model: {error}") from error
    text = settings.get("text_config")
    return settings | text if isinstance(text, dict) else settings
