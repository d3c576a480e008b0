"""Every algorithm and transform from the command line to its files: all integer widths on each kind of model."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from models.pico import build
from roundel.algorithms import ALGORITHMS
from roundel.chain import Value, known_options
from roundel.checkpoint import open_checkpoint
from roundel.cli.main import cli
from roundel.cli.options import recipe_from, recipe_options
from roundel.recipe import Recipe
from roundel.report import LOG
from roundel.transforms import TRANSFORMS
from roundel.verification import verify
from transforms.units import spacious

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
CHANGED: dict[str, dict[str, tuple[Value, dict[str, Value]]]] = {  # field -> another value, and what it needs beside it
    "rtn": {},
    "opt-rtn": {
        "imatrix": (True, {}),
        "unbiased": (1.0, {}),
        "min_tokens": (10**6, {"imatrix": True}),
    },
    "hqq": {
        "iterations": (1, {}),
        "norm": (0.4, {}),
        "beta": (1e4, {}),
        "kappa": (3.0, {"beta": 100.0}),
        "quant_scale": (True, {}),
        "quant_zero": (True, {}),
        "meta_group": (16, {"quant_scale": True}),
    },
    "gptq": {
        "damping": (0.5, {}),
        "shrinkage": (False, {}),
        "damping_step": (0.3, {"damping": 0.0, "shrinkage": False}),
        "act_order": (True, {}),
        "static_groups": (True, {}),
        "group_order": (False, {}),
        "true_sequential": (False, {}),
        "trials": (0, {}),
        "min_tokens": (10**6, {}),
    },
    "signround": {
        "iters": (9, {}),
        "lr": (0.3, {}),
        "minmax_lr": (0.1, {}),
        "schedule": ("cosine", {}),
        "optimizer": ("adam", {}),
        "start": ("rtn", {}),
        "tune_range": (False, {}),
        "scale_dtype": ("bfloat16", {}),
        "quantized_inputs": (False, {}),
        "keep_best": (True, {"lr": 1.0}),
        "batch_size": (4, {}),
        "gradient_accumulation": (2, {}),
        "min_tokens": (10**6, {}),
        "seed": (1, {}),
    },
    "awq": {
        "n_grid": (3, {}),
        "duo_scaling": (False, {}),
        "clip": (False, {}),
        "n_clip_grid": (5, {}),
        "max_shrink": (0.1, {}),
        "search_tokens": (24, {}),
        "clip_tokens": (24, {}),
        "stream": ("quantized", {}),
    },
    "teq": {
        "steps": (6, {}),
        "lr": (0.02, {}),
        "beta1": (0.2, {}),
        "beta2": (0.3, {}),
        "warmup": (0.5, {}),
        "batch_size": (4, {}),
        "smooth_start": (False, {}),
        "seed": (1, {}),
    },
    "smoothquant": {"alpha": (0.8, {})},
}
BASE: dict[str, dict[str, Value]] = {
    "signround": {"iters": 5, "lr": 0.05, "batch_size": 2, "keep_best": False},
    "teq": {"steps": 12, "lr": 0.05, "batch_size": 2},
}
SAME = {  # speed, memory, what makes a unit, and a file that has tests of its own
    "gptq": {"block_size"},
    "signround": {"blocks", "low_memory"},
    "rtn": {"imatrix"},
}


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


def made(name: str, options: dict[str, Value]) -> tuple[dict[str, Tensor], object]:
    """What a step makes of a unit, and what it says of it."""
    unit = spacious("W2A16G16_HQQ" if name == "hqq" else "W2A16G16", samples=3, inner=128, noise=0.2)
    if name in TRANSFORMS:
        found = replace(TRANSFORMS[name], **options).apply(unit)  # type: ignore[type-var]
        return dict(found.unit.weights), found.notes
    rounded = replace(ALGORITHMS[name], **options).quantize(unit)  # type: ignore[type-var]
    return {n: r.tensor.decode() for n, r in rounded.items()}, {n: r.fallback for n, r in rounded.items()}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, changed in CHANGED.items() for field in changed])
def test_every_option_has_an_effect(name: str, field: str) -> None:
    """auto-round's AWQ stores `apply_smooth` and never looks at it; INC swallows `hybrid_act_order`."""
    value, beside = CHANGED[name][field]
    base = BASE.get(name, {}) | beside
    usual, other = made(name, base), made(name, base | {field: value})
    assert usual[1] != other[1] or any(not torch.equal(usual[0][n], other[0][n]) for n in usual[0])


def test_every_option_is_tried_here() -> None:
    for name, step in {**ALGORITHMS, **TRANSFORMS}.items():
        assert {f.name for f in fields(step)} == CHANGED[name].keys() | SAME.get(name, set()), name  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CHANGED)
def test_every_option_reaches_its_step(name: str) -> None:
    """auto-round's `--disable_amp` is taken, and told nobody."""
    found: list[Recipe] = []
    taking = click.Command("taking", callback=lambda **given: found.append(recipe_from(given)))
    recipe_options(taking)
    for field, (value, _) in CHANGED[name].items():
        flag = field.replace("_", "-")
        is_switch = known_options()[field].kinds == {"bool"}
        given = [f"--{'' if value else 'no-'}{flag}"] if is_switch else [f"--{flag}", str(value)]
        done = CliRunner().invoke(taking, ["--algorithm", name, *given], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        (step,) = (step for step in found.pop().chain.steps if step.name == name)
        assert getattr(step, field) == value, field
