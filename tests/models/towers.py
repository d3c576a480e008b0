"""The names and shapes of vision towers and projectors, one block deep, as published checkpoints have them.

Every tower is 64 wide, its MLP 128, patches 4 x 4 of an image 16 x 16; VISION holds the configs that say so.
"""

from __future__ import annotations

from models.layout import Config, Shapes, feed_forward, linear, norm

WIDE, INNER, PATCH, PATCHES = 64, 128, 4, 16

_QWEN: Config = {"depth": 1, "num_heads": 2, "in_channels": 3, "patch_size": PATCH, "spatial_merge_size": 2}
_HUGGING: Config = {
    "hidden_size": WIDE,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "image_size": PATCH * 4,
    "num_channels": 3,
}
VISION: dict[str, Config] = {
    "qwen2_vl": _QWEN | {"embed_dim": WIDE, "hidden_size": 64, "mlp_ratio": 2, "temporal_patch_size": 2},
    "qwen2_5_vl": _QWEN | {"hidden_size": WIDE, "intermediate_size": INNER, "out_hidden_size": 64},
    "qwen3_vl": _QWEN
    | {"hidden_size": WIDE, "intermediate_size": INNER, "out_hidden_size": 64, "num_position_embeddings": PATCHES}
    | {"deepstack_visual_indexes": [0]},
    "qwen3_5": _QWEN
    | {"hidden_size": WIDE, "intermediate_size": INNER, "out_hidden_size": 64, "num_position_embeddings": PATCHES},
    "pixtral": _HUGGING | {"model_type": "pixtral", "head_dim": 32},
    "siglip": _HUGGING | {"model_type": "siglip_vision_model", "vision_use_head": False},
    "llama4": _HUGGING
    | {"model_type": "llama4_vision_model", "vision_output_dim": 64, "projector_input_dim": 64}
    | {"projector_output_dim": 64, "pixel_shuffle_ratio": 0.5},
}


def qwen2_visual(config: Config, under: str, *, gated: bool) -> Shapes:
    """Qwen2-VL's; Qwen2.5-VL's has RMS norms and a gated MLP."""
    block, hidden = f"{under}.blocks.0", config["hidden_size"]
    shapes: Shapes = {f"{under}.patch_embed.proj.weight": (WIDE, 3, 2, PATCH, PATCH)}
    shapes |= norm(f"{block}.norm1", WIDE, bias=not gated) | norm(f"{block}.norm2", WIDE, bias=not gated)
    shapes |= linear(f"{block}.attn.qkv", 3 * WIDE, WIDE, bias=True) | linear(
        f"{block}.attn.proj", WIDE, WIDE, bias=True
    )
    names = ("gate_proj", "up_proj", "down_proj") if gated else ("fc1", "fc2")
    for name in names:
        down = name in ("down_proj", "fc2")
        shapes |= linear(f"{block}.mlp.{name}", *((WIDE, INNER) if down else (INNER, WIDE)), bias=True)
    shapes |= norm(f"{under}.merger.ln_q", WIDE, bias=not gated)
    shapes |= linear(f"{under}.merger.mlp.0", 4 * WIDE, 4 * WIDE, bias=True)
    return shapes | linear(f"{under}.merger.mlp.2", hidden, 4 * WIDE, bias=True)


def qwen3_visual(config: Config, under: str, *, deepstack: bool) -> Shapes:
    """Qwen3-VL's; Qwen3.5's has no deepstack mergers."""
    block, hidden = f"{under}.blocks.0", config["hidden_size"]
    shapes: Shapes = {
        f"{under}.patch_embed.proj.weight": (WIDE, 3, 2, PATCH, PATCH),
        f"{under}.patch_embed.proj.bias": (WIDE,),
        f"{under}.pos_embed.weight": (PATCHES, WIDE),
    }
    shapes |= norm(f"{block}.norm1", WIDE, bias=True) | norm(f"{block}.norm2", WIDE, bias=True)
    shapes |= linear(f"{block}.attn.qkv", 3 * WIDE, WIDE, bias=True) | linear(
        f"{block}.attn.proj", WIDE, WIDE, bias=True
    )
    shapes |= linear(f"{block}.mlp.linear_fc1", INNER, WIDE, bias=True)
    shapes |= linear(f"{block}.mlp.linear_fc2", WIDE, INNER, bias=True)
    mergers = {f"{under}.merger": WIDE} | ({f"{under}.deepstack_merger_list.0": 4 * WIDE} if deepstack else {})
    for merger, size in mergers.items():
        shapes |= norm(f"{merger}.norm", size, bias=True)
        shapes |= linear(f"{merger}.linear_fc1", 4 * WIDE, 4 * WIDE, bias=True)
        shapes |= linear(f"{merger}.linear_fc2", hidden, 4 * WIDE, bias=True)
    return shapes


