"""GGUF models: what stands in the file, whatever the plan, the algorithm or an interruption did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import roundel
from models.pico import build
from models.raw import hashes, plant
from roundel.checkpoint import open_checkpoint
from roundel.data.bundled import bundled_model
from roundel.errors import PlanError, RecipeError
from roundel.formats import format_named
from roundel.formats.gguf.block_types import BLOCK_TYPES
from roundel.formats.gguf.names import expert_of, row_order, tensor_name
from roundel.io.gguf import GgufHeader, read_gguf, read_tensor
from roundel.ops.blocks import round_blocks
from roundel.scheme import BLOCK_GRIDS
from roundel.tensor import torch_dtype

ROWS = {"hidden_size": 256, "intermediate_size": 256}  # whole blocks of the K types


def written(out: Path) -> tuple[Path, GgufHeader]:
    (path,) = out.glob("*.gguf")
    return path, read_gguf(path)


def stored(path: Path, header: GgufHeader, name: str) -> torch.Tensor:
    spec = header.tensors[name].stored
    return (
        torch.from_numpy(read_tensor(path, header.places[name]).copy())
        .view(torch_dtype(spec.dtype))
        .reshape(spec.shape)
    )


@pytest.mark.parametrize("mixture", ["q8_0", "q4_k_m", "q2_k"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_moe"])
def test_every_tensor_is_there_and_rounded_as_ggml_does(model_type: str, mixture: str, tmp_path: Path) -> None:
    model = tokenized(build(model_type, tmp_path / "model", **ROWS))
    roundel.quantize(model, tmp_path / "out", format=f"gguf:{mixture}")
    path, header = written(tmp_path / "out")
    architecture = str(header.metadata["general.architecture"].value)
    source, rounded, seen = open_checkpoint(model), 0, set()
    for name in source.tensor_names:
        gguf = tensor_name(name, architecture)
        assert gguf is not None
        weight, kind, expert = source.tensor(name), header.tensors[gguf].type, expert_of(name)
        if architecture == "llama" and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            weight = weight[row_order(weight.shape[0] // 16, 16)]
        found = stored(path, header, gguf)
        found = found if expert is None else found[expert]
        if kind in BLOCK_GRIDS:
            assert torch.equal(found, BLOCK_TYPES[kind].pack_stored(round_blocks(weight, kind))), name
            rounded += 1
        else:
            assert kind == "F32" and torch.equal(found, weight.float()), name
        seen.add(gguf)
    source.close()
    assert seen == set(header.tensors) and rounded >= 14
    types = {tensor.type for tensor in header.tensors.values()}
    assert len(types & set(BLOCK_GRIDS)) >= (1 if mixture == "q8_0" else 2)


@pytest.mark.parametrize(("mixture", "wish"), [("q4_k_m", {}), ("q8_0", {}), ("q2_k", {"imatrix": "ones.gguf"})])
def test_a_slab_at_a_time(mixture: str, wish: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, and the same losses, as when all rows are rounded together."""
    if wish:
        wish = {"imatrix": str(tmp_path / "seen.gguf")}
        seen: dict[str, Any] = {
            "algorithm": "opt-rtn",
            "imatrix": True,
            "dataset": "bundled",
            "nsamples": 2,
            "seqlen": 32,
        }
        roundel.quantize(bundled_model(), tmp_path / "seen", format="gguf:q2_k", save_imatrix=wish["imatrix"], **seen)
    slabs = roundel.quantize(bundled_model(), tmp_path / "a", format=f"gguf:{mixture}", **wish)
    monkeypatch.setattr("roundel.matrices.SLAB_BYTES", 64 << 10)  # some rows, or heads
    small = roundel.quantize(bundled_model(), tmp_path / "b", format=f"gguf:{mixture}", **wish)
    monkeypatch.setattr("roundel.standalone.goes_by_rows", lambda *_: False)
    whole = roundel.quantize(bundled_model(), tmp_path / "c", format=f"gguf:{mixture}", **wish)
    assert len({written(tmp_path / name)[0].read_bytes() for name in "abc"}) == 1
    for one, other in zip(whole.rows, small.rows, strict=True):
        assert one.sqnr == pytest.approx(other.sqnr, abs=1e-3) and one.nbytes == other.nbytes
    assert slabs.mean_sqnr == pytest.approx(whole.mean_sqnr, abs=1e-3)


