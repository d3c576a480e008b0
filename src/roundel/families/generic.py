r"""The rules that hold for every family, and the guess for a model type no file is named after.

Patterns match whole parts of a module's name, which `\b` delimits: "mlp.gate" is a router and "mlp.gate_proj" is not,
"embed_out" is a head and "attention.output.dense" is not.
"""

from __future__ import annotations

from roundel.families.family import Family, FusedExperts, Keep, SpaceRule

__all__ = [
    "ATTENTION_INPUT",
    "CONV1D",
    "CONVOLUTION",
    "EMBEDDING",
    "FAMILY",
    "FEED_INPUT",
    "FUSED_EXPERTS",
    "HEAD",
    "INNER",
    "KEPT",
    "MTP",
    "NORM",
    "ROUTER",
    "SPACES",
    "TOWER",
    "VALUES",
]

CONVOLUTION = "convolution"
EMBEDDING = "embedding"
CONV1D = "Conv1D, stored [in, out]: not a linear layer to those who load it"
HEAD = "output head; asked for with --quant-lm-head"
MTP = "multi-token-prediction layer"
NORM = "norm"
ROUTER = "router: too small and too sensitive to round"
TOWER = "vision or audio tower"

KEPT = (
    Keep(pattern=r"\b(visual|vision|vit|image|img|audio|speech|wav|waveform)([0-9_]\w*)?\b", reason=TOWER),
    Keep(pattern=r"\b((mm|multi_?modal)_projector|embed_(vision|audio))\b", reason=TOWER),
    Keep(pattern=r"\b(mtp|mtp_block|mtp_layers|nextn)\b|\b(eh_proj|shared_head\.head)$", reason=MTP),
    Keep(pattern=r"\b(gate|gate\.wg|shared_expert_gate|router(\.[a-z_]+)?)$", reason=ROUTER),
    Keep(pattern=r"\b(lm_head|embed_out)$|^(head|output|classifier|score)$", reason=HEAD),
    Keep(pattern=r"\b(wte|wpe|embed|embed_in|relative_attention_bias)$", reason=EMBEDDING),
    Keep(pattern=r"(\b|_)(embed_(tokens|positions)(_[a-z_]+)?|embeddings?)$", reason=EMBEDDING),
    Keep(pattern=r"\b\w*conv([12]d)?(_?\d+)?$", reason=CONVOLUTION),
    Keep(pattern=r"(\b|_)(layer_?|rms_?|group_?)?norm(_?[0-9a-z])?$", reason=NORM),
)

FUSED_EXPERTS = (
    FusedExperts(tensor=r"(?P<block>.+)\.experts\.gate_up_proj(\.weight)?", projections=("gate_proj", "up_proj")),
    FusedExperts(tensor=r"(?P<block>.+)\.experts\.w13(\.weight|_weight)?", projections=("w1", "w3")),
    FusedExperts(tensor=r"(?P<block>.+)\.experts\.w2(\.weight|_weight)?", projections=("w2",)),
    FusedExperts(tensor=r"(?P<block>.+)\.experts\.down_proj(\.weight)?", projections=("down_proj",)),
)

_FEED = r"(mlp|feed_forward|block_sparse_moe|moe)"
_SHARED = r"(shared_experts?|share_expert)"

ATTENTION_INPUT = SpaceRule(
    writers=(r"input_layernorm",),
    readers=r"self_attn\.(q_proj|k_proj|v_proj|qkv_proj|q_a_proj|kv_a_proj_with_mqa|g_proj)"
    r"|self_attn\.indexer\.(wk|weights_proj)|linear_attn\.in_proj_(qkvz|ba|qkv|z|b|a)",
    kind="norm",
)
LINEAR_ATTENTION = SpaceRule(writers=(r"linear_attn\.norm",), readers=r"linear_attn\.out_proj", kind="norm", offset=0.0)
VALUES = SpaceRule(
    writers=(r"(?P<scope>self_attn)\.v_proj", r"(?P<scope>self_attn)\.qkv_proj"),
    readers=r"{scope}\.o_proj",
    kind="values",
)
LATENT_SPACES = (
    SpaceRule(writers=(r"self_attn\.q_a_layernorm",), readers=r"self_attn\.(q_b_proj|indexer\.wq_b)", kind="norm"),
    SpaceRule(writers=(r"self_attn\.kv_a_layernorm",), readers=r"self_attn\.kv_b_proj", kind="norm"),
    SpaceRule(writers=(r"self_attn\.kv_b_proj",), readers=r"self_attn\.o_proj", kind="latent"),
)
# Where attention and MLP stand side by side, one norm is read by both (Cohere).
FEED_INPUT = SpaceRule(
    writers=(r"pre_feedforward_layernorm", r"post_attention_layernorm", r"input_layernorm"),
    readers=rf"({_FEED}\.((experts\.\d+|{_SHARED})\.)?|{_SHARED}\.)(gate_proj|up_proj|gate_up_proj|w1|w3)"
    rf"|{_FEED}\.(gate|router|shared_expert_gate)",
    kind="norm",
)
INNER = (
    SpaceRule(
        writers=(r"(?P<scope>.+)\.up_proj",), readers=r"{scope}\.down_proj", kind="inner", beside="{scope}.gate_proj"
    ),
    SpaceRule(writers=(r"(?P<scope>.+)\.gate_up_proj",), readers=r"{scope}\.down_proj", kind="inner"),
    SpaceRule(writers=(r"(?P<scope>.+)\.w3",), readers=r"{scope}\.w2", kind="inner", beside="{scope}.w1"),
)
SPACES = (ATTENTION_INPUT, LINEAR_ATTENTION, *LATENT_SPACES, VALUES, FEED_INPUT, *INNER)

FAMILY = Family(
    name="generic",
    fused_experts=FUSED_EXPERTS,
    blocks=(
        "model.layers",
        "model.language_model.layers",
        "language_model.model.layers",
        "model.decoder.layers",
        "transformer.h",
        "transformer.blocks",
        "gpt_neox.layers",
    ),
    guess=True,
)