def pixtral(config: Config) -> Shapes:
    """Mistral 3's tower and projector."""
    block, projector, hidden = "vision_tower.transformer.layers.0", "multi_modal_projector", config["hidden_size"]
    shapes: Shapes = {"vision_tower.patch_conv.weight": (WIDE, 3, PATCH, PATCH)}
    for name in ("vision_tower.ln_pre", f"{block}.attention_norm", f"{block}.ffn_norm", f"{projector}.norm"):
        shapes |= norm(name, WIDE)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        shapes |= linear(f"{block}.attention.{name}", WIDE, WIDE)
    shapes |= feed_forward(f"{block}.feed_forward", WIDE, INNER, ("gate_proj", "up_proj", "down_proj"))
    shapes |= linear(f"{projector}.patch_merger.merging_layer", WIDE, 4 * WIDE)
    return shapes | linear(f"{projector}.linear_1", hidden, WIDE) | linear(f"{projector}.linear_2", hidden, hidden)


def siglip(config: Config) -> Shapes:
    """Gemma 3's tower and projector, whose matrix is a bare parameter [in, out]."""
    tower = "vision_tower.vision_model"
    block, projector = f"{tower}.encoder.layers.0", "multi_modal_projector"
    shapes: Shapes = {
        f"{tower}.embeddings.patch_embedding.weight": (WIDE, 3, PATCH, PATCH),
        f"{tower}.embeddings.patch_embedding.bias": (WIDE,),
        f"{tower}.embeddings.position_embedding.weight": (PATCHES, WIDE),
        f"{projector}.mm_input_projection_weight": (WIDE, config["hidden_size"]),
    }
    for name in (f"{block}.layer_norm1", f"{block}.layer_norm2", f"{tower}.post_layernorm"):
        shapes |= norm(name, WIDE, bias=True)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= linear(f"{block}.self_attn.{name}", WIDE, WIDE, bias=True)
    shapes |= linear(f"{block}.mlp.fc1", INNER, WIDE, bias=True) | linear(f"{block}.mlp.fc2", WIDE, INNER, bias=True)
    return shapes | norm(f"{projector}.mm_soft_emb_norm", WIDE)


def llama4_vision(config: Config) -> Shapes:
    tower = "vision_model"
    block = f"{tower}.model.layers.0"
    shapes: Shapes = {
        f"{tower}.class_embedding": (WIDE,),
        f"{tower}.positional_embedding_vlm": (PATCHES + 1, WIDE),
        f"{tower}.patch_embedding.linear.weight": (WIDE, 3 * PATCH * PATCH),
    }
    norms = (f"{tower}.layernorm_pre", f"{tower}.layernorm_post", f"{block}.input_layernorm")
    for name in (*norms, f"{block}.post_attention_layernorm"):
        shapes |= norm(name, WIDE, bias=True)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        shapes |= linear(f"{block}.self_attn.{name}", WIDE, WIDE, bias=True)
    shapes |= linear(f"{block}.mlp.fc1", INNER, WIDE, bias=True) | linear(f"{block}.mlp.fc2", WIDE, INNER, bias=True)
    shapes |= linear(f"{tower}.vision_adapter.mlp.fc1", 64, INNER) | linear(f"{tower}.vision_adapter.mlp.fc2", 64, 64)
    return shapes | linear("multi_modal_projector.linear_1", config["hidden_size"], 64)
