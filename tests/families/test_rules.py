"""The rules of every family, module name by module name, and that the families' data is well formed."""

from __future__ import annotations

import importlib
import re

import pytest

from roundel.families import Family, family_of, kept_reason, known_types, text_config
from roundel.families.generic import CONVOLUTION, EMBEDDING, HEAD, MTP, NORM, ROUTER, TOWER
from roundel.families.glm4_moe_lite import DENSE_MLP
from roundel.families.glm_moe_dsa import INDEXER

CONV1D = "Conv1D, stored [in, out]: not a linear layer to those who load it"


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.self_attn.q_a_proj",
        "model.layers.0.self_attn.kv_a_proj_with_mqa",
        "encoder.layer.0.attention.output.dense",
        "model.layers.0.self_attn.indexer_head_proj",
        "model.layers.0.output_proj",
        "model.layers.0.conv.in_proj",
        "model.layers.0.converter",
        "model.layers.0.embedding_hidden_mapping_in",
        "model.layers.0.normalizer_proj",
        "model.layers.0.per_layer_input_gate",
        "model.layers.0.mlp.experts.3.down_proj",
        "model.decoder.project_in",
        "gpt_neox.layers.0.mlp.dense_h_to_4h",
    ],
)
def test_general_rules_take_no_part_of_a_word(module: str) -> None:
    family = family_of({"model_type": "nobody_named_this"})
    assert family.guess
    assert family.name == "generic"
    assert kept_reason(module, {"num_hidden_layers": 2}, family) is None


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("lm_head", HEAD),
        ("language_model.lm_head", HEAD),
        ("embed_out", HEAD),
        ("output", HEAD),
        ("model.embed_tokens", EMBEDDING),
        ("model.embed_tokens_per_layer", EMBEDDING),
        ("bert.embeddings.word_embeddings", EMBEDDING),
        ("transformer.wpe", EMBEDDING),
        ("model.layers.0.mlp.gate", ROUTER),
        ("model.layers.0.mlp.gate.wg", ROUTER),
        ("transformer.blocks.0.ffn.router.layer", ROUTER),
        ("model.layers.0.mlp.shared_expert_gate", ROUTER),
        ("model.layers.2.mlp.down_proj", MTP),
        ("model.mtp.layers.0.self_attn.q_proj", MTP),
        ("model.layers.0.self_attn.q_norm", NORM),
        ("model.layers.0.self_attn.k_conv1d", CONVOLUTION),
        ("model.layers.0.short_conv.conv", CONVOLUTION),
        ("model.layers.0.mlp_sconv", CONVOLUTION),
        ("model.vision_tower.layers.0.self_attn.q_proj", TOWER),
        ("visual.blocks.0.attn.qkv", TOWER),
        ("audio_tower.layers.0.fc1", TOWER),
        ("model.embed_vision.embedding_projection", TOWER),
        ("mm_projector.proj.0", TOWER),
        ("model.multi_modal_projector.linear_1", TOWER),
        ("model.layers.0.self_attn.qkv_proj.lora_A.speech", TOWER),
    ],
)
def test_general_rules(module: str, reason: str) -> None:
    assert kept_reason(module, {"num_hidden_layers": 2}, family_of({})) == reason


@pytest.mark.parametrize(
    ("model_type", "module", "reason"),
    [
        ("longcat_flash", "model.layers.0.mlp.router.classifier", ROUTER),
        ("longcat_flash", "model.layers.0.mlps.1.gate_proj", None),
        ("longcat_flash", "model.mtp.layers.0.self_attn.q_a_proj", MTP),
        ("step3p5", "model.layers.3.moe.gate", ROUTER),
        ("step3p5", "model.layers.3.moe.experts.7.gate_proj", None),
        ("step3p5", "model.layers.3.share_expert.up_proj", None),
        ("step3p5", "model.layers.3.self_attn.g_proj", "attention gate: one row for each head"),
        ("step3p5", "model.layers.45.eh_proj", MTP),
        ("step3p5", "model.layers.45.mlp.up_proj", MTP),
        ("step3p7", "vit_large_projector", TOWER),
        ("kimi_k25", "vision_tower.encoder.blocks.0.wqkv", TOWER),
        ("kimi_k25", "mm_projector.proj.0", TOWER),
        ("kimi_k25", "language_model.model.layers.1.mlp.experts.3.up_proj", None),
        ("kimi_k25", "language_model.lm_head", HEAD),
        ("bagel", "language_model.model.layers.0.self_attn.q_proj", None),
        ("bagel", "vit_model.vision_model.encoder.layers.0.mlp.fc1", TOWER),
        ("bagel", "connector.fc1", TOWER),
        ("glm5_next", "model.language_model.layers.0.mlp.gate_proj", DENSE_MLP.reason),
        ("glm5_next", "model.language_model.layers.3.self_attn.indexer.wk", INDEXER.reason),
        ("glm5_next", "model.language_model.layers.3.mlp.experts.0.up_proj", None),
        ("glm5_next", "model.language_model.layers.3.mlp.shared_experts.up_proj", None),
        ("glm5_next", "model.language_model.layers.45.mlp.experts.0.up_proj", MTP),
        ("qwen4_exp", "model.language_model.layers.0.mlp.experts.0.up_proj", None),
        ("qwen4_exp", "model.language_model.layers.0.linear_attn.out_proj", None),
        ("gpt2", "h.0.attn.c_attn", CONV1D),
        ("kimi_k2", "model.layers.45.mlp.gate_proj", MTP),
    ],
)
def test_rules_of_families_without_a_pico_checkpoint(model_type: str, module: str, reason: str | None) -> None:
    config = {"model_type": model_type, "num_hidden_layers": 45}
    assert kept_reason(module, config, family_of(config)) == reason


