"""Every family's spaces name tensors that exist, once as readers, and fit their shapes; where AutoAWQ's tables err."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from models.pico import PICO_TYPES, build, config_of
from roundel.checkpoint import Checkpoint
from roundel.families import family_of
from roundel.families.spaces import spaces_of
from roundel.io.source import open_source
from roundel.unit import Space

Shapes = dict[str, tuple[int, ...]]


def shapes_of_checkpoint(folder: Path) -> Shapes:
    """Every tensor as `Unit.weights` has it: experts one by one, matrices [out, in]."""
    checkpoint = Checkpoint(open_source(str(folder)))
    shapes: Shapes = {f"{m.name}.weight": m.shape for m in checkpoint.matrices.values()}
    shapes |= {m.bias[0]: (m.shape[0],) for m in checkpoint.matrices.values() if m.bias}
    return shapes | {name: checkpoint.source.tensors[name].shape for name in checkpoint.loose}


def found_in(model_type: str, folder: Path) -> tuple[dict[str, tuple[Space, ...]], Shapes]:
    """block -> its spaces, for the first two decoder blocks."""
    config = config_of(model_type)
    family = family_of(config)
    shapes = shapes_of_checkpoint(build(model_type, folder))
    blocks = {m[0] for n in shapes for path in family.blocks if (m := re.match(rf"{re.escape(path)}\.[01](?=\.)", n))}
    assert len(blocks) == 2
    return {block: spaces_of(family, block, shapes, config) for block in sorted(blocks)}, shapes


@pytest.mark.parametrize("model_type", PICO_TYPES)
def test_names_and_shapes(model_type: str, tmp_path: Path) -> None:
    found, shapes = found_in(model_type, tmp_path)
    for block, spaces in found.items():
        readers = [reader for space in spaces for reader in space.readers]
        assert len(readers) == len(set(readers)), "a matrix reads one space"
        assert len({space.name for space in spaces}) == len(spaces)
        for space in spaces:
            assert all(f"{r}.weight" in shapes for r in space.readers)
            assert all(shapes[f"{r}.weight"][1] == space.size * space.repeat for r in space.readers)
            assert (space.head == 0) == (space.repeat == 1)
            assert space.size % (space.head or 1) == 0
            for writer in space.writers:
                runs = space.size // (writer.run or space.size)
                last = writer.start + (runs - 1) * writer.step + (writer.run or space.size)
                assert last == shapes[writer.tensor][0], "channels end where the tensor does"
                assert writer.tensor.startswith(f"{block}."), "never a tensor that another block might share"
            assert space.parent == block or space.parent.startswith(f"{block}.")
            assert all(r.startswith(space.parent) for r in space.readers)
    # Of the matrices that are rounded, only those that read the residual stream by no norm read no space.
    if model_type not in ("gpt2", "gpt_oss"):
        matrices = {n.removesuffix(".weight") for n, s in shapes.items() if len(s) == 2 and n.startswith(tuple(found))}
        read = {reader for spaces in found.values() for space in spaces for reader in space.readers}
        assert {m for m in matrices - read if "indexer" not in m} == set()


@pytest.mark.parametrize(
    ("model_type", "offset"),
    [
        *((t, 1.0) for t in ("gemma2", "gemma3", "gemma3_text", "qwen3_next", "qwen3_5", "qwen3_5_moe")),
        *((t, 0.0) for t in ("llama", "glm4", "qwen3", "llama4")),
    ],
)
def test_norms_that_scale_by_one_more_than_they_store(model_type: str, offset: float, tmp_path: Path) -> None:
    for spaces in found_in(model_type, tmp_path)[0].values():
        for space in spaces:
            if space.name.endswith("layernorm"):
                assert [w.offset for w in space.writers] == [offset]
            else:
                assert all(w.offset == 0 for w in space.writers)  # layers, biases, the gated norm of linear attention


@pytest.mark.parametrize(
    "model_type", ["qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "llama4_text", "gpt_oss", "qwen3_next"]
)
def test_routers_read_the_norm_that_experts_read(model_type: str, tmp_path: Path) -> None:
    """AutoAWQ's mixtures leave the router out."""
    found, shapes = found_in(model_type, tmp_path)
    block, spaces = list(found.items())[-1]
    (norm,) = (s for s in spaces if s.name == f"{block}.post_attention_layernorm")
    routers = [n for n in shapes if re.fullmatch(rf"{block}\.\w+\.(gate|router)\.weight", n)]
    assert len(routers) == 1
    assert routers[0].removesuffix(".weight") in norm.readers
    assert sum(".experts." in r for r in norm.readers) == 2 * 4
    shared = [
        n.removesuffix(".weight")
        for n in shapes
        if re.search(rf"{block}.*shared_expert(s\.(gate|up)_proj|\.(gate|up)_proj|_gate)\.weight", n)
    ]
    assert set(shared) <= set(norm.readers)


