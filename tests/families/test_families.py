"""Which matrices of a published checkpoint are linear layers, which stay and why; how fused experts are split."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models import packed
from models.pico import PICO_TYPES, build, config_of, shapes_of, weight_of
from roundel.families import Family, FusedExperts, family_of, kept_reason, known_types, misfit
from roundel.families.generic import EMBEDDING, HEAD, MTP, ROUTER, TOWER
from roundel.families.glm4_moe_lite import DENSE_MLP
from roundel.families.glm_moe_dsa import INDEXER
from roundel.families.qwen3_next import DECAY_GATES
from roundel.tensor import TensorSpec
from roundel.unit import Piece

CONV1D = "Conv1D, stored [in, out]: not a linear layer to those who load it"
INDEXER_WEIGHTS = "head weights of the indexer: one row for each head"

# Model type -> why -> the modules kept for it (fnmatch). Whatever matches nothing here is a linear layer.
LLAMA = {EMBEDDING: ["model.embed_tokens"], HEAD: ["lm_head"]}
QWEN_MOE = LLAMA | {ROUTER: ["model.layers.[01].mlp.gate"]}
QWEN_MOE_SHARED = LLAMA | {ROUTER: ["model.layers.[01].mlp.gate", "model.layers.[01].mlp.shared_expert_gate"]}
MIXTRAL = LLAMA | {ROUTER: ["model.layers.[01].block_sparse_moe.gate"]}
DEEPSEEK = LLAMA | {ROUTER: ["model.layers.1.mlp.gate"]}
NEXTN = DEEPSEEK | {MTP: ["model.layers.2.*"]}
DENSE = {
    DENSE_MLP.reason: ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
}
GEMMA = {EMBEDDING: ["model.embed_tokens"]}
INNER_LLAMA = {
    EMBEDDING: ["language_model.model.embed_tokens"],
    HEAD: ["language_model.lm_head"],
    TOWER: ["vision_tower.*", "multi_modal_projector.*"],
}
QWEN3_VL = {EMBEDDING: ["model.language_model.embed_tokens"], HEAD: ["lm_head"], TOWER: ["model.visual.*"]}
QWEN3_5 = QWEN3_VL | {DECAY_GATES.reason: ["model.language_model.layers.0.linear_attn.in_proj_[ab]"], MTP: ["mtp.*"]}
KEPT: dict[str, dict[str, list[str]]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "phi3": LLAMA,
    "glm4": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "cohere": GEMMA,
    "opt": {EMBEDDING: ["model.decoder.embed_tokens", "model.decoder.embed_positions"]},
    "gpt2": {EMBEDDING: ["transformer.wte", "transformer.wpe"], CONV1D: ["transformer.h.[01].*.c_*"]},
    "qwen2_moe": QWEN_MOE_SHARED,
    "qwen3_moe": QWEN_MOE,
    "qwen3_next": QWEN_MOE_SHARED | {DECAY_GATES.reason: ["model.layers.0.linear_attn.in_proj_ba"], MTP: ["mtp.*"]},
    "mixtral": MIXTRAL,
    "minimax_m2": MIXTRAL,
    "gpt_oss": LLAMA | {ROUTER: ["model.layers.[01].mlp.router"]},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": NEXTN,
    "deepseek_v32": NEXTN | {INDEXER_WEIGHTS: ["model.layers.[01].self_attn.indexer.weights_proj"]},
    "glm4_moe": NEXTN,
    "glm4_moe_lite": NEXTN | DENSE,
    "glm_moe_dsa": NEXTN | DENSE | {INDEXER.reason: ["model.layers.[01].self_attn.indexer.*"]},
    "qwen2_vl": LLAMA | {TOWER: ["visual.*"]},
    "qwen2_5_vl": LLAMA | {TOWER: ["visual.*"]},
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL | {ROUTER: ["model.language_model.layers.[01].mlp.gate"]},
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5
    | {ROUTER: [f"model.language_model.layers.[01].mlp.{name}" for name in ("gate", "shared_expert_gate")]},
    "mistral3": INNER_LLAMA,
    "gemma3": {EMBEDDING: INNER_LLAMA[EMBEDDING], TOWER: ["vision_tower.*"]},
    "llama4_text": LLAMA | {ROUTER: ["model.layers.[01].feed_forward.router"]},
    "llama4": INNER_LLAMA
    | {ROUTER: ["language_model.model.layers.[01].feed_forward.router"]}
    | {TOWER: ["vision_model.*", "multi_modal_projector.*"]},
}
# Two blocks or one, four experts, three projections.
BOTH_BLOCKS = ("qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "minimax_m2", "gpt_oss", "llama4_text", "llama4")
BOTH_BLOCKS_FUSED = ("qwen3_vl_moe", "qwen3_5_moe")
LAST_BLOCK = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa")
EXPERTS = dict.fromkeys(BOTH_BLOCKS + BOTH_BLOCKS_FUSED, 24) | dict.fromkeys(LAST_BLOCK, 12)


@pytest.fixture(scope="session")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Tensor]]:
    """The tensors of a pico checkpoint, each built once and read back from disk."""
    root, read = tmp_path_factory.mktemp("pico"), dict[str, dict[str, Tensor]]()

    def tensors(model_type: str) -> dict[str, Tensor]:
        if model_type not in read:
            folder: Path = build(model_type, root / model_type)
            read[model_type] = load_file(folder / "model.safetensors")
        return read[model_type]

    return tensors


def rule_for(family: Family, name: str) -> tuple[FusedExperts, re.Match[str]] | None:
    matches = [(rule, m) for rule in family.fused_experts if (m := re.fullmatch(rule.tensor, name))]
    assert len(matches) < 2, f"{name} is claimed by {len(matches)} rules"
    return matches[0] if matches else None


def modules(family: Family, tensors: dict[str, Tensor]) -> Iterator[str]:
    """Every 2-D weight's module name, and that of every matrix in a fused tensor."""
    for name, tensor in tensors.items():
        fused = rule_for(family, name)
        if fused is not None and fused[0].part in ("weight", "blocks"):
            rule, match = fused
            for expert in range(tensor.shape[0]):
                for projection in rule.projections:
                    yield rule.into.format(block=match["block"], expert=expert, projection=projection)
        elif fused is None and name.endswith(".weight") and tensor.ndim == 2:
            yield name.removesuffix(".weight")


