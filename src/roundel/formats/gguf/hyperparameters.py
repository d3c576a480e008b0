"""The keys of a GGUF file that begin with the architecture's name: what llama.cpp has to know to run the model.

Source: llama.cpp, conversion/base.py (`TextModel.set_gguf_parameters`) and the classes over it, whose order and types
are kept; what llama.cpp reads of them: src/llama-arch.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from roundel.errors import SourceError
from roundel.formats.gguf.changes import long_rope_factor
from roundel.formats.gguf.rope import rope_of, sliding_rope_of
from roundel.io.gguf import GgufValue

__all__ = ["hyperparameters"]

Rows = tuple[tuple[str, str, tuple[str, ...]], ...]  # key, kind of value, names in config.json: the first that is there
Found = Iterator[tuple[str, GgufValue]]

_SIZES: Rows = (
    ("block_count", "u32", ("num_hidden_layers", "n_layer")),
    ("context_length", "u32", ("max_position_embeddings", "n_positions")),
    ("embedding_length", "u32", ("hidden_size", "n_embd")),
    ("feed_forward_length", "u32", ("intermediate_size", "n_inner")),
    ("attention.head_count", "u32", ("num_attention_heads", "n_head")),
    ("attention.head_count_kv", "u32", ("num_key_value_heads",)),
)
_NORMS_AND_EXPERTS: Rows = (
    ("attention.layer_norm_rms_epsilon", "f32", ("rms_norm_eps", "norm_eps")),
    ("attention.layer_norm_epsilon", "f32", ("layer_norm_eps", "layer_norm_epsilon")),
    ("expert_count", "u32", ("num_local_experts", "num_experts", "n_routed_experts")),
    ("expert_used_count", "u32", ("num_experts_per_tok",)),
    ("expert_group_count", "u32", ("n_group",)),
    ("expert_group_used_count", "u32", ("topk_group",)),
)
_GATING = {"softmax": 1, "sigmoid": 2}
_HEAD_SIZES: Rows = (
    ("attention.key_length", "u32", ("head_dim",)),
    ("attention.value_length", "u32", ("head_dim",)),
)
_FILE_TYPE = "general.file_type"
_GEMMA: Rows = (
    ("context_length", "u32", ("max_position_embeddings",)),
    ("embedding_length", "u32", ("hidden_size",)),
    ("block_count", "u32", ("num_hidden_layers",)),
    ("feed_forward_length", "u32", ("intermediate_size",)),
    ("attention.head_count", "u32", ("num_attention_heads",)),
    ("attention.head_count_kv", "u32", ("num_key_value_heads", "num_attention_heads")),
    ("attention.layer_norm_rms_epsilon", "f32", ("rms_norm_eps",)),
    *_HEAD_SIZES,
)
_GEMMA2_LAST: Rows = (
    ("attn_logit_softcapping", "f32", ("attn_logit_softcapping",)),
    ("final_logit_softcapping", "f32", ("final_logit_softcapping",)),
    ("attention.sliding_window", "u32", ("sliding_window",)),
)


def hyperparameters(settings: Mapping[str, Any], architecture_name: str, file_type: int) -> dict[str, GgufValue]:
    """Values by full key, `general.file_type` among them where llama.cpp's converter puts it.

    settings    `architectures.settings_of` of the config
    file_type   the number of the mixture: `mixtures.FILE_TYPES`

    Raises SourceError where a number that llama.cpp needs is missing or is none.
    """
    makers = {
        "llama": _llama,
        "qwen2moe": _qwen_moe,
        "qwen3moe": _qwen_moe,
        "gemma": _gemma,
        "gemma2": _gemma2,
        "gemma3": _gemma3,
        "phi3": _phi3,
        "deepseek2": _deepseek,
        "gpt-oss": _gpt_oss,
    }
    found: dict[str, GgufValue] = {}
    for key, value in makers.get(architecture_name, _usual)(settings, GgufValue("u32", file_type)):
        found[key if key == _FILE_TYPE else f"{architecture_name}.{key}"] = value
    return found


def _usual(settings: Mapping[str, Any], file_type: GgufValue) -> Found:
    yield from _rows(_SIZES, settings)
    yield from _rope(settings)
    yield from _rows(_NORMS_AND_EXPERTS, settings)
    scoring = settings.get("scoring_func")
    if scoring is not None:
        if scoring not in _GATING:
            raise SourceError(f"config.json scores experts by {scoring!r}, for which GGUF files have no number.")
        yield "expert_gating_func", GgufValue("u32", _GATING[scoring])
    yield from _rows(_HEAD_SIZES, settings)
    yield _FILE_TYPE, file_type


def _llama(settings: Mapping[str, Any], file_type: GgufValue) -> Found:
    yield from _usual(settings, file_type)
    yield "vocab_size", _number(settings, "u32", "vocab_size")
    yield "rope.dimension_count", GgufValue("u32", _head_size(settings))


def _qwen_moe(settings: Mapping[str, Any], file_type: GgufValue) -> Found:
    yield from _usual(settings, file_type)
    yield from _rows(
        (
            ("expert_feed_forward_length", "u32", ("moe_intermediate_size",)),
            ("expert_shared_feed_forward_length", "u32", ("shared_expert_intermediate_size",)),
        ),
        settings,
    )


def _gemma(settings: Mapping[str, Any], file_type: GgufValue) -> Found:
    yield from _rows(_GEMMA, settings)
    yield _FILE_TYPE, file_type


def _gemma2(settings: Mapping[str, Any], file_type: GgufValue) -> Found:
    yield from _gemma(settings, file_type)
    yield from _rows(_GEMMA2_LAST, settings)


def _gemma3(settings: Mapping[str, Any], file_type: GgufValue) -> Found:
    yield from _usual(settings, file_type)
    yield from _rows((("final_logit_softcapping", "f32", ("final_logit_softcapping",)),), settings)
    if settings.get("sliding_window_pattern") != 1:
        yield "attention.sliding_window", _number(settings, "u32", "sliding_window")


def _phi3(settings: Mapping[str, Any], file_type: GgufValue) -> Found:
    rope = rope_of(settings)
    factor = long_rope_factor(settings)
    if factor is not None:
        yield "rope.scaling.attn_factor", GgufValue("f32", factor)
    yield "context_length", _number(settings, "u32", "max_position_embeddings")
    yield "rope.scaling.original_context_length", _number(rope, "u32", "original_max_position_embeddings")
    yield "embedding_length", _number(settings, "u32", "hidden_size")
    yield "feed_forward_length", _number(settings, "u32", "intermediate_size")
    yield "block_count", _number(settings, "u32", "num_hidden_layers")
    yield "attention.head_count", _number(settings, "u32", "num_attention_heads")
    yield "attention.head_count_kv", _number(settings, "u32", "num_key_value_heads")
    yield "attention.layer_norm_rms_epsilon", _number(settings, "f32", "rms_norm_eps")
    turned = int(rope.get("partial_rotary_factor", 1.0) * settings["hidden_size"]) // settings["num_attention_heads"]
    yield "rope.dimension_count", GgufValue("u32", turned)
    yield "rope.freq_base", _number(rope, "f32", "rope_theta")
    yield _FILE_TYPE, file_type
    yield "attention.sliding_window", GgufValue("u32", settings.get("sliding_window") or 0)


def _deepseek(settings: Mapping[str, Any], file_type: GgufValue) -> Found:
    # llama.cpp runs latent attention as one head of keys that all queries share
    one = {**settings, "num_key_value_heads": 1}
    rank, turned = int(settings.get("kv_lora_rank", 512)), int(settings["qk_rope_head_dim"])
    yield from _usual(one, file_type)
    experts = settings.get("n_routed_experts")
    dense = settings.get("first_k_dense_replace")
    if dense is None:
        dense = settings["num_hidden_layers"] if experts is None else 0
    yield "leading_dense_block_count", GgufValue("u32", int(dense))
    yield "vocab_size", _number(settings, "u32", "vocab_size")
    yield from _rows((("attention.q_lora_rank", "u32", ("q_lora_rank",)),), settings)
    yield "attention.kv_lora_rank", GgufValue("u32", rank)
    yield "attention.key_length", GgufValue("u32", rank + turned)
    yield "attention.value_length", GgufValue("u32", rank)
    yield "attention.key_length_mla", GgufValue("u32", int(settings["qk_nope_head_dim"]) + turned)
    yield "attention.value_length_mla", _number(settings, "u32", "v_head_dim")
    yield from _rows((("expert_feed_forward_length", "u32", ("moe_intermediate_size", "intermediate_size")),), settings)
    yield "expert_shared_count", GgufValue("u32", int(settings.get("n_shared_experts") or 0))
    yield from _rows((("expert_weights_scale", "f32", ("routed_scaling_factor",)),), settings)
    if settings.get("norm_topk_prob"):
        yield "expert_weights_norm", GgufValue("bool", True)
    yield "rope.dimension_count", GgufValue("u32", turned)
    scale = rope_of(settings).get("mscale_all_dim")
    if scale is not None:
        yield "rope.scaling.yarn_log_multiplier", GgufValue("f32", 0.1 * scale)


def _gpt_oss(settings: Mapping[str, Any], file_type: GgufValue) -> Found:
    yield from _usual(settings, file_type)
    yield "attention.sliding_window", _number(settings, "u32", "sliding_window")
    yield "expert_feed_forward_length", _number(settings, "u32", "intermediate_size")


def _rope(settings: Mapping[str, Any]) -> Found:
    rope = rope_of(settings)
    kind, factor = str(rope.get("rope_type", "")).lower(), rope.get("factor")
    if kind in ("linear", "yarn") and factor is not None:
        yield "rope.scaling.type", GgufValue("str", kind)
        yield "rope.scaling.factor", _number(rope, "f32", "factor")
        if kind == "yarn":
            yield "rope.scaling.original_context_length", _number(rope, "u32", "original_max_position_embeddings")
            yield from _rows(
                (
                    ("rope.scaling.yarn_ext_factor", "f32", ("extrapolation_factor",)),
                    ("rope.scaling.yarn_attn_factor", "f32", ("attention_factor", "attn_factor")),
                    ("rope.scaling.yarn_beta_fast", "f32", ("beta_fast",)),
                    ("rope.scaling.yarn_beta_slow", "f32", ("beta_slow",)),
                ),
                rope,
            )
    elif kind in ("su", "longrope"):
        yield "rope.scaling.type", GgufValue("str", "longrope")
    yield from _rows((("rope.freq_base", "f32", ("rope_theta",)),), rope)
    yield from _rows((("rope.freq_base_swa", "f32", ("rope_theta",)),), sliding_rope_of(settings))


def _rows(rows: Rows, settings: Mapping[str, Any]) -> Found:
    """Those of the rows that the settings have."""
    for key, kind, names in rows:
        name = next((name for name in names if name in settings), None)
        if name is not None and settings[name] is not None:
            yield key, _number(settings, kind, name)


def _number(settings: Mapping[str, Any], kind: str, name: str) -> GgufValue:
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SourceError(f"config.json gives {value!r} as {name}, where a GGUF file needs a number.")
    if kind == "f32":
        return GgufValue(kind, float(value))
    if value != int(value) or not 0 <= value < 1 << 32:
        raise SourceError(f"config.json gives {value!r} as {name}, where a GGUF file needs a whole number.")
    return GgufValue(kind, int(value))


def _head_size(settings: Mapping[str, Any]) -> int:
    given = settings.get("head_dim")
    return int(given) if given is not None else int(settings["hidden_size"]) // int(settings["num_attention_heads"])
