"""Importances from a file instead of data, and the file that a run leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import roundel
from models.pico import build
from roundel.checkpoint import open_checkpoint
from roundel.cli.options import recipe_from, recipe_options
from roundel.data.bundled import bundled_model
from roundel.errors import OutputError, PlanError, RecipeError
from roundel.formats.gguf.block_types import BLOCK_TYPES
from roundel.importance import ImatrixWriter, open_importances
from roundel.io.gguf import read_gguf, read_tensor
from roundel.io.imatrix import lay_out_imatrix, read_imatrix
from roundel.io.safetensors import Shard
from roundel.ops.blocks import round_blocks
from roundel.report import Report

SEEN: dict[str, Any] = {"dataset": "bundled", "nsamples": 4, "seqlen": 64}


def file_of(path: Path, given: dict[str, tuple[Tensor, int]]) -> Path:
    """A file by llama.cpp's names: mean squares [matrices, in] and tokens."""
    stacks = {name: (mean.shape[0], mean.shape[1]) for name, (mean, _) in given.items()}
    shard = Shard(path.parent, lay_out_imatrix(path.name, stacks, ["text"], 1, 64))
    for name, (mean, tokens) in given.items():
        shard.put(f"{name}.in_sum2", (mean * tokens).numpy().tobytes())
        shard.put(f"{name}.counts", np.full(mean.shape[0], tokens, "<f4").tobytes())
    shard.finish()
    return path


def notes(report: Report) -> dict[str, str]:
    return {row.name: row.note for row in report.rounded if row.note}


@pytest.mark.parametrize("ending", ["gguf", "dat"])
def test_a_file_stands_for_the_data_that_it_was_made_of(ending: str, tmp_path: Path) -> None:
    """opt-rtn on measured importances, kept; then the same from the file, in which measured inputs follow rounded
    blocks. No model is built for it."""
    kept = tmp_path / f"kept.{ending}"
    wish: dict[str, Any] = {"format": "gguf:q4_k_m", "algorithm": "opt-rtn"}
    roundel.quantize(bundled_model(), tmp_path / "data", imatrix=True, save_imatrix=kept, **wish, **SEEN)
    assert not list(tmp_path.glob("*.partial"))
    report = roundel.quantize(bundled_model(), tmp_path / "file", imatrix=str(kept), **wish)
    assert not report.plan.recipe.reads_activations
    told = notes(report)
    assert set(told) == {"model.embed_tokens"} and "does not have it" in told["model.embed_tokens"]
    found = {
        folder: {row["name"]: row.get("sqnr") for row in rows_of(tmp_path / folder)} for folder in ("data", "file")
    }
    inside = [name for name in found["file"] if "layers" in name and found["file"][name] is not None]
    assert len(inside) > 8
    for name in inside:  # a quotient and a product were rounded on the way
        assert found["data"][name] == pytest.approx(found["file"][name], abs=0.02), name


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "report.json").read_text())["rows"]
    return found


def test_rtn_rounds_ggml_s_types_as_ggml_does_with_importances(tmp_path: Path) -> None:
    drawn = torch.rand(1, 512, generator=torch.Generator().manual_seed(3)) + 0.01
    checkpoint = open_checkpoint(bundled_model())
    name = "model.layers.0.mlp.up_proj"
    width = checkpoint.matrices[name].shape[1]
    drawn = drawn[:, :width].contiguous()
    file = file_of(tmp_path / "own.gguf", {"blk.0.ffn_up.weight": (drawn, 64)})
    report = roundel.quantize(bundled_model(), tmp_path / "out", format="gguf:q4_k_m", imatrix=str(file))
    path = next((tmp_path / "out").glob("*.gguf"))
    header = read_gguf(path)
    kind = header.tensors["blk.0.ffn_up.weight"].type
    weight = checkpoint.tensor(f"{name}.weight").float()
    expected = BLOCK_TYPES[kind].pack_stored(round_blocks(weight, kind, drawn[0] * 64 / 64))
    assert read_tensor(path, header.places["blk.0.ffn_up.weight"]).tobytes() == expected.numpy().tobytes()
    assert name not in notes(report) and "model.layers.1.mlp.up_proj" in notes(report)
    checkpoint.close()


