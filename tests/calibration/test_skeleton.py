"""The skeleton computes what transformers' loaded model computes, for every family there is a pico checkpoint of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.cases import Case, make_case, tokens_of, weights_of
from models import pico
from roundel.calibration.skeleton import Skeleton
from roundel.checkpoint import Checkpoint, open_checkpoint
from roundel.errors import PlanError, SourceError
from roundel.families import family_of


@pytest.fixture(scope="module", params=pico.PICO_TYPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    made = make_case(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    made.checkpoint.close()


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 3])
def test_logits_are_those_of_the_loaded_model(case: Case, samples: int) -> None:
    tokens = tokens_of(samples)
    expected = case.model(input_ids=tokens).logits
    torch.testing.assert_close(case.logits(tokens), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_no_parameter_is_allocated(case: Case) -> None:
    blocks = [recorder.block for recorder in case.skeleton._recorders]
    assert all(p.is_meta for module in (case.skeleton._model, *blocks) for p in module.parameters())


def test_every_tensor_of_the_text_model_has_one_place(case: Case) -> None:
    names = [*case.skeleton.entry_tensors, *(name for piece in case.pieces for name in piece.tensors)]
    tied = {f"{case.checkpoint.family.head}.weight"} if case.checkpoint.is_tied else set()
    stored = {n for n in case.checkpoint.tensor_names if not any(f"{b}." in f"{n}." for b in beside(case))}
    assert sorted(names) == sorted(stored | tied)


def beside(case: Case) -> set[str]:
    """Modules of the checkpoint that are no part of the text model, or predict tokens further on."""
    return {"mtp", "visual", "vision_tower", "vision_model", "multi_modal_projector", "model.layers.2"}


def test_blocks_go_by_the_names_of_the_checkpoint(case: Case) -> None:
    for number, block in enumerate(case.skeleton.blocks):
        assert any(block.name == f"{blocks}.{number}" for blocks in case.checkpoint.family.blocks)
        assert all(name.startswith(block.name + ".") for name in block.tensors)
        matrices = [m.name for m in case.checkpoint.matrices.values() if m.name.startswith(block.name + ".")]
        assert sorted(block.modules) == sorted(matrices)


def test_batches_of_any_size_follow_each_other(tmp_path: Path) -> None:
    """Samples are drawn at random: what blocks are called with is kept for each number of them and each length."""
    case = make_case("gemma3_text", tmp_path)
    for samples, length in ((2, 40), (5, 40), (1, 17), (2, 40)):
        tokens = tokens_of(samples, seed=samples, length=length)
        with torch.no_grad():
            expected = case.model(input_ids=tokens).logits
            whole = case.logits(tokens)
            one_by_one = torch.cat([case.logits(tokens[i : i + 1]) for i in range(samples)])
        torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(one_by_one, expected, rtol=0, atol=1e-5)


def test_blocks_run_without_tokens(tmp_path: Path) -> None:
    """A resumed run has hidden states only."""
    case = make_case("gemma2", tmp_path)
    x = case.inputs(1, tokens_of(2))
    resumed = Skeleton(case.checkpoint.source.config, case.checkpoint.family, case.checkpoint.tensor_names)
    assert torch.equal(resumed.blocks[1].forward(x, case.weights), case.skeleton.blocks[1].forward(x, case.weights))


def test_a_tied_head_is_a_matrix_of_its_own(tmp_path: Path) -> None:
    """It is read from the embedding, and may be rounded though the embedding is not."""
    case, tokens = make_case("gemma2", tmp_path), tokens_of(1)
    assert case.checkpoint.is_tied and case.skeleton.tail.name == "lm_head"
    assert torch.equal(case.weights["lm_head.weight"], case.weights["model.embed_tokens.weight"])
    half = dict(case.weights) | {"lm_head.weight": case.weights["lm_head.weight"] / 2}
    with torch.no_grad():
        whole, halved = case.logits(tokens), case.logits(tokens, half)
    cap = 30.0  # the model's last words: cap * tanh(logits / cap)
    torch.testing.assert_close((halved / cap).atanh() * 2, (whole / cap).atanh(), rtol=1e-4, atol=1e-6)


def test_a_checkpoint_may_be_named_as_newer_releases_name_it() -> None:
    config = pico.config_of("gemma3")
    renamed = ("language_model.model.", "model.language_model."), ("vision_tower.", "model.vision_tower.")
    names = list(pico.shapes_of("gemma3"))
    for old, new in renamed:
        names = [new + name.removeprefix(old) if name.startswith(old) else name for name in names]
    skeleton = Skeleton(config, family_of(config), [*names, "lm_head.weight"])
    assert [block.name for block in skeleton.blocks] == [f"model.language_model.layers.{n}" for n in range(2)]
    assert skeleton.entry_tensors == ("model.language_model.embed_tokens.weight",)
    assert skeleton.tail.name == "lm_head"


SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "pad_token_id": 2,
}


def saved(model_type: str, folder: Path, **settings: Any) -> tuple[Any, Checkpoint]:
    """A model that transformers draws and saves, and its checkpoint."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | settings))
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    made.save_pretrained(folder)
    return made, open_checkpoint(folder)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}),  # ALiBi, norms behind an embedding whose name no family knows
        ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # fused under names that no rule splits
        ("falcon_h1", {}),  # an infinity in its config.json
        ("gpt_neox", {}),  # attention and MLP side by side
        ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
    ],
)
def test_types_without_a_family_run_too(model_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, checkpoint = saved(model_type, tmp_path, **settings)
    assert checkpoint.family.guess
    skeleton = Skeleton(checkpoint.source.config, checkpoint.family, checkpoint.tensor_names)
    case = Case(checkpoint, model, skeleton, weights_of(skeleton, checkpoint))
    tokens = tokens_of(2)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        torch.testing.assert_close(case.logits(tokens), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_a_block_that_is_given_several_streams_is_refused(tmp_path: Path) -> None:
    """Gemma 3n carries four hidden states, and embeddings of the tokens into every block."""
    settings = {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1}
    _, checkpoint = saved("gemma3n_text", tmp_path, laurel_rank=8, head_dim=16, **settings)
    with pytest.raises(PlanError, match=r"block 0 is called with an argument \(shared_kv_states\).*opt-rtn"):
        Skeleton(checkpoint.source.config, checkpoint.family, checkpoint.tensor_names)


def test_a_packed_checkpoint_runs_with_what_it_decodes_to(tmp_path: Path) -> None:
    """gpt_oss as on the Hub, its experts in MXFP4: transformers given the decoded matrices is the reference."""
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    case = make_case("gpt_oss", plain)
    pico.build("gpt_oss", packed, dtype="float32", sliding_window=16)
    checkpoint = open_checkpoint(packed)
    skeleton = Skeleton(checkpoint.source.config, checkpoint.family, checkpoint.tensor_names)
    assert [b.tensors for b in skeleton.blocks] == [b.tensors for b in case.skeleton.blocks]
    decoded = dict(case.weights) | {n: checkpoint.tensor(n).float() for b in skeleton.blocks for n in b.tensors}
    state = case.model.state_dict()
    for number in range(2):
        stem = f"model.layers.{number}.mlp.experts"
        for expert in range(4):
            gate, up, down = (decoded[f"{stem}.{expert}.{p}_proj.weight"] for p in ("gate", "up", "down"))
            state[f"{stem}.gate_up_proj"][expert] = torch.stack([gate, up], 1).flatten(0, 1).T
            state[f"{stem}.down_proj"][expert] = down.T
    tokens = tokens_of(2)
    with torch.no_grad():
        x = skeleton.enter(tokens, decoded)
        for piece in (*skeleton.blocks, skeleton.tail):
            x = piece.forward(x, decoded)
        expected = case.model(input_ids=tokens).logits
        assert not torch.allclose(case.logits(tokens), expected, atol=1e-3)  # the packing does change it
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_a_block_that_needs_what_the_one_before_found_is_refused(tmp_path: Path) -> None:
    """GLM-5 can share the choice of tokens between blocks; with an indexer in each it runs (above)."""
    types = {"indexer_types": ["full", "shared"]}
    config = pico.config_of("glm_moe_dsa") | types
    with pytest.raises(PlanError, match=r"GlmMoeDsaDecoderLayer cannot be run on hidden states alone.*opt-rtn"):
        Skeleton(config, family_of(config), pico.shapes_of("glm_moe_dsa"))


def test_a_model_type_nobody_knows_is_refused() -> None:
    config = pico.config_of("llama") | {"model_type": "nonesuch", "architectures": ["NonesuchForCausalLM"]}
    with pytest.raises(PlanError, match=r"does not know the model type 'nonesuch'.*opt-rtn"):
        Skeleton(config, family_of(config), pico.shapes_of("llama"))


def test_a_config_its_class_refuses_is_named() -> None:
    config = pico.config_of("llama") | {"rope_scaling": {"rope_type": "nonesuch"}}
    with pytest.raises(PlanError, match=r"cannot build a 'llama' model of this config.json.*nonesuch"):
        Skeleton(config, family_of(config), pico.shapes_of("llama"))


def test_a_missing_tensor_is_named() -> None:
    config, names = pico.config_of("llama"), list(pico.shapes_of("llama"))
    names.remove("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(SourceError, match=r"no tensor for transformers' model\.layers\.1\.mlp\.up_proj\.weight"):
        Skeleton(config, family_of(config), names)


def test_blocks_under_another_name_are_not_found() -> None:
    config = pico.config_of("llama")
    names = [name.replace("model.layers", "model.stages") for name in pico.shapes_of("llama")]
    with pytest.raises(PlanError, match=r"no tensor of the checkpoint is one of a decoder block \(model\.layers\)"):
        Skeleton(config, family_of(config), names)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc, which is Linux's"
)
def test_a_model_of_any_size_takes_no_memory() -> None:
    """A Llama of 70B, 8 of its blocks: 34 GB of float32."""
    shape = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 8,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    }
    config, names = pico.config_of("llama", **shape), pico.shapes_of("llama", **shape)
    Skeleton(pico.config_of("llama"), family_of(config), pico.shapes_of("llama"))  # what importing takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    skeleton = Skeleton(config, family_of(config), names)
    assert len(skeleton.blocks) == 8
    assert kilobytes("VmHWM") - before < 100_000


def kilobytes(field: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])
