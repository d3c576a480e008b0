"""DeepSeek's kv_b_proj in GGUF files: cut by heads, its keys turned, rounded in two parts, and one matrix again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import roundel
from formats.test_gguf import stored, tokenized, written
from formats.test_gguf_reading import remade, sized
from inference.test_loading import expected
from roundel.checkpoint import open_checkpoint
from roundel.errors import PlanError, SourceError
from roundel.formats.gguf.block_types import BLOCK_TYPES
from roundel.inspection import inspect_checkpoint
from roundel.io.gguf import GgufTensor, GgufValue, lay_out_gguf, read_gguf, read_tensor
from roundel.io.imatrix import lay_out_imatrix
from roundel.io.safetensors import Shard
from roundel.ops.blocks import round_blocks
from roundel.unit import Cut
from roundel.verification import verify

HEADS, NOPE, VALUE, RANK = 4, 32, 32, 256
DATA: dict[str, Any] = {"dataset": "bundled", "nsamples": 4, "seqlen": 32}


def model_in(folder: Path, name: str = "deepseek_v3") -> Path:
    return tokenized(sized(name, folder))


def by_heads(model: Path, block: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [heads * rank, nope] and values [heads * value, rank] of a model's kv_b_proj, put together row by row."""
    whole = load_file(model / "model.safetensors")[f"model.layers.{block}.self_attn.kv_b_proj.weight"]
    keys, values = [], []
    for head in range(HEADS):
        rows = whole[head * (NOPE + VALUE) : (head + 1) * (NOPE + VALUE)]
        keys += [rows[:NOPE, column] for column in range(RANK)]
        values += list(rows[NOPE:])
    return torch.stack(keys), torch.stack(values)


