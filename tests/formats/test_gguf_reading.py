"""GGUF models are read back, with what roundel wrote beside them and without: names, numbers, config, tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import roundel
from formats.test_gguf import tokenized
from inference.test_loading import expected, near, said
from models.pico import build
from roundel.calibration.tokenizer import load_tokenizer
from roundel.checkpoint import Checkpoint, open_checkpoint
from roundel.data.bundled import bundled_model
from roundel.errors import SourceError
from roundel.formats.gguf.architectures import settings_of
from roundel.formats.gguf.block_types import BLOCK_TYPES
from roundel.formats.gguf.hyperparameters import hyperparameters
from roundel.formats.gguf.source import GgufSource
from roundel.inspection import inspect_checkpoint
from roundel.io.gguf import GgufHeader, GgufTensor, GgufValue, lay_out_gguf, read_gguf, read_tensor
from roundel.io.safetensors import Shard
from roundel.matrix import Matrix
from roundel.ops.blocks import round_blocks
from roundel.unit import Piece
from roundel.verification import verify

SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}  # whole blocks of the K types
YARN: dict[str, Any] = {
    "type": "yarn", "factor": 4, "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "moe_intermediate_size": 256, "kv_lora_rank": 256, "head_dim": 32, "max_position_embeddings": 512,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {  # what llama.cpp takes for granted
    "gemma2": {"query_pre_attn_scalar": 64},
    "gemma3": {"query_pre_attn_scalar": 64},
    "gemma3_text": {"query_pre_attn_scalar": 64},
    "qwen2_moe": {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    "qwen3_moe": {"moe_intermediate_size": 256, "norm_topk_prob": True},
    "gpt_oss": {"quantization_config": None},
    "deepseek_v2": DEEPSEEK | {"q_lora_rank": 256, "n_shared_experts": 2, "scoring_func": "softmax"},
    "deepseek_v2_lite": DEEPSEEK
    | {
        "q_lora_rank": None,
        "scoring_func": "softmax",
        "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": DEEPSEEK
    | {"scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_scaling": YARN},
}
FLOATS = ("f16", "bf16")
TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gemma3",
         "phi3", "gpt_oss", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3")  # fmt: skip


def sized(name: str, folder: Path, **config: Any) -> Path:
    """A pico model of whole blocks; `name` is a model type, or one of OWN."""
    return build(name.removesuffix("_lite"), folder, **{**SIZES, **OWN.get(name, {}), **config})


def written(model_type: str, folder: Path, mixture: str = "q4_k_m", **config: Any) -> tuple[Path, Path, Path]:
    """A pico model, the folder that roundel makes of it, and a copy of the file alone."""
    model = tokenized(sized(model_type, folder / "model", **config))
    roundel.quantize(model, folder / "out", format=f"gguf:{mixture}", workers=1)
    (file,) = (folder / "out").glob("*.gguf")
    (folder / "bare").mkdir()
    return model, folder / "out", Path(shutil.copy(file, folder / "bare" / "file.gguf"))


def part(whole: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Of a matrix of the model, what a matrix of the file is."""
    return whole if matrix.cut is None else matrix.cut.take(whole)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_family(model_type: str, tmp_path: Path) -> None:
    model, out, bare = written(model_type, tmp_path)
    source, opened = open_checkpoint(model), [open_checkpoint(out), open_checkpoint(bare)]
    for checkpoint in opened:
        wanted = {name.replace("language_model.", ""): name for name in source.tensor_names if ".vision" not in name}
        rounded = 0
        for name in checkpoint.tensor_names:
            before, found = source.tensor(wanted.pop(name)), checkpoint.tensor(name)
            module = name.removesuffix(".weight")
            stored = [m for m in checkpoint.matrices.values() if module in (m.name, m.cut and m.cut.of)]
            for matrix in (m for m in stored if m.stored.scheme is not None):
                assert matrix.stored.scheme is not None
                kind = BLOCK_TYPES[matrix.stored.scheme.name.removeprefix("GGUF:")]
                packed = kind.pack_stored(round_blocks(part(before, matrix), kind.name))
                assert torch.equal(part(found, matrix), kind.unpack(packed).decode()), name
                rounded += 1
            if all(matrix.stored.scheme is None for matrix in stored):
                assert torch.equal(found, before.float()), name
        assert rounded >= 8
        left = ("vision", "projector", "layers.2.")  # the last is for predicting further tokens
        assert not [name for name in wanted.values() if not any(word in name for word in left)]
        assert verify(bare, model).passed and verify(out, model).passed
    rebuilt, header = opened[1].source.config, read_gguf(bare)
    known = str(header.metadata["general.architecture"].value)
    told = hyperparameters(settings_of(rebuilt), known, int(header.metadata["general.file_type"].value))  # type: ignore[arg-type]
    for key, value in told.items():
        there = header.metadata[key]
        assert value.kind == there.kind
        assert there.value == (np.float32(value.value) if value.kind == "f32" else value.value), key  # type: ignore[arg-type]
    assert {key for key in header.metadata if key.startswith(f"{known}.")} <= set(told)
    for checkpoint in (source, *opened):
        checkpoint.close()
    logits = expected(bare)
    if model_type != "gemma3":  # of whose config.json, with its vision tower, the file holds a part
        assert torch.equal(logits, expected(out))
    for path in (out, bare):
        assert near(said(roundel.load(path)), logits)
    assert near(said(roundel.load(bare, backend="torch")), logits)


