"""The names and shapes of a language model's tensors, as published checkpoints have them, piece by piece.

Each function takes the config (a plain dict, as in config.json) and returns tensor name -> shape. Written out by hand,
so that neither a modelling library nor its version decides what the tests read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
Piece = Callable[[Config, str], Shapes]


def linear(name: str, out: int, into: int, *, bias: bool = False) -> Shapes:
    weight: Shapes = {f"{name}.weight": (out, into)}
    return weight | {f"{name}.bias": (out,)} if bias else weight


def norm(name: str, size: int, *, bias: bool = False) -> Shapes:
    weight: Shapes = {f"{name}.weight": (size,)}
    return weight | {f"{name}.bias": (size,)} if bias else weight


def attention(config: Config, block: str, *, bias: bool = False, out_bias: bool = False) -> Shapes:
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    wide, narrow = heads * size, config["num_key_value_heads"] * size
    rows = wide * 2 if "linear_num_key_heads" in config else wide  # Qwen3-Next: queries and an output gate
    here = f"{block}.self_attn"
    return (
        linear(f"{here}.q_proj", rows, hidden, bias=bias)
        | linear(f"{here}.k_proj", narrow, hidden, bias=bias)
        | linear(f"{here}.v_proj", narrow, hidden, bias=bias)
        | linear(f"{here}.o_proj", hidden, wide, bias=out_bias)
    )


def attention_biased(config: Config, block: str) -> Shapes:
    return attention(config, block, bias=True)


def attention_normed(config: Config, block: str) -> Shapes:
    """Attention with a norm on each query and key head."""
    size = config["head_dim"]
    norms = norm(f"{block}.self_attn.q_norm", size) | norm(f"{block}.self_attn.k_norm", size)
    return attention(config, block) | norms


def attention_fused(config: Config, block: str) -> Shapes:
    """Phi-3's: q, k and v in one matrix."""
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    rows = (heads + 2 * config["num_key_value_heads"]) * size
    return linear(f"{block}.self_attn.qkv_proj", rows, hidden) | linear(
        f"{block}.self_attn.o_proj", hidden, heads * size
    )


def attention_minimax(config: Config, block: str) -> Shapes:
    """Norms over all heads at once."""
    size = config["head_dim"]
    return (
        attention(config, block)
        | norm(f"{block}.self_attn.q_norm", config["num_attention_heads"] * size)
        | norm(f"{block}.self_attn.k_norm", config["num_key_value_heads"] * size)
    )


def attention_gpt_oss(config: Config, block: str) -> Shapes:
    sinks = {f"{block}.self_attn.sinks": (config["num_attention_heads"],)}
    return attention(config, block, bias=True, out_bias=True) | sinks


