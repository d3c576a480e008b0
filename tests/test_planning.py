"""Plans: every tensor accounted for, every wish answered, all problems at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import roundel
from commands import command
from models.pico import PICO_TYPES, build
from roundel.checkpoint import open_checkpoint
from roundel.data.bundled import bundled_model
from roundel.errors import PlanError
from roundel.planning import Plan, build_plan
from roundel.planning.room import unit_memory
from roundel.recipe import Recipe


def plan_of(folder: Path, **wishes: object) -> Plan:
    checkpoint = open_checkpoint(folder)
    try:
        return build_plan(checkpoint, Recipe(**wishes))  # type: ignore[arg-type]
    finally:
        checkpoint.close()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("model_type", PICO_TYPES)
def test_every_family_plans_with_every_tensor_used_once(model_type: str, tmp_path: Path) -> None:
    """No tensor is lost, none is written twice, and every matrix that stays says why."""
    folder = build(model_type, tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    try:
        plan = build_plan(checkpoint, Recipe(scheme="W4A16G32"))
    except PlanError as error:
        assert model_type == "gpt2", error  # every matrix of GPT-2 is a Conv1D
        assert "every matrix is kept" in str(error)
        return
    finally:
        checkpoint.close()
    assert not checkpoint.family.guess
    read: list[str] = []
    for work in plan.works:
        if work.layer is not None:
            read += [p.tensor for p in work.layer.stored.parts.values()]
        read += [c.piece.tensor for c in work.copies]
    assert set(read) | set(checkpoint.dropped) == set(checkpoint.source.tensors)
    written = [name for shard in plan.outputs[0].shards for name in shard.places]
    assert len(written) == len(set(written))
    assert all(k.reason for k in plan.kept)
    assert len({w.name for w in plan.works}) == len(plan.works)


def test_all_problems_at_once(llama: Path) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(
            llama,
            scheme="W5A16G32",
            formats=("auto_gptq", "auto_awq"),
            layer_config={"k_prj": "W8A16"},
            ignore_layers=("zzz",),
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    for words in (
        "k_prj",
        "Did you mean 'k_proj'",
        "zzz",
        "auto_gptq stores",
        "auto_awq stores 4-bit only",
        "Use format auto_round",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("layer_config", "layer", "name"),
    [
        ({"k_proj": {"bits": 8}}, "model.layers.1.self_attn.k_proj", "W8A16G32"),
        ({"model.layers.1.self_attn.k_proj": "W2A16G32"}, "model.layers.1.self_attn.k_proj", "W2A16G32"),
        ({r"layers\.[01]\.mlp": {"bits": 3}}, "model.layers.1.mlp.up_proj", "W3A16G32"),
        ({"layers.1": {"bits": 8}}, "model.layers.1.mlp.up_proj", "W8A16G32"),
        ({"model.layers.1.mlp.up_proj": "W2A16G32", "up_proj": "W8A16G32"}, "model.layers.1.mlp.up_proj", "W2A16G32"),
        ({"mlp": "W8A16G32", "up_proj": {"bits": 2}}, "model.layers.1.mlp.up_proj", "W2A16G32"),
        ({"_proj": {"sym": False}}, "model.layers.1.mlp.up_proj", "W4A16G32_ASYM"),
    ],
)
def test_overrides(llama: Path, layer_config: dict[str, object], layer: str, name: str) -> None:
    plan = plan_of(llama, scheme="W4A16G32", layer_config=layer_config)
    found = next(x for x in plan.layers if x.name == layer)
    assert found.scheme.name == name
    assert "layer_config" in plan.origins[layer]


def test_override_of_one_block_is_not_of_ten(tmp_path: Path) -> None:
    folder = build("llama", tmp_path, num_hidden_layers=11)
    plan = plan_of(folder, scheme="W4A16G32", layer_config={"layers.1": {"bits": 8}})
    eight = {x.name.split(".")[2] for x in plan.layers if x.scheme.bits == 8}
    assert eight == {"1"}


def test_ignored_and_sixteen_bit_layers_stay(llama: Path) -> None:
    plan = plan_of(llama, scheme="W4A16G32", ignore_layers=("down_proj",), layer_config={"q_proj": {"bits": 16}})
    reasons = {k.name: k.reason for k in plan.kept}
    assert reasons["model.layers.0.mlp.down_proj"] == "ignore_layers 'down_proj'"
    assert reasons["model.layers.0.self_attn.q_proj"] == "layer_config 'q_proj'"
    extra = plan.outputs[0].config["extra_config"]
    assert extra["model.layers.0.mlp.down_proj"] == {"bits": 16, "data_type": "float"}  # type: ignore[index]


def test_patterns_do_not_wake_kept_layers_but_exact_names_do(llama: Path) -> None:
    with pytest.raises(PlanError, match="matches only matrices that are kept"):
        plan_of(llama, scheme="W4A16G32", layer_config={"embed_tokens": "W8A16G32"})
    plan = plan_of(llama, scheme="W4A16G32", layer_config={"lm_head": "W8A16G32"})
    assert next(x for x in plan.layers if x.name == "lm_head").scheme.bits == 8


def test_mix_gives_experts_their_own_width(tmp_path: Path) -> None:
    plan = plan_of(build("qwen3_moe", tmp_path), scheme="W4A16_MIXED")
    for layer in plan.layers:
        assert layer.scheme.bits == (4 if ".experts." in layer.name else 8)


def test_tied_head_is_untied_when_asked(tmp_path: Path) -> None:
    folder = build("llama", tmp_path, tie_word_embeddings=True)
    assert not plan_of(folder, scheme="W4A16G32").untied
    plan = plan_of(folder, scheme="W4A16G32", quant_lm_head=True)
    assert plan.untied
    names = [n for s in plan.outputs[0].shards for n in s.places]
    assert "lm_head.qweight" in names
    assert "model.embed_tokens.weight" in names


def test_plan_depends_on_what_shapes_the_output_and_nothing_else(llama: Path) -> None:
    first = plan_of(llama, scheme="W4A16G32")
    assert first.fingerprint == plan_of(llama, scheme="W4A16G32").fingerprint
    assert first.fingerprint != plan_of(llama, scheme="W4A16G32", sym=False).fingerprint
    assert first.fingerprint != plan_of(llama, scheme="W4A16G32", shard_size="50kB").fingerprint


def test_nothing_to_round_is_said(llama: Path) -> None:
    with pytest.raises(PlanError, match="every matrix is kept"):
        plan_of(llama, scheme="W4A16G32", ignore_layers=("_proj",))


def test_unknown_family_is_a_guess_that_says_so(tmp_path: Path) -> None:
    import json

    folder = build("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "brand_new"}))
    plan = plan_of(folder, scheme="W4A16G32")
    assert "guess" in plan.family
    assert any("brand_new" in note for note in plan.notes)


def test_what_a_reader_does_not_load_is_said_beforehand(tmp_path: Path) -> None:
    folder = build("qwen3_moe", tmp_path)
    plan = plan_of(folder, scheme="W4A16G32", sym=False, quant_lm_head=True, formats=("auto_gptq", "auto_awq"))
    text = " ".join(plan.notes)
    for words in (
        "auto_gptq: transformers does not read a quantized output head",
        "experts of AWQ files",
        "asymmetric",
    ):
        assert words in text
    assert not plan_of(folder, scheme="W4A16G32").notes


def test_a_routers_name_does_not_reach_the_gate_projections(tmp_path: Path) -> None:
    folder = build("qwen3_moe", tmp_path)
    plan = plan_of(folder, scheme="W4A16G32", ignore_layers=("gate",))
    assert not any("gate_proj" in k.name for k in plan.kept)
    with pytest.raises(PlanError, match="matches only matrices that are kept"):
        plan_of(folder, scheme="W4A16G32", layer_config={"gate": "W8A16G32"})


@pytest.mark.parametrize("formats", ["gguf:q4_0,gguf:q8_0", "gguf:f16,fake", "fake,gguf:f16"])
def test_formats_that_decide_are_not_written_together(formats: str) -> None:
    with pytest.raises(PlanError, match=r"decides how every tensor is stored, and .* cannot share that"):
        roundel.plan(bundled_model(), format=formats)


def test_a_plan_counts_the_activations_that_lie_in_memory(tmp_path: Path) -> None:
    """128 samples of 32 tokens of 64 float32 numbers, before and behind a block."""
    model = build("llama", tmp_path / "model", max_position_embeddings=32)
    options = ("--algorithm", "gptq", "--dataset", "bundled", "--json")
    told = {place: json.loads(command("plan", model, "--offload", place, *options).output) for place in ("ram", "disk")}
    between = told["ram"]["activation_bytes"]
    assert between == told["disk"]["activation_bytes"] == 2 * 128 * 32 * 64 * 4
    assert told["ram"]["peak_memory_bytes"] == told["disk"]["peak_memory_bytes"] + between


@pytest.mark.parametrize("seqlen", [32, 4096])
def test_no_more_memory_is_planned_than_the_model_takes_tokens(seqlen: int, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", max_position_embeddings=32)
    planned = roundel.plan(model, algorithm="gptq", dataset="bundled", seqlen=seqlen)
    assert planned.tokens == 32 and unit_memory(planned) == unit_memory(
        roundel.plan(model, algorithm="gptq", dataset="bundled", seqlen=32)
    )


def test_a_dataset_that_nothing_looks_at_is_said(llama: Path) -> None:
    noted = "rtn looks at no data: book.txt is not read"
    assert noted in roundel.plan(llama, dataset="book.txt").notes
    assert noted not in roundel.plan(llama).notes
    assert not any(
        "looks at no data" in note for note in roundel.plan(llama, algorithm="gptq", dataset="bundled").notes
    )


def test_transforms_that_find_no_channel_say_so(llama: Path, tmp_path: Path) -> None:
    """In INC the search for these fails in silence, and AWQ and TEQ are plain rounding."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    GPTNeoXForCausalLM(GPTNeoXConfig(num_attention_heads=4, **sizes)).save_pretrained(tmp_path)
    said = "awq,rtn: no rule for generic models names channels of gpt_neox.layers.0 (and 1 more) that can be rescaled"
    wish = {"scheme": "W4A16G32", "dataset": "bundled"}
    assert any(note.startswith(said) for note in roundel.plan(tmp_path, algorithm="awq,rtn", **wish).notes)
    for model, algorithm in ((tmp_path, "gptq"), (llama, "awq,rtn")):
        assert not any("rescaled" in note for note in roundel.plan(model, algorithm=algorithm, **wish).notes)
