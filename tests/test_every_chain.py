"""Every algorithm and transform from the command line to its files: all integer widths on each kind of model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from models.pico import build
from roundel.algorithms import ALGORITHMS
from roundel.checkpoint import open_checkpoint
from roundel.cli.main import cli
from roundel.report import LOG
from roundel.transforms import TRANSFORMS
from roundel.verification import verify

CHAINS = {
    "rtn": (),
    "opt-rtn": (),
    "opt-rtn --imatrix": ("--imatrix",),
    "hqq": (),
    "gptq": (),
    "signround": ("--iters", "2"),
    "awq,rtn": ("--n-grid", "2"),
    "awq,gptq": ("--n-grid", "2"),
    "smoothquant,opt-rtn": (),
    "teq,signround": ("--steps", "2", "--iters", "2"),
}
MODELS = {
    "every head for itself": ("llama", {"num_key_value_heads": 4}),
    "grouped queries": ("llama", {"num_key_value_heads": 2}),
    "experts": ("qwen3_moe", {}),
}
MIXED = {"q_proj": 2, "k_proj": 3, "v_proj": 8, "o_proj": 2, "gate_proj": 3, "up_proj": 4, "down_proj": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tokens.jsonl"
    ids = torch.randint(0, 60, (4, 32), generator=torch.Generator().manual_seed(2)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return path


def quantized(model: Path, out: Path, chain: str, data: Path, *options: str) -> None:
    algorithm, _, _ = chain.partition(" ")
    command = ["quantize", str(model), str(out), "--algorithm", algorithm, *CHAINS[chain], "--group-size", "32"]
    looks = [ALGORITHMS.get(name, TRANSFORMS.get(name)) for name in algorithm.split(",")]
    if "--imatrix" in chain or any(step.reads_activations for step in looks if step is not None):
        command += ["--dataset", str(data), "--nsamples", "4", "--seqlen", "32", "--batch-size", "2"]
    result = CliRunner().invoke(cli, [*command, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_every_step_is_tried_here() -> None:
    assert {name for chain in CHAINS for name in chain.split(" ")[0].split(",")} == {*ALGORITHMS, *TRANSFORMS}


@pytest.mark.parametrize("grid", ["--sym", "--asym"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("chain", CHAINS)
def test_all_widths_in_all_integer_formats(chain: str, kind: str, grid: str, data: Path, tmp_path: Path) -> None:
    model_type, settings = MODELS[kind]
    model = build(model_type, tmp_path / "model", **settings)
    mixed = json.dumps({name: {"bits": bits} for name, bits in MIXED.items()})
    quantized(model, tmp_path / "out", chain, data, grid, "--format", "auto_round,auto_gptq", "--layer-config", mixed)
    folders = {format: tmp_path / "out" / format for format in ("auto_round", "auto_gptq")}
    if grid == "--asym":  # AWQ's runtimes know 4 bits with zero points
        folders["auto_awq"] = tmp_path / "awq"
        quantized(model, folders["auto_awq"], chain, data, grid, "--format", "auto_awq")
    for format, folder in folders.items():
        assert verify(folder, model).problems == ()
        checkpoint = open_checkpoint(folder)
        for name, matrix in checkpoint.layers.items():
            bits = 4 if format == "auto_awq" else MIXED[name.rpartition(".")[2]]
            scheme = matrix.stored.scheme
            assert scheme is not None
            assert (scheme.bits, scheme.weight.symmetric) == (bits, grid == "--sym")
            assert len(checkpoint.decode(name).unique()) > 2
        assert len(checkpoint.layers) >= 14
        checkpoint.close()


@pytest.mark.parametrize("chain", ["gptq", "awq,gptq", "opt-rtn --imatrix", "signround"])
def test_every_expert_can_be_shown_every_token(chain: str, data: Path, tmp_path: Path) -> None:
    """The counts say so, the model's own outputs stay what they are."""
    model = build("qwen3_moe", tmp_path / "model")
    seen: dict[str, dict[str, int]] = {}
    for name, options in {"routed": (), "all": ("--calibrate-all-experts",)}.items():
        quantized(model, tmp_path / name, chain, data, *options)
        rows = [json.loads(line) for line in (tmp_path / name / LOG).read_text().splitlines()]
        seen[name] = {row["name"]: row["tokens"] for row in rows}
    experts = [name for name in seen["all"] if ".experts." in name]
    assert len(experts) > 8
    assert all(seen["all"][name] == 4 * 32 for name in experts)
    assert any(seen["routed"][name] < 4 * 32 for name in experts)
    assert all(seen["all"][name] == seen["routed"][name] == 4 * 32 for name in seen["all"] if name not in experts)