def attention_latent(config: Config, block: str) -> Shapes:
    """DeepSeek's multi-head latent attention; queries are not latent where q_lora_rank is None."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    into, rank, rotary = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    query, value, here = config["qk_nope_head_dim"], config["v_head_dim"], f"{block}.self_attn"
    queries = linear(f"{here}.q_proj", heads * (query + rotary), hidden)
    if into is not None:
        queries = (
            linear(f"{here}.q_a_proj", into, hidden)
            | norm(f"{here}.q_a_layernorm", into)
            | linear(f"{here}.q_b_proj", heads * (query + rotary), into)
        )
    return (
        queries
        | linear(f"{here}.kv_a_proj_with_mqa", rank + rotary, hidden)
        | norm(f"{here}.kv_a_layernorm", rank)
        | linear(f"{here}.kv_b_proj", heads * (query + value), rank)
        | linear(f"{here}.o_proj", hidden, heads * value)
    )


def attention_indexed(config: Config, block: str) -> Shapes:
    """Latent attention with the indexer of DeepSeek-V3.2."""
    heads, size, here = config["index_n_heads"], config["index_head_dim"], f"{block}.self_attn.indexer"
    return (
        attention_latent(config, block)
        | linear(f"{here}.wq_b", heads * size, config["q_lora_rank"])
        | linear(f"{here}.wk", size, config["hidden_size"])
        | norm(f"{here}.k_norm", size, bias=True)
        | linear(f"{here}.weights_proj", heads, config["hidden_size"])
    )


def linear_attention(config: Config, block: str, *, split: bool) -> Shapes:
    """The gated delta net of Qwen3-Next (its inputs in two matrices) and of Qwen3.5 (split into four)."""
    hidden, here, heads = config["hidden_size"], f"{block}.linear_attn", config["linear_num_value_heads"]
    key = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    value = heads * config["linear_value_head_dim"]
    inputs = (
        {"in_proj_qkv": 2 * key + value, "in_proj_z": value, "in_proj_b": heads, "in_proj_a": heads}
        if split
        else {"in_proj_qkvz": 2 * key + 2 * value, "in_proj_ba": 2 * heads}
    )
    shapes: Shapes = {f"{here}.A_log": (heads,), f"{here}.dt_bias": (heads,)}
    shapes[f"{here}.conv1d.weight"] = (2 * key + value, 1, config["linear_conv_kernel_dim"])
    for name, rows in inputs.items():
        shapes |= linear(f"{here}.{name}", rows, hidden)
    norms = norm(f"{here}.norm", config["linear_value_head_dim"])
    return shapes | norms | linear(f"{here}.out_proj", hidden, value)


def feed_forward(name: str, hidden: int, inner: int, names: tuple[str, str, str]) -> Shapes:
    gate, up, down = names
    return (
        linear(f"{name}.{gate}", inner, hidden)
        | linear(f"{name}.{up}", inner, hidden)
        | linear(f"{name}.{down}", hidden, inner)
    )


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def mlp(config: Config, block: str) -> Shapes:
    return feed_forward(f"{block}.mlp", config["hidden_size"], config["intermediate_size"], PROJECTIONS)


def mlp_fused(config: Config, block: str) -> Shapes:
    """Gate and up in one matrix."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return linear(f"{block}.mlp.gate_up_proj", 2 * inner, hidden) | linear(f"{block}.mlp.down_proj", hidden, inner)


def experts(config: Config, block: str) -> Shapes:
    """A router and one small MLP for each expert: Qwen and DeepSeek."""
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    count = config.get("num_experts") or config["n_routed_experts"]
    shapes = linear(f"{block}.mlp.gate", count, hidden)
    for expert in range(count):
        shapes |= feed_forward(f"{block}.mlp.experts.{expert}", hidden, inner, PROJECTIONS)
    return shapes


def experts_mixtral(config: Config, block: str) -> Shapes:
    hidden, inner, here = config["hidden_size"], config["intermediate_size"], f"{block}.block_sparse_moe"
    shapes = linear(f"{here}.gate", config["num_local_experts"], hidden)
    for expert in range(config["num_local_experts"]):
        shapes |= feed_forward(f"{here}.experts.{expert}", hidden, inner, ("w1", "w3", "w2"))
    return shapes


def experts_minimax(config: Config, block: str) -> Shapes:
    bias = {f"{block}.block_sparse_moe.e_score_correction_bias": (config["num_local_experts"],)}
    return experts_mixtral(config, block) | bias


def experts_qwen2(config: Config, block: str) -> Shapes:
    """Experts and a shared one with its gate."""
    return experts(config, block) | shared_expert(config, block)


def shared_expert(config: Config, block: str) -> Shapes:
    hidden, inner = config["hidden_size"], config["shared_expert_intermediate_size"]
    shared = feed_forward(f"{block}.mlp.shared_expert", hidden, inner, PROJECTIONS)
    return shared | linear(f"{block}.mlp.shared_expert_gate", 1, hidden)


def experts_deepseek(config: Config, block: str) -> Shapes:
    """Experts and shared ones, without the correction bias of V3."""
    inner = config["moe_intermediate_size"] * config["n_shared_experts"]
    return experts(config, block) | feed_forward(
        f"{block}.mlp.shared_experts", config["hidden_size"], inner, PROJECTIONS
    )


def experts_deepseek3(config: Config, block: str) -> Shapes:
    bias = {f"{block}.mlp.gate.e_score_correction_bias": (config["n_routed_experts"],)}
    return experts_deepseek(config, block) | bias


