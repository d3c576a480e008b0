r"""The rules that hold for every family, and the guess for a model type no file is named after.

Patterns match whole parts of a module's name, which `\b` delimits: "mlp.gate" is a router and "mlp.gate_proj" is not,
"embed_out" is a head and "attention.output.dense" is not.
"""

from __future__ import annotations

from roundel.families.family import Family, FusedExperts, Keep

__all__ = [
    "CONV1D",
    "CONVOLUTION",
    "EMBEDDING",
    "FAMILY",
    "FUSED_EXPERTS",
    "HEAD",
    "KEPT",
    "MTP",
    "NORM",
    "ROUTER",
    "TOWER",
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