@pytest.mark.parametrize("mixture", ["q8_0", "q4_k_m", "mxfp4_moe"])
@pytest.mark.parametrize("algorithm", ["rtn", "opt-rtn"])
def test_each_part_is_rounded_as_it_lies(mixture: str, algorithm: str, tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    roundel.quantize(model, tmp_path / "out", format=f"gguf:{mixture}", algorithm=algorithm)
    path, header = written(tmp_path / "out")
    assert "blk.0.attn_kv_b.weight" not in header.tensors and "blk.2.attn_norm.weight" not in header.tensors
    for name, weight in zip(("k_b", "v_b"), by_heads(model, 1), strict=True):
        tensor = header.tensors[f"blk.1.attn_{name}.weight"]
        assert tensor.shape == ((HEADS, RANK, NOPE) if name == "k_b" else (HEADS, VALUE, RANK))
        found = stored(path, header, tensor.name).flatten(0, 1)
        kind = BLOCK_TYPES[tensor.type]
        if algorithm == "rtn":
            assert torch.equal(found, kind.pack_stored(round_blocks(weight, kind.name)))
        else:
            plain = kind.unpack(kind.pack_stored(round_blocks(weight, kind.name))).decode()
            assert (kind.unpack(found).decode() - weight).square().sum() <= (plain - weight.float()).square().sum()


def test_a_cut_is_undone() -> None:
    whole = torch.arange(3 * 5 * 7).float().view(15, 7)
    cuts = (Cut(of="x", heads=3, start=0, stop=2, turned=True), Cut(of="x", heads=3, start=2, stop=5))
    again = torch.zeros(15, 7)
    for cut, shape in zip(cuts, ((21, 2), (9, 7)), strict=True):
        part = cut.take(whole)
        assert part.shape == shape == cut.shape(7) and cut.width(shape) == 7
        cut.put(part, again)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v2_lite", "deepseek_v3"])
def test_it_moves_on_to_other_formats(name: str, tmp_path: Path) -> None:
    """Exactly to formats that have it as one matrix, as floats, and to GGUF as it is; rounded anew where asked."""
    model = model_in(tmp_path / "model", name)
    roundel.quantize(model, tmp_path / "first", format="gguf:q8_0")
    first, _ = written(tmp_path / "first")
    roundel.convert(first, tmp_path / "mlx", format="mlx")
    roundel.convert(first, tmp_path / "again", format="gguf:q8_0")
    roundel.quantize(first, tmp_path / "w4", format="auto_round", scheme="W4A16G32")
    logits = expected(first)
    for folder in ("mlx", "again"):
        assert verify(tmp_path / folder, first).passed
        assert torch.equal(expected(tmp_path / folder), logits)
    again, header = written(tmp_path / "again")
    for tensor in header.tensors.values():
        if tensor.name.endswith("_b.weight"):
            assert torch.equal(stored(again, header, tensor.name), stored(first, read_gguf(first), tensor.name))
    made = verify(tmp_path / "w4", first)
    assert made.passed and "model.layers.0.self_attn.kv_b_proj" in {
        c.name for c in made.checks if c.scheme == "W4A16G32"
    }
    checkpoint = open_checkpoint(first)
    found = {each.name: each for each in inspect_checkpoint(checkpoint).matrices}
    checkpoint.close()
    part = found["model.layers.0.self_attn.k_b_proj"]
    assert (part.shape, part.stored_as, part.bits) == ((HEADS * RANK, NOPE), "GGUF:Q8_0", 8.5)


def test_from_a_packed_source(tmp_path: Path) -> None:
    """Parts are cut out of what the source's blocks decode to, since these do not go by heads."""
    model = model_in(tmp_path / "model")
    roundel.quantize(model, tmp_path / "fp8", format="fp8", scheme="FP8_BLOCK")
    roundel.quantize(tmp_path / "fp8", tmp_path / "out", format="gguf:q8_0")
    source = open_checkpoint(tmp_path / "fp8")
    whole = source.tensor("model.layers.0.self_attn.kv_b_proj.weight")
    source.close()
    path, header = written(tmp_path / "out")
    keys = whole.view(HEADS, NOPE + VALUE, RANK)[:, :NOPE].transpose(1, 2).reshape(-1, NOPE)
    found = stored(path, header, "blk.0.attn_k_b.weight").flatten(0, 1)
    assert torch.equal(found, BLOCK_TYPES["Q8_0"].pack_stored(round_blocks(keys, "Q8_0")))
    assert verify(tmp_path / "out", tmp_path / "fp8").passed
    with pytest.raises(PlanError, match="requantize"):
        roundel.convert(tmp_path / "fp8", tmp_path / "exact", format="gguf:q8_0")
    roundel.convert(tmp_path / "fp8", tmp_path / "converted", format="gguf:q8_0", requantize=True)
    again, _ = written(tmp_path / "converted")
    assert torch.equal(stored(again, read_gguf(again), "blk.0.attn_k_b.weight").flatten(0, 1), found)


@pytest.mark.parametrize("algorithm", ["opt-rtn", "signround"])
def test_with_data_it_is_rounded_before_the_rest_of_its_block(algorithm: str, tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    wish = {**DATA, "imatrix": True} if algorithm == "opt-rtn" else {**DATA, "iters": 2}
    report = roundel.quantize(model, tmp_path / "out", format="gguf:q4_k_m", algorithm=algorithm, **wish)
    roundel.quantize(model, tmp_path / "plain", format="gguf:q4_k_m")
    parts = [row for row in report.rounded if row.name.endswith(("k_b_proj", "v_b_proj"))]
    assert len(parts) == 4 and all("rounded to nearest" in (row.note or "") for row in parts)
    assert verify(tmp_path / "out", model).passed
    (ours, header), (plain, same) = written(tmp_path / "out"), written(tmp_path / "plain")
    equal = {n for n in header.tensors if torch.equal(stored(ours, header, n), stored(plain, same, n))}
    assert {"blk.0.attn_k_b.weight", "blk.1.attn_v_b.weight"} <= equal and "blk.0.attn_output.weight" not in equal


def importances(path: Path, blocks: int = 2) -> dict[str, torch.Tensor]:
    """A file of importances of both parts, different in every head; mean squares [heads, in] by name in the file."""
    rng = np.random.default_rng(0)
    widths = {"k_b": NOPE, "v_b": RANK}
    sizes = {f"blk.{b}.attn_{name}.weight": (HEADS, width) for b in range(blocks) for name, width in widths.items()}
    shard = Shard(path.parent, lay_out_imatrix(path.name, sizes, ["text"], 1, 512))
    found = {}
    for name, size in sizes.items():
        squares = rng.lognormal(sigma=2, size=size).astype(np.float32)
        shard.put(f"{name}.in_sum2", (squares * 512).tobytes())
        shard.put(f"{name}.counts", np.full(HEADS, 512, np.float32).tobytes())
        found[name] = torch.from_numpy(squares)
    shard.finish()
    return found


def test_importances_count_by_heads(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    seen = importances(tmp_path / "imatrix.gguf")
    for algorithm in ("rtn", "opt-rtn"):
        roundel.quantize(
            model,
            tmp_path / algorithm,
            format="gguf:q4_k_m",
            algorithm=algorithm,
            imatrix=str(tmp_path / "imatrix.gguf"),
        )
        path, header = written(tmp_path / algorithm)
        for part, weight in zip(("k_b", "v_b"), by_heads(model), strict=True):
            name = f"blk.0.attn_{part}.weight"
            kind = BLOCK_TYPES[header.tensors[name].type]
            for head, (rows, weights) in enumerate(zip(stored(path, header, name), weight.chunk(HEADS), strict=True)):
                theirs = kind.pack_stored(round_blocks(weights, kind.name, seen[name][head]))
                error = [
                    ((kind.unpack(each).decode() - weights).square() * seen[name][head]).sum()
                    for each in (rows, theirs)
                ]
                assert torch.equal(rows, theirs) if algorithm == "rtn" else error[0] <= error[1]


def test_a_file_in_which_it_is_whole(tmp_path: Path) -> None:
    """As older releases of llama.cpp wrote it, with sizes of whole heads."""
    model = model_in(tmp_path / "model", "deepseek_v2")
    roundel.quantize(model, tmp_path / "out", format="gguf:q8_0")
    path, header = written(tmp_path / "out")
    values = {key: value for key, value in header.metadata.items() if not key.endswith("_mla")}
    sizes = {"head_count_kv": HEADS, "key_length": NOPE + 32, "value_length": VALUE}
    values |= {f"deepseek2.attention.{key}": GgufValue("u32", size) for key, size in sizes.items()}
    tensors, contents = [], {}
    for tensor in header.tensors.values():
        if tensor.name.endswith("attn_v_b.weight"):
            continue
        block = tensor.name.split(".")[1]
        if tensor.name.endswith("attn_k_b.weight"):
            whole = load_file(model / "model.safetensors")[f"model.layers.{block}.self_attn.kv_b_proj.weight"]
            tensor = GgufTensor(f"blk.{block}.attn_kv_b.weight", "Q8_0", tuple(whole.shape))
            contents[tensor.name] = BLOCK_TYPES["Q8_0"].round_and_pack(whole).numpy().tobytes()
        else:
            contents[tensor.name] = read_tensor(path, header.places[tensor.name]).tobytes()
        tensors.append(tensor)
    (tmp_path / "old").mkdir()
    shard = Shard(tmp_path / "old", lay_out_gguf("old.gguf", values, tensors))
    for name, data in contents.items():
        shard.put(name, data)
    shard.finish()
    assert verify(tmp_path / "old" / "old.gguf", model).passed
    whole_logits, logits = (expected(each) for each in (tmp_path / "old" / "old.gguf", path))
    assert 1e-6 < (whole_logits - logits).abs().max() < 0.1  # rounded along other rows


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    other = shutil.copytree(model, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(config | {"v_head_dim": 16}))
    with pytest.raises(SourceError, match="its 4 heads have 192"):
        roundel.quantize(other, tmp_path / "a", format="gguf:q8_0")
    with pytest.raises(PlanError, match="same parts"):
        roundel.quantize(model, tmp_path / "b", format="gguf:q8_0,auto_round")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.kv_b_proj.bias"] = torch.zeros(HEADS * (NOPE + VALUE))
    save_file(tensors, other / "model.safetensors")
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="bias"):
        roundel.quantize(other, tmp_path / "c", format="gguf:q8_0")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    roundel.quantize(model_in(tmp_path / "model"), tmp_path / "out", format="gguf:q8_0")
    path, _ = written(tmp_path / "out")
    lost = remade(path, tmp_path / "lost.gguf", {"blk.1.attn_v_b.weight": "blk.1.attn_v_b.bias"})
    wrong = {
        lost: "layers.1.self_attn.k_b_proj and no .*v_b_proj",
        _with(path, tmp_path / "heads.gguf", "head_count", 8): "not of the model's heads",
        _with(path, tmp_path / "values.gguf", "value_length_mla", 16): "do not make the 4 heads",
        _with(path, tmp_path / "keys.gguf", "key_length_mla", 32): "heads of 0 and 32 turned",
    }
    for file, why in wrong.items():
        with pytest.raises(SourceError, match=why):
            verify(file)


def _with(path: Path, to: Path, key: str, value: int) -> Path:
    return remade(path, to, **{f"deepseek2__attention__{key}": GgufValue("u32", value)})