@pytest.mark.parametrize("mixture", ["f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_1", "iq4_xs", "tq2_0"])
def test_every_kind_of_type(mixture: str, tmp_path: Path) -> None:
    model, out, bare = written("llama", tmp_path, mixture, tie_word_embeddings=True)
    checkpoint = open_checkpoint(bare)
    assert checkpoint.is_tied
    inspection = inspect_checkpoint(checkpoint)
    checkpoint.close()
    if mixture in FLOATS:
        assert set(inspection.floats) == {mixture.upper()}
    else:
        assert f"GGUF:{mixture.upper()}" in inspection.schemes
    assert verify(out, model).passed and verify(bare, model).passed
    logits = expected(bare)
    assert torch.equal(logits, expected(out)) and near(said(roundel.load(bare)), logits)


def opened(path: Path) -> tuple[Checkpoint, GgufSource]:
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint.source, GgufSource)
    return checkpoint, checkpoint.source


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight",
                                  "model.norm.weight"])  # fmt: skip
def test_parts_are_parts_of_the_whole(name: str, tmp_path: Path) -> None:
    """Rows that lie in another order, and numbers that something was added to, read in every way there is."""
    _, _, bare = written("gemma2" if name == "model.norm.weight" else "llama", tmp_path, "f16")
    checkpoint, source = opened(bare)
    spec = source.tensors[name]
    whole = source.read(Piece(tensor=name)).reshape(spec.shape[0], -1)
    for start, stop in ((0, 1), (5, 37), (60, 70), (64, 128), (100, spec.shape[0])):
        assert np.array_equal(source.read(Piece(tensor=name, start=start, stop=stop)), whole[start:stop].reshape(-1))
        into = np.zeros((stop - start, whole.shape[1]), np.uint8)
        source.read_rows(Piece(tensor=name), start, into)
        assert np.array_equal(into, whole[start:stop])
        source.read_rows(Piece(tensor=name, start=start), 0, into)
        assert np.array_equal(into, whole[start:stop])
    descriptor, begin = source.place(name)
    assert os.pread(descriptor, spec.nbytes, begin) == whole.tobytes()
    checkpoint.close()