def cut(rule: FusedExperts, tensor: Tensor, expert: int, projection: str) -> Tensor:
    """One expert's matrix, out first, by what the rule says."""
    part, count = tensor[expert], len(rule.projections)
    part, place = part.T if rule.transposed else part, rule.projections.index(projection)
    return part[place::count] if rule.interleaved else part.chunk(count)[place]


def test_every_pico_type_is_in_the_tables() -> None:
    assert set(KEPT) == set(PICO_TYPES)
    assert set(PICO_TYPES) <= set(known_types())


@pytest.mark.parametrize("model_type", PICO_TYPES)
def test_kept_and_why(model_type: str, tensors: Callable[[str], dict[str, Tensor]]) -> None:
    config, family = config_of(model_type), family_of(config_of(model_type))
    assert not family.guess
    unused = {pattern for patterns in KEPT[model_type].values() for pattern in patterns}
    for module in modules(family, tensors(model_type)):
        expected = None
        for reason, patterns in KEPT[model_type].items():
            hits = {pattern for pattern in patterns if fnmatchcase(module, pattern)}
            expected, unused = (reason, unused - hits) if hits else (expected, unused)
        assert kept_reason(module, config, family) == expected, module
    assert not unused


@pytest.mark.parametrize("model_type", PICO_TYPES)
def test_number_of_experts(model_type: str, tensors: Callable[[str], dict[str, Tensor]]) -> None:
    config, family = config_of(model_type), family_of(config_of(model_type))
    names = [m for m in modules(family, tensors(model_type)) if kept_reason(m, config, family) is None]
    assert len(names) == len(set(names))
    assert sum(1 for name in names if re.search(family.experts, name)) == EXPERTS.get(model_type, 0)


@pytest.mark.parametrize("model_type", PICO_TYPES)
def test_head_embedding_and_blocks_are_where_the_family_says(
    model_type: str, tensors: Callable[[str], dict[str, Tensor]]
) -> None:
    config, family, names = config_of(model_type), family_of(config_of(model_type)), set(tensors(model_type))
    assert family.embedding in names
    assert (f"{family.head}.weight" in names) != config["tie_word_embeddings"]
    assert any(name.startswith(f"{blocks}.1.") for name in names for blocks in family.blocks)


def test_every_tensor_of_three_axes_is_experts_or_a_convolution(
    tensors: Callable[[str], dict[str, Tensor]],
) -> None:
    for model_type in PICO_TYPES:
        family = family_of(config_of(model_type))
        for name, tensor in tensors(model_type).items():
            if tensor.ndim == 3 and "conv" not in name:
                assert rule_for(family, name) is not None, (model_type, name)


