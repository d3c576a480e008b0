"""Which model types there are picoscopic checkpoints of: their configs, and the names and shapes that follow.

Configs are those of published checkpoints, made small: two blocks, 64 wide, 4 experts, 256 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models import layout, towers
from models.layout import Config, Shapes, decoder, hybrid, with_nextn

__all__ = ["PICO", "Pico"]

BASE: Config = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
GEMMA: Config = BASE | {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 64}
COHERE: Config = BASE | {"tie_word_embeddings": True, "layer_norm_eps": 1e-5, "logit_scale": 0.25}
QWEN_MOE: Config = BASE | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
QWEN_MOE_SHARED: Config = QWEN_MOE | {"shared_expert_intermediate_size": 64}
HYBRID: Config = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
LOCAL_EXPERTS: Config = BASE | {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: Config = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}
LATENT: Config = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
GLM_MOE: Config = BASE | ROUTED | {"attention_bias": True}
DEEPSEEK: Config = {k: v for k, v in BASE.items() if k != "head_dim"} | ROUTED | LATENT
INDEXED: Config = DEEPSEEK | {"index_n_heads": 4, "index_head_dim": 64, "index_topk": 16}
MROPE: Config = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
MROPE3: Config = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}}
LLAMA4: Config = LOCAL_EXPERTS | {
    "intermediate_size_mlp": 128,
    "interleave_moe_layer_step": 1,
    "num_experts_per_tok": 1,
}
OPT: Config = {
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 32,
    "do_layer_norm_before": True,
    "activation_function": "relu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}
GPT2: Config = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class Pico:
    """One model type: the class that loads it, the language model's config, and its tensors, given that config.

    text     `model_type` of the nested `text_config`; None where config.json is flat
    vision   the `vision_config`; None without a tower
    """

    architecture: str
    config: Config
    shapes: Callable[[Config], Shapes]
    text: str | None = None
    vision: Config | None = None


def _opt(config: Config) -> Shapes:
    hidden, inner, narrow = config["hidden_size"], config["ffn_dim"], config["word_embed_proj_dim"]
    under = "model.decoder"
    shapes: Shapes = {
        f"{under}.embed_tokens.weight": (config["vocab_size"], narrow),
        f"{under}.embed_positions.weight": (config["max_position_embeddings"] + 2, hidden),
    }
    if narrow != hidden:
        shapes |= layout.linear(f"{under}.project_in", hidden, narrow)
        shapes |= layout.linear(f"{under}.project_out", narrow, hidden)
    for index in range(config["num_hidden_layers"]):
        block = f"{under}.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= layout.linear(f"{block}.self_attn.{name}", hidden, hidden, bias=True)
        shapes |= layout.linear(f"{block}.fc1", inner, hidden, bias=True)
        shapes |= layout.linear(f"{block}.fc2", hidden, inner, bias=True)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= layout.norm(f"{block}.{name}", hidden, bias=True)
    return shapes | layout.norm(f"{under}.final_layer_norm", hidden, bias=True)


def _gpt2(config: Config) -> Shapes:
    hidden = config["n_embd"]
    shapes: Shapes = {
        "transformer.wte.weight": (config["vocab_size"], hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
    }
    for index in range(config["n_layer"]):
        block = f"transformer.h.{index}"
        # Conv1D: [in, out]
        rows = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
        for name, (into, out) in rows.items():
            shapes[f"{block}.{name}.weight"] = (into * hidden, out * hidden)
            shapes[f"{block}.{name}.bias"] = (out * hidden,)
        shapes |= layout.norm(f"{block}.ln_1", hidden, bias=True) | layout.norm(f"{block}.ln_2", hidden, bias=True)
    return shapes | layout.norm("transformer.ln_f", hidden, bias=True)


def _under_language_model(config: Config, attend: layout.Piece, norms: tuple[str, ...], tower: Shapes) -> Shapes:
    """Names of the wrappers that older transformers wrote: `language_model.model.` and `language_model.lm_head`."""
    text = decoder(config, attend, layout.mlp, norms=norms, under="language_model.model", head="language_model.lm_head")
    return text | tower


def _llama4(config: Config, under: str = "model", head: str = "lm_head") -> Shapes:
    return decoder(config, layout.attention, layout.experts_llama4, under=under, head=head)


def _qwen3_5(config: Config, feed: layout.Piece) -> Shapes:
    text = hybrid(config, feed, split=True, under="model.language_model")
    return text | towers.qwen3_visual(config, "model.visual", deepstack=False)


def _qwen3_5_experts(config: Config, block: str) -> Shapes:
    return layout.experts_stacked(config, block) | layout.shared_expert(config, block)


def _qwen3_vl(config: Config, feed: layout.Piece) -> Shapes:
    text = decoder(config, layout.attention_normed, feed, under="model.language_model")
    return text | towers.qwen3_visual(config, "model.visual", deepstack=True)


def _qwen2_vl(config: Config, *, gated: bool) -> Shapes:
    return decoder(config, layout.attention_biased, layout.mlp) | towers.qwen2_visual(config, "visual", gated=gated)


def _plain(architecture: str, attend: layout.Piece, feed: layout.Piece, config: Config, **options: Any) -> Pico:
    """A decoder whose config is flat."""
    return Pico(
        architecture=f"{architecture}ForCausalLM", config=config, shapes=lambda c: decoder(c, attend, feed, **options)
    )


def _nextn(architecture: str, attend: layout.Piece, feed: layout.Piece, config: Config) -> Pico:
    """A decoder with a multi-token-prediction block after the last."""
    return Pico(architecture=f"{architecture}ForCausalLM", config=config, shapes=lambda c: with_nextn(c, attend, feed))


PICO: dict[str, Pico] = {
    "llama": _plain("Llama", layout.attention, layout.mlp, BASE),
    "mistral": _plain("Mistral", layout.attention, layout.mlp, BASE | {"sliding_window": None}),
    "qwen2": _plain("Qwen2", layout.attention_biased, layout.mlp, BASE),
    "qwen3": _plain("Qwen3", layout.attention_normed, layout.mlp, BASE),
    "gemma2": _plain("Gemma2", layout.attention, layout.mlp, GEMMA, norms=layout.GEMMA_NORMS),
    "gemma3_text": _plain("Gemma3", layout.attention_normed, layout.mlp, GEMMA, norms=layout.GEMMA_NORMS),
    "cohere": _plain("Cohere", layout.attention, layout.mlp, COHERE, norms=layout.TWO_NORMS[:1]),
    "phi3": _plain("Phi3", layout.attention_fused, layout.mlp_fused, BASE),
    "glm4": _plain(
        "Glm4", layout.attention, layout.mlp_fused, BASE | {"attention_bias": False}, norms=layout.GLM_NORMS
    ),
    "opt": Pico(architecture="OPTForCausalLM", config=OPT, shapes=_opt),
    "gpt2": Pico(architecture="GPT2LMHeadModel", config=GPT2, shapes=_gpt2),
    "qwen2_moe": _plain("Qwen2Moe", layout.attention_biased, layout.experts_qwen2, QWEN_MOE_SHARED),
    "qwen3_moe": _plain("Qwen3Moe", layout.attention_normed, layout.experts, QWEN_MOE),
    "mixtral": _plain("Mixtral", layout.attention, layout.experts_mixtral, LOCAL_EXPERTS),
    "minimax_m2": _plain("MiniMaxM2", layout.attention_minimax, layout.experts_minimax, LOCAL_EXPERTS),
    "gpt_oss": _plain(
        "GptOss", layout.attention_gpt_oss, layout.experts_gpt_oss, LOCAL_EXPERTS | {"sliding_window": 64}
    ),
    "deepseek_v2": _plain("DeepseekV2", layout.attention_latent, layout.experts_deepseek, DEEPSEEK),
    "deepseek_v3": _nextn("DeepseekV3", layout.attention_latent, layout.experts_deepseek3, DEEPSEEK),
    "deepseek_v32": _nextn("DeepseekV32", layout.attention_indexed, layout.experts_deepseek3, INDEXED),
    "glm4_moe": _nextn("Glm4Moe", layout.attention_biased, layout.experts_deepseek3, GLM_MOE),
    "glm4_moe_lite": _nextn("Glm4MoeLite", layout.attention_latent, layout.experts_deepseek3, DEEPSEEK),
    "glm_moe_dsa": _nextn("GlmMoeDsa", layout.attention_indexed, layout.experts_deepseek3, INDEXED),
    "qwen3_next": Pico(
        architecture="Qwen3NextForCausalLM",
        config=QWEN_MOE_SHARED | HYBRID,
        shapes=lambda c: hybrid(c, layout.experts_qwen2, split=False),
    ),
    "qwen3_5": Pico(
        architecture="Qwen3_5ForConditionalGeneration",
        config=BASE | HYBRID,
        shapes=lambda c: _qwen3_5(c, layout.mlp),
        text="qwen3_5_text",
        vision=towers.VISION["qwen3_5"],
    ),
    "qwen3_5_moe": Pico(
        architecture="Qwen3_5MoeForConditionalGeneration",
        config=QWEN_MOE_SHARED | HYBRID,
        shapes=lambda c: _qwen3_5(c, _qwen3_5_experts),
        text="qwen3_5_moe_text",
        vision=towers.VISION["qwen3_5"],
    ),
    "qwen2_vl": Pico(
        architecture="Qwen2VLForConditionalGeneration",
        config=BASE | MROPE,
        shapes=lambda c: _qwen2_vl(c, gated=False),
        vision=towers.VISION["qwen2_vl"],
    ),
    "qwen2_5_vl": Pico(
        architecture="Qwen2_5_VLForConditionalGeneration",
        config=BASE | MROPE,
        shapes=lambda c: _qwen2_vl(c, gated=True),
        vision=towers.VISION["qwen2_5_vl"],
    ),
    "qwen3_vl": Pico(
        architecture="Qwen3VLForConditionalGeneration",
        config=BASE | MROPE3,
        shapes=lambda c: _qwen3_vl(c, layout.mlp),
        text="qwen3_vl_text",
        vision=towers.VISION["qwen3_vl"],
    ),
    "qwen3_vl_moe": Pico(
        architecture="Qwen3VLMoeForConditionalGeneration",
        config=QWEN_MOE | MROPE3,
        shapes=lambda c: _qwen3_vl(c, lambda c, block: layout.experts_stacked(c, block, transposed=True)),
        text="qwen3_vl_moe_text",
        vision=towers.VISION["qwen3_vl"],
    ),
    "mistral3": Pico(
        architecture="Mistral3ForConditionalGeneration",
        config=BASE | {"sliding_window": None},
        shapes=lambda c: _under_language_model(c, layout.attention, layout.TWO_NORMS, towers.pixtral(c)),
        text="mistral",
        vision=towers.VISION["pixtral"],
    ),
    "gemma3": Pico(
        architecture="Gemma3ForConditionalGeneration",
        config=GEMMA,
        shapes=lambda c: _under_language_model(c, layout.attention_normed, layout.GEMMA_NORMS, towers.siglip(c)),
        text="gemma3_text",
        vision=towers.VISION["siglip"],
    ),
    "llama4_text": Pico(architecture="Llama4ForCausalLM", config=LLAMA4, shapes=_llama4),
    "llama4": Pico(
        architecture="Llama4ForConditionalGeneration",
        config=LLAMA4,
        shapes=lambda c: _llama4(c, "language_model.model", "language_model.lm_head") | towers.llama4_vision(c),
        text="llama4_text",
        vision=towers.VISION["llama4"],
    ),
}