def experts_stacked(config: Config, block: str, *, transposed: bool = False) -> Shapes:
    """Two 3-D tensors for all experts, [experts, out, in] or [experts, in, out]."""
    hidden, inner, count = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    up, down = (2 * inner, hidden), (hidden, inner)
    here = f"{block}.mlp.experts"
    return linear(f"{block}.mlp.gate", count, hidden) | {
        f"{here}.gate_up_proj": (count, *(up[::-1] if transposed else up)),
        f"{here}.down_proj": (count, *(down[::-1] if transposed else down)),
    }


def experts_llama4(config: Config, block: str) -> Shapes:
    hidden, inner, count = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    here = f"{block}.feed_forward"
    return (
        linear(f"{here}.router", count, hidden)
        | {
            f"{here}.experts.gate_up_proj": (count, hidden, 2 * inner),
            f"{here}.experts.down_proj": (count, inner, hidden),
        }
        | feed_forward(f"{here}.shared_expert", hidden, inner, PROJECTIONS)
    )


def experts_gpt_oss(config: Config, block: str) -> Shapes:
    """In bf16; `packed.gpt_oss_mxfp4` makes blocks and scales of them, as on the Hub."""
    hidden, inner, count = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    here = f"{block}.mlp.experts"
    return linear(f"{block}.mlp.router", count, hidden, bias=True) | {
        f"{here}.gate_up_proj": (count, hidden, 2 * inner),
        f"{here}.gate_up_proj_bias": (count, 2 * inner),
        f"{here}.down_proj": (count, inner, hidden),
        f"{here}.down_proj_bias": (count, hidden),
    }


TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
GLM_NORMS = (*TWO_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")


def block(config: Config, name: str, attend: Piece, feed: Piece, norms: tuple[str, ...] = TWO_NORMS) -> Shapes:
    shapes = attend(config, name) | feed(config, name)
    for each in norms:
        shapes |= norm(f"{name}.{each}", config["hidden_size"])
    return shapes


def decoder(
    config: Config,
    attend: Piece,
    feed: Piece,
    *,
    norms: tuple[str, ...] = TWO_NORMS,
    under: str = "model",
    head: str = "lm_head",
) -> Shapes:
    """Embedding, blocks, last norm, and a head unless it is tied; dense MLPs in the first `first_k_dense_replace`."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {f"{under}.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(config["num_hidden_layers"]):
        dense = index < config.get("first_k_dense_replace", 0)
        shapes |= block(config, f"{under}.layers.{index}", attend, mlp if dense else feed, norms)
    shapes |= norm(f"{under}.norm", hidden)
    return shapes if config["tie_word_embeddings"] else shapes | linear(head, vocabulary, hidden)


def hybrid(config: Config, feed: Piece, *, split: bool, under: str = "model") -> Shapes:
    """Qwen3-Next and Qwen3.5: linear attention, and full attention where `layer_types` says so; one `mtp.` block."""
    shapes = decoder(config | {"num_hidden_layers": 0}, attention_normed, feed, under=under)
    for index, kind in enumerate(config["layer_types"]):
        full = kind == "full_attention"
        attend: Piece = attention_normed if full else lambda c, name: linear_attention(c, name, split=split)
        shapes |= block(config, f"{under}.layers.{index}", attend, feed)
    hidden = config["hidden_size"]
    shapes |= block(config, "mtp.layers.0", attention_normed, feed) | linear("mtp.fc", hidden, 2 * hidden)
    for name in ("mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"):
        shapes |= norm(name, hidden)
    return shapes


def with_nextn(config: Config, attend: Piece, feed: Piece) -> Shapes:
    """A decoder and, as block `num_hidden_layers`, the multi-token-prediction layer of DeepSeek-V3 and GLM-4.5."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    name = f"model.layers.{config['num_hidden_layers']}"
    shapes = decoder(config, attend, feed) | block(config, name, attend, feed)
    shapes |= linear(f"{name}.eh_proj", hidden, 2 * hidden) | linear(f"{name}.shared_head.head", vocabulary, hidden)
    for each in ("enorm", "hnorm", "shared_head.norm"):
        shapes |= norm(f"{name}.{each}", hidden)
    return shapes | {f"{name}.embed_tokens.weight": (vocabulary, hidden)}