def test_experts_are_one_entry(tmp_path: Path) -> None:
    model = build("qwen3_moe", tmp_path / "model")
    checkpoint = open_checkpoint(model)
    shapes = {m.name: m.shape for m in checkpoint.matrices.values()}
    experts = sorted(n for n in shapes if n.startswith("model.layers.0.mlp.experts.") and n.endswith("down_proj"))
    width = shapes[experts[0]][1]
    means = torch.arange(1.0, len(experts) + 1)[:, None].expand(-1, width).contiguous()
    file = file_of(tmp_path / "own.gguf", {"blk.0.ffn_down_exps.weight": (means, 64)})
    found = open_importances(file, checkpoint.source.config, shapes)
    layers = {m.name: m.layer() for m in checkpoint.matrices.values() if m.name in experts}
    for name, layer in layers.items():
        entered = found.of(layer)
        assert entered is not None and entered.tokens == 64
        assert torch.equal(entered.mean_square, torch.full((width,), float(name.split(".")[5]) + 1))
    checkpoint.close()


def test_experts_are_kept_together(tmp_path: Path) -> None:
    model = build("qwen3_moe", tmp_path / "model")
    kept = tmp_path / "kept.gguf"
    samples = [list(range(1, 33)), list(range(2, 34))]
    roundel.quantize(
        model, tmp_path / "out", scheme="W4A16", group_size=16, algorithm="opt-rtn", imatrix=True,
        dataset=samples, nsamples=2, seqlen=32, save_imatrix=kept,
    )  # fmt: skip
    checkpoint = open_checkpoint(model)
    shapes = {m.name: m.shape for m in checkpoint.matrices.values()}
    checkpoint.close()
    experts = [n for n in shapes if n.startswith("model.layers.0.mlp.experts.") and n.endswith("up_proj")]
    counts = read_imatrix(kept).entries["blk.0.ffn_up_exps.weight"].counts
    assert len(counts) == len(experts) and 0 < sum(counts) <= 64 * len(experts)
    assert read_imatrix(kept).entries["blk.0.attn_q.weight"].counts == (64.0,)


def test_what_does_not_fit_is_told_before_anything_is_rounded(tmp_path: Path) -> None:
    wrong = file_of(tmp_path / "wrong.gguf", {"blk.0.ffn_up.weight": (torch.ones(1, 48), 64)})
    with pytest.raises(PlanError, match=r"48 importances for .*ffn_up"):
        roundel.plan(bundled_model(), format="gguf:q4_k_m", imatrix=str(wrong))
    foreign = file_of(tmp_path / "foreign.gguf", {"blk.0.ssm.weight": (torch.ones(1, 48), 64)})
    with pytest.raises(PlanError, match="knows no matrix of this model"):
        roundel.plan(bundled_model(), format="gguf:q4_k_m", imatrix=str(foreign))
    with pytest.raises(RecipeError, match="awq changes that"):
        roundel.plan(bundled_model(), algorithm=["awq", "opt-rtn"], imatrix=str(foreign), dataset="bundled")
    with pytest.raises(PlanError, match="opt-rtn does"):
        roundel.plan(bundled_model(), scheme="W4A16", imatrix=str(file_of_bundled(tmp_path)))
    with pytest.raises(RecipeError, match="computes no importances"):
        roundel.quantize(bundled_model(), tmp_path / "out", save_imatrix=tmp_path / "kept.gguf")
    with pytest.raises(RecipeError, match="name a file of them"):
        roundel.plan(bundled_model(), format="gguf:q4_k_m", options={"imatrix": "true"})