Cuts = dict[str, Callable[[Tensor], Tensor]]
HALVES_OF_ROWS: Cuts = {"gate_proj": lambda w: w[:64], "up_proj": lambda w: w[64:], "down_proj": lambda w: w}
HALVES_OF_COLUMNS: Cuts = {
    "gate_proj": lambda w: w[:, :64].T,
    "up_proj": lambda w: w[:, 64:].T,
    "down_proj": lambda w: w.T,
}
LLAMA4: Cuts = {"gate_proj": lambda w: w[:, :128].T, "up_proj": lambda w: w[:, 128:].T, "down_proj": lambda w: w.T}
GPT_OSS: Cuts = {"gate_proj": lambda w: w[:, ::2].T, "up_proj": lambda w: w[:, 1::2].T, "down_proj": lambda w: w.T}


@pytest.mark.parametrize(
    ("model_type", "by_hand"),
    [
        ("qwen3_5_moe", HALVES_OF_ROWS),
        ("qwen3_vl_moe", HALVES_OF_COLUMNS),
        ("llama4", LLAMA4),
        ("gpt_oss", GPT_OSS),
    ],
)
def test_fused_experts_are_cut_as_the_model_reads_them(model_type: str, by_hand: Cuts) -> None:
    """`by_hand` is what the model's forward does with one expert's slice."""
    config, family = config_of(model_type), family_of(config_of(model_type))
    hidden, seen = 64, set[str]()
    for name, shape in shapes_of(model_type).items():
        fused = rule_for(family, name)
        if fused is None or fused[0].part != "weight" or name.startswith("mtp."):
            continue
        rule, weight = fused[0], weight_of(name, shape)
        assert misfit(rule, shape, config) is None
        for place, projection in enumerate(rule.projections):
            matrix = cut(rule, weight, 2, projection)
            assert torch.equal(matrix, by_hand[projection](weight[2]))
            assert matrix.shape[projection != "down_proj"] == hidden
            each = matrix.shape[0]
            piece = Piece(
                tensor=name, index=(2,), start=place * each, stop=(place + 1) * each, transposed=rule.transposed
            )
            if rule.interleaved:
                piece = replace(piece, start=place, stop=None, step=len(rule.projections))
            assert piece.shape(TensorSpec(name, "BF16", shape)) == matrix.shape
            seen.add(projection)
    assert seen == set(by_hand)


def test_packed_gpt_oss_rows_are_those_of_its_matrices(tensors: Callable[[str], dict[str, Tensor]]) -> None:
    """Cutting blocks and scales by the rules gives what packing each expert's matrix by itself gives."""
    family, stored = family_of(config_of("gpt_oss")), tensors("gpt_oss")
    for name, shape in shapes_of("gpt_oss").items():
        plain = rule_for(family, name)
        if plain is None or plain[0].part != "weight":
            continue
        weight = weight_of(name, shape).to(torch.bfloat16).float()
        rules = {part: rule_for(family, f"{name}_{part}") for part in ("blocks", "scales", "bias")}
        for projection in plain[0].projections:
            expected = packed.mxfp4(cut(plain[0], weight, 1, projection).contiguous())
            for part, key in (("blocks", "weight_packed"), ("scales", "weight_scale")):
                found = rules[part]
                assert found is not None
                assert found[0].part == part
                matrix = cut(found[0], stored[f"{name}_{part}"], 1, projection)
                assert torch.equal(matrix.flatten(1), expected[key])
            bias = rules["bias"]
            assert bias is not None
            assert cut(bias[0], stored[f"{name}_bias"], 1, projection).shape == expected["weight_packed"].shape[:1]


def test_misfit_tells_a_tensor_stored_the_other_way_round() -> None:
    config = {"text_config": {"hidden_size": 64}}
    as_stored, other = (family_of({"model_type": t}).fused_experts for t in ("qwen3_vl_moe", "qwen3_5_moe"))
    for shape, right, wrong in (((4, 64, 128), 0, 0), ((4, 32, 64), 3, 3)):
        assert misfit(as_stored[right], shape, config) is None
        assert "hidden_size (64)" in (misfit(other[wrong], shape, config) or "")
    # A latent space narrower than the residual stream says nothing about the order.
    assert misfit(other[0], (4, 128, 48), config) is None
    assert misfit(other[0], (4, 64, 64), config) is None
    assert misfit(other[0], (4, 64, 128), {}) is None