def test_fused_matrices_write_with_their_last_rows(tmp_path: Path) -> None:
    found, _ = found_in("phi3", tmp_path)
    spaces = {s.name.removeprefix("model.layers.0."): s for s in found["model.layers.0"]}
    assert spaces["self_attn.qkv_proj"].writers[0].start == 64 + 32
    assert (spaces["self_attn.qkv_proj"].size, spaces["self_attn.qkv_proj"].repeat) == (32, 2)
    assert spaces["mlp.gate_up_proj"].writers[0].start == 128
    assert spaces["input_layernorm"].readers == ("model.layers.0.self_attn.qkv_proj",)


def test_latent_attention(tmp_path: Path) -> None:
    found, _ = found_in("deepseek_v32", tmp_path)
    spaces = {s.name.removeprefix("model.layers.0.self_attn."): s for s in found["model.layers.0"]}
    assert [r.split("self_attn.")[1] for r in spaces["q_a_layernorm"].readers] == ["indexer.wq_b", "q_b_proj"]
    assert [r.split("self_attn.")[1] for r in spaces["kv_a_layernorm"].readers] == ["kv_b_proj"]
    (writer,) = spaces["kv_b_proj"].writers  # each head: 32 rows of keys, 32 of values
    assert (spaces["kv_b_proj"].size, writer.start, writer.run, writer.step) == (128, 32, 32, 64)
    assert spaces["kv_b_proj"].readers == ("model.layers.0.self_attn.o_proj",)


def test_one_norm_before_attention_and_mlp(tmp_path: Path) -> None:
    found, _ = found_in("cohere", tmp_path)
    (norm,) = (s for s in found["model.layers.0"] if s.name.endswith("layernorm"))
    assert {r.rsplit(".", 1)[1] for r in norm.readers} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert norm.parent == "model.layers.0"


def test_biases_are_written_too(tmp_path: Path) -> None:
    found, _ = found_in("opt", tmp_path)
    by_name = {s.name.removeprefix("model.decoder.layers.0."): s for s in found["model.decoder.layers.0"]}
    assert list(by_name) == ["self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"]
    for name, space in by_name.items():
        assert [w.tensor for w in space.writers] == [
            f"model.decoder.layers.0.{name}.{part}" for part in ("weight", "bias")
        ]


def test_what_a_config_makes_impossible_is_left_out() -> None:
    opt = family_of({"model_type": "opt"})
    shapes: Shapes = {"b.fc1.weight": (8, 4), "b.fc2.weight": (4, 8)}
    assert [s.name for s in spaces_of(opt, "b", shapes, {"activation_function": "relu"})] == ["b.fc1"]
    assert spaces_of(opt, "b", shapes, {"activation_function": "gelu"}) == ()  # Galactica
    llama = family_of({"model_type": "llama"})
    shapes = {f"b.mlp.{n}_proj.weight": (4, 8) if n == "down" else (8, 4) for n in ("gate", "up", "down")}
    assert [s.name for s in spaces_of(llama, "b", shapes, {})] == ["b.mlp.up_proj"]
    assert spaces_of(llama, "b", shapes, {"swiglu_limit": 7.0}) == (), "a clamped channel is tied to its scale"
    del shapes["b.mlp.gate_proj.weight"]
    assert spaces_of(llama, "b", shapes, {}) == (), "without a gate an activation stands between up and down"
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shapes = {"b.self_attn.v_proj.weight": (8, 4), "b.self_attn.o_proj.weight": (4, 16)}
    assert [(s.head, s.repeat) for s in spaces_of(llama, "b", shapes, heads)] == [(4, 2)]
    assert spaces_of(llama, "b", shapes, {}) == (), "nothing says how many heads there are"
    assert spaces_of(llama, "b", {**shapes, "b.self_attn.v_proj.weight": (6, 4)}, heads) == ()


def test_an_unknown_type_gets_the_guess() -> None:
    family = family_of({"model_type": "somebodys_own"})
    assert family.guess
    shapes: Shapes = {
        "m.0.input_layernorm.weight": (4,),
        "m.0.self_attn.q_proj.weight": (4, 4),
        "m.1.self_attn.k_proj.weight": (4, 4),
    }
    (space,) = spaces_of(family, "m.0", shapes, {})
    assert space.readers == ("m.0.self_attn.q_proj",)
    assert spaces_of(family, "m.2", shapes, {}) == ()