def file_of_bundled(folder: Path) -> Path:
    checkpoint = open_checkpoint(bundled_model())
    width = checkpoint.matrices["model.layers.0.mlp.up_proj"].shape[1]
    checkpoint.close()
    return file_of(folder / "fitting.gguf", {"blk.0.ffn_up.weight": (torch.ones(1, width), 64)})


def test_the_plan_knows_the_file_by_its_content(tmp_path: Path) -> None:
    path = file_of_bundled(tmp_path)
    wish: dict[str, Any] = {"format": "gguf:q4_k_m", "imatrix": str(path)}
    before = roundel.plan(bundled_model(), **wish).fingerprint
    assert roundel.plan(bundled_model(), **wish).fingerprint == before
    path.write_bytes(path.read_bytes()[:-32] + np.full(8, 32, "<f4").tobytes())
    assert roundel.plan(bundled_model(), **wish).fingerprint != before


def test_a_file_that_was_begun_is_continued(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(bundled_model())
    names = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    layers = [checkpoint.matrices[name].layer() for name in names]
    config, width = checkpoint.source.config, layers[0].shape[1]
    checkpoint.close()
    how: dict[str, Any] = {"dataset": "text", "samples": 2, "tokens": 64}
    path = tmp_path / "own.gguf"
    killed = ImatrixWriter(path, config, layers, begun=False, **how)
    killed.put(layers[0], torch.full((width,), 2.0), 128)
    killed.flush()
    again = ImatrixWriter(path, config, layers, begun=True, **how)
    again.put(layers[1], torch.full((width,), 3.0), 128)
    again.finish()
    found = read_imatrix(path)
    for i, mean in enumerate((2.0, 3.0)):
        assert set(found.of(f"blk.{i}.ffn_up.weight", width).mean_square.tolist()) == {mean}
    path.unlink()
    with pytest.raises(OutputError, match="is gone"):
        ImatrixWriter(path, config, layers, begun=True, **how)


@pytest.mark.parametrize("dies_before", ["replace", "unlink"])
def test_an_older_file_is_whole_or_not_there(dies_before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between its layouts, what is begun stays, and the next run ends with the same bytes."""
    checkpoint = open_checkpoint(bundled_model())
    layer, config = checkpoint.matrices["model.layers.0.mlp.up_proj"].layer(), checkpoint.source.config
    checkpoint.close()
    how: dict[str, Any] = {"dataset": "text", "samples": 2, "tokens": 64}

    def begin(path: Path, begun: bool = False) -> ImatrixWriter:
        return ImatrixWriter(path, config, [layer], begun=begun, **how)

    for name in ("whole.dat", "killed.dat"):
        writer = begin(tmp_path / name)
        writer.put(layer, torch.full((layer.shape[1],), 2.0), 128)
        if name == "whole.dat":
            writer.finish()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, dies_before, die)
        writer.finish()
    writer.close()
    whole, killed = tmp_path / "whole.dat", tmp_path / "killed.dat"
    assert killed.exists() == (dies_before == "unlink")
    begin(killed, begun=True).finish()
    assert killed.read_bytes() == whole.read_bytes() and read_imatrix(whole).legacy
    assert {path.name for path in tmp_path.iterdir()} == {"whole.dat", "killed.dat"}


def test_the_switch_takes_a_file_or_none(tmp_path: Path) -> None:
    file = file_of_bundled(tmp_path)
    for words, meant in ((["--imatrix", str(file)], str(file)), (["--imatrix", "--bits", "4"], True)):
        taken: dict[str, Any] = {}

        @click.command()
        @recipe_options
        def command(into: dict[str, Any] = taken, **options: Any) -> None:
            into["recipe"] = recipe_from(options)

        done = CliRunner().invoke(command, ["--algorithm", "opt-rtn", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert taken["recipe"].chain.algorithm.imatrix == meant
        assert taken["recipe"].reads_activations == (meant is True)