def test_a_bad_weight_is_named_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundel.matrices.SLAB_BYTES", 2048)
    model = tokenized(build("llama", tmp_path / "model", **ROWS))
    plant(model, "model.layers.1.mlp.up_proj.weight", 77 * 256 + 5, float("nan"))
    report = roundel.quantize(model, tmp_path / "out", format="gguf:q8_0")
    assert "weight [77, 5] is nan" in report.plan.demoted["model.layers.1.mlp.up_proj"]


def tokenized(model: Path) -> Path:
    """A pico model with the bundled model's tokenizer, cut to its vocabulary: a file has as many tokens as rows."""
    config = json.loads((model / "config.json").read_text())
    config = config.get("text_config", config)
    text = json.loads((bundled_model() / "tokenizer.json").read_text())
    vocabulary = {token: i for token, i in text["model"]["vocab"].items() if i < config["vocab_size"]}
    text["model"]["vocab"] = vocabulary
    text["model"]["merges"] = []
    text["added_tokens"] = [token for token in text.get("added_tokens", []) if token["id"] < config["vocab_size"]]
    (model / "tokenizer.json").write_text(json.dumps(text))
    (model / "tokenizer_config.json").write_text((bundled_model() / "tokenizer_config.json").read_text())
    return model


def test_importances_are_used(tmp_path: Path) -> None:
    wish: dict[str, Any] = {"format": "gguf:q4_k_m", "dataset": "bundled", "nsamples": 4, "seqlen": 64}
    roundel.quantize(bundled_model(), tmp_path / "plain", format="gguf:q4_k_m")
    report = roundel.quantize(bundled_model(), tmp_path / "out", algorithm="opt-rtn", imatrix=True, **wish)
    assert all((row.error or 0) <= (row.baseline or 0) for row in report.rounded)
    plain, weighted = (written(tmp_path / folder)[0].read_bytes() for folder in ("plain", "out"))
    assert len(plain) == len(weighted) and plain != weighted


def test_two_runs_give_one_file_and_layers_may_be_set_apart(tmp_path: Path) -> None:
    wish: dict[str, Any] = {"format": "gguf:q4_k_m", "layer_config": {"v_proj": "GGUF:Q8_0"}}
    for folder, workers in (("one", 1), ("two", 3)):
        roundel.quantize(bundled_model(), tmp_path / folder, workers=workers, **wish)
    one, two = (hashes(tmp_path / folder) for folder in ("one", "two"))
    assert one == two
    header = written(tmp_path / "one")[1]
    assert {t.type for n, t in header.tensors.items() if n.endswith("attn_v.weight")} == {"Q8_0"}
    assert header.metadata["general.file_type"].value == 15


@pytest.mark.parametrize("wish", [{"scheme": "MXFP8"}, {"bits": 3}, {"group_size": 32}, {"sym": False}])
def test_a_mixture_takes_no_scheme(wish: dict[str, Any], tmp_path: Path) -> None:
    for kind in ("q4_k_m", "f16"):
        with pytest.raises(
            PlanError, match=rf"gguf:{kind} decides on the type of every tensor, and {next(iter(wish))}="
        ):
            roundel.quantize(bundled_model(), tmp_path / "out", format=f"gguf:{kind}", **wish)


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="q4_k_m"):
        format_named("gguf:q4_k_x")
    with pytest.raises(PlanError, match="--format gguf:q4_k_m"):
        roundel.quantize(bundled_model(), tmp_path / "a", format="gguf", scheme="W4A16")
    with pytest.raises(PlanError, match="opt"):
        roundel.quantize(build("opt", tmp_path / "model"), tmp_path / "b", format="gguf:q8_0")
    with pytest.raises(PlanError, match="signround"):
        roundel.quantize(
            bundled_model(), tmp_path / "c", format="gguf:iq4_nl", algorithm="signround", dataset="bundled"
        )


def test_rounding_is_learned(tmp_path: Path) -> None:
    """No block ends worse than with ggml's rounding, and some better; what is written is what was learned."""
    wish: dict[str, Any] = {"dataset": "bundled", "nsamples": 4, "seqlen": 64, "iters": 10, "lr": 0.05}
    for mixture in ("q4_k_m", "q2_k"):
        report = roundel.quantize(
            bundled_model(), tmp_path / mixture, format=f"gguf:{mixture}", algorithm="signround", **wish
        )
        learned = [row for row in report.rounded if row.error is not None and row.baseline is not None]
        assert learned and all((row.error or 0) <= (row.baseline or 0) for row in learned)
        assert sum(row.error or 0 for row in learned) < 0.95 * sum(row.baseline or 0 for row in learned)