def test_it_is_a_source_like_any_other(tmp_path: Path) -> None:
    model, _, bare = written("llama", tmp_path, "bf16")
    for number, source in enumerate((model, bare)):
        roundel.quantize(source, tmp_path / f"{number}", scheme="W4A16G32", format="auto_gptq")
    theirs, ours = (open_checkpoint(tmp_path / name) for name in "01")
    assert ours.layers.keys() == theirs.layers.keys()
    for name in ours.layers:
        assert torch.equal(ours.decode(name), theirs.decode(name))
    assert (tmp_path / "1" / "tokenizer.json").exists()
    ours.close()
    theirs.close()


def test_the_tokenizer_is_made_from_the_file(tmp_path: Path) -> None:
    roundel.quantize(bundled_model(), tmp_path / "out", format="gguf:q8_0")
    (file,) = (tmp_path / "out").glob("*.gguf")
    bare = Path(shutil.copy(file, tmp_path / "bare.gguf"))
    checkpoint, source = opened(bare)
    made, own = load_tokenizer(source.small_folder()), load_tokenizer(bundled_model())
    for text in ("It was a dark night, and don't 123 stop!", "  Ünïcode 日本\n\n\t<|endoftext|>x", ""):
        assert made.encode(text, add_special_tokens=True, verbose=False) == own.encode(
            text, add_special_tokens=True, verbose=False
        )
    checkpoint.close()
    assert not source.small_folder().exists()


def remade(path: Path, to: Path, tensors: dict[str, str] | None = None, **values: object) -> Path:
    """A copy of a file with other values, or with tensors under other names; None leaves a value out."""
    header = read_gguf(path)
    names = tensors or {}
    metadata = dict(header.metadata)
    for key, value in values.items():
        full = key.replace("__", ".")
        metadata.pop(full, None)
        if value is not None:
            assert isinstance(value, GgufValue)
            metadata[full] = value
    listed = [GgufTensor(names.get(t.name, t.name), t.type, t.shape) for t in header.tensors.values()]
    shard = Shard(to.parent, lay_out_gguf(to.name, metadata, listed))
    for name, place in header.places.items():
        shard.put(names.get(name, name), read_tensor(path, place).tobytes())
    shard.finish()
    return to