@pytest.mark.parametrize(
    ("model_type", "module"),
    [
        ("bagel", "language_model.model.layers.0.self_attn.q_proj_moe_gen"),
        ("bagel", "language_model.model.layers.0.mlp_moe_gen.gate_proj"),
        ("glm5_next", "model.language_model.layers.3.self_attn.q_proj"),
        ("qwen4_exp", "model.language_model.layers.0.attn_hyper_connection.input_mix_weight_down"),
        ("qwen4_exp", "model.language_model.hyper_connection_mixer.input_mix_weight_up"),
        ("qwen4_exp", "model.language_model.layers.1.ple.ple_embedding.ngram_embedding.shard_3"),
        ("qwen4_exp", "model.language_model.layers.1.self_attn.indexer.index_qk_proj"),
        ("qwen4_exp", "model.language_model.layers.1.mlp.shared_expert.up_proj"),
    ],
)
def test_kept_for_a_reason_of_the_family(model_type: str, module: str) -> None:
    family = family_of({"model_type": model_type})
    assert kept_reason(module, {}, family) in {rule.reason for rule in family.kept}


def test_step_experts_are_split_under_a_name_of_their_own() -> None:
    family = family_of({"model_type": "step3p7", "text_config": {"model_type": "step3p5"}})
    (rule,) = (r for r in family.fused_experts if r.projections == ("up_proj",))
    match = re.fullmatch(rule.tensor, "model.layers.3.moe.up_proj.weight")
    assert match is not None
    module = rule.into.format(block=match["block"], expert=5, projection="up_proj")
    assert module == "model.layers.3.moe.experts.5.up_proj"
    assert re.search(family.experts, module)
    assert re.fullmatch(rule.tensor, "model.layers.3.share_expert.up_proj.weight") is None


def test_family_of_looks_at_the_wrapper_first_and_at_its_text_model_then() -> None:
    wrapped = {"model_type": "somebodys_wrapper", "text_config": {"model_type": "qwen3_moe", "num_hidden_layers": 2}}
    assert family_of(wrapped).name == "Qwen3-MoE"
    assert (
        family_of({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}).name == "Gemma 3, multimodal"
    )
    assert text_config(wrapped)["num_hidden_layers"] == 2
    assert kept_reason("model.layers.2.mlp.up_proj", wrapped, family_of(wrapped)) == MTP


@pytest.mark.parametrize("model_type", known_types())
def test_data_is_well_formed(model_type: str) -> None:
    module = importlib.import_module(f"roundel.families.{model_type}")
    family: Family = module.FAMILY
    assert "FAMILY" in module.__all__
    assert (module.__doc__ or "").endswith(".")
    assert not family.guess
    for rule in family.kept:
        assert rule.reason
        assert re.search(r"\.\d", rule.pattern) is None, "rules name no block or expert by number"
    for fused in family.fused_experts:
        assert "block" in re.compile(fused.tensor).groupindex
        assert re.search(family.experts, fused.into.format(block="b", expert=0, projection="p"))
    assert family.embedding.endswith(".weight")
    assert kept_reason(family.head, {}, family) == HEAD
    assert kept_reason(family.embedding.removesuffix(".weight"), {}, family) == EMBEDDING


def test_names_are_different_and_types_are_spelled_as_transformers_spells_them() -> None:
    names = [family_of({"model_type": t}).name for t in known_types()]
    assert len(set(names)) == len(names)
    mapping = pytest.importorskip("transformers.models.auto.configuration_auto")
    remote_code_only = {"bagel", "kimi_k2", "step3p5"}
    assert set(known_types()) - remote_code_only <= set(mapping.CONFIG_MAPPING_NAMES)