def test_a_model_in_parts(tmp_path: Path) -> None:
    _, _, bare = written("llama", tmp_path)
    header = read_gguf(bare)
    names = list(header.tensors)
    for number, part in enumerate((names[:7], names[7:]), 1):
        metadata = header.metadata if number == 1 else {"split.no": GgufValue("u16", 1)}
        layout = lay_out_gguf(f"m-{number:05d}-of-00002.gguf", metadata, [header.tensors[name] for name in part])
        shard = Shard(tmp_path, layout)
        for name in part:
            shard.put(name, read_tensor(bare, header.places[name]).tobytes())
        shard.finish()
    assert torch.equal(expected(tmp_path / "m-00001-of-00002.gguf"), expected(bare))
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(SourceError, match=r"lacks 1 of its 2 parts: m-00002-of-00002\.gguf"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"general__architecture": GgufValue("str", "rwkv")}, "of the architecture 'rwkv'; read are llama, qwen2"),
        ({"general__architecture": GgufValue("u32", 3)}, "of the architecture 3"),
        ({"llama__block_count": None}, "says nothing of llama.block_count"),
        ({"llama__block_count": GgufValue("u32", 3)}, "3 blocks, and holds 2"),
        ({"llama__block_count": GgufValue("f32", 2.0)}, "gives 2.0 as llama.block_count, no count"),
        ({"llama__embedding_length": GgufValue("u32", 64)}, "64 columns of the embedding, and holds 256"),
        ({"llama__attention__head_count": GgufValue("u32", 0)}, "0 heads"),
        ({"llama__attention__head_count": GgufValue("i32", np.array([4, 4], "<i4"))}, "no count"),
        ({"llama__attention__head_count_kv": GgufValue("u32", 3)}, "4 heads and 3 of keys"),
        ({"llama__rope__freq_base": GgufValue("f32", float("nan"))}, "gives nan as llama.rope.freq_base"),
        ({"llama__rope__scaling__type": GgufValue("str", "magic")}, "scales rotary frequencies by 'magic'"),
        ({"llama__rope__dimension_count": GgufValue("u32", 32)}, "turns 32 of a head's 64 columns"),
        ({"tensors": {"token_embd.weight": "x.weight"}}, "holds no token_embd.weight"),
        ({"tensors": {"blk.1.ffn_up.weight": "blk.1.ffn_sideways.weight"}}, "blk.1.ffn_sideways.weight"),
        ({"tensors": {"blk.1.ffn_up.weight": "blk.7.ffn_up.weight"}}, "says that there are 2 blocks, and holds 3"),
    ],
)
def test_what_contradicts_itself_is_refused(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    _, _, bare = written("llama", tmp_path)
    with pytest.raises(SourceError, match=why):
        open_checkpoint(remade(bare, tmp_path / "other.gguf", **change))


def test_a_tokenizer_that_is_not_known_is_asked_for(tmp_path: Path) -> None:
    _, _, bare = written("llama", tmp_path)
    other = remade(bare, tmp_path / "other.gguf", tokenizer__ggml__pre=GgufValue("str", "klingon"))
    with pytest.warns(UserWarning, match=r"splits words as 'klingon' does.* Put the original model's tokenizer.json"):
        roundel.load(other)
    shutil.copy(bundled_model() / "tokenizer.json", tmp_path)
    roundel.load(other)


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    _, _, bare = written("llama", tmp_path)
    shutil.copy(bare, bare.parent / "mmproj-f16.gguf")  # a vision tower, as it is named
    open_checkpoint(bare.parent).close()
    shutil.copy(bare, bare.parent / "another.gguf")
    with pytest.raises(SourceError, match=r"holds several GGUF files \(another.gguf, file.gguf\). Pass one of them"):
        open_checkpoint(bare.parent)
    (bare.parent / "config.json").write_text(json.dumps({"model_type": "opt"}))  # of another model
    checkpoint = open_checkpoint(bare)
    assert checkpoint.source.config["model_type"] == "llama" and checkpoint.source.name == "file.gguf"
    checkpoint.close()


def test_rotary_frequencies_in_a_list(tmp_path: Path) -> None:
    scaled = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 8192
    _, _, bare = written("llama", tmp_path, rope_scaling=scaled, max_position_embeddings=16384)
    checkpoint = open_checkpoint(bare)
    assert checkpoint.source.config["rope_scaling"] == scaled
    checkpoint.close()
    header = read_gguf(bare)
    place = header.places["rope_freqs.weight"]
    factors = np.linspace(1, 5, 32, dtype="<f4")
    with bare.open("r+b") as out:
        out.seek(place.begin)
        out.write(factors.tobytes())
    inverse = 1 / (factors * 10000.0 ** (np.arange(0, 64, 2) / 64))
    embedded: Any = roundel.load(bare).model.rotary_emb
    assert np.allclose(embedded.inv_freq.numpy(), inverse, rtol=1e-6) and embedded.attention_scaling == 1.0
    assert isinstance(header, GgufHeader)


def test_matrices_that_are_stored_otherwise_are_read_not_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roundel.quantize(tokenized(build("llama", tmp_path / "model")), tmp_path / "out", format="gguf:bf16")
    checkpoint = open_checkpoint(tmp_path / "out")
    wanted = {name: checkpoint.tensor(name) for name in checkpoint.tensor_names}
    place, copied = GgufSource.place, []

    def noting(source: GgufSource, name: str) -> tuple[int, int]:
        copied.extend([name] if source._held[name].is_changed else [])
        return place(source, name)

    monkeypatch.setattr(GgufSource, "place", noting)
    found = {name: checkpoint.mapped(name) for name in checkpoint.tensor_names}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted) and not copied
    checkpoint.close()
