"""Converted checkpoints in the runtimes that they were converted for: these say what the source's weights say.

Consumers are those of `test_consumers.py`, and its notion of equal: the logits of the weights that roundel reads from
the checkpoint before it was converted.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import roundel
from peers.test_consumers import (
    CONSUMERS,
    HERE,
    LOADER_OF,
    NEAR,
    PROMPT,
    Case,
    divergence,
    make_model,
    python_of,
    reference,
)
from roundel.checkpoint import open_checkpoint

# (model, scheme, stored as, then converted one after the other; the last is loaded, by this loader)
CHAINS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("tinybook", "W4A16G64", ("auto_round", "auto_gptq"), "transformers"),
    ("tinybook", "W4A16G64", ("auto_round", "auto_awq"), "transformers"),
    ("tinybook", "W4A16G64", ("auto_round", "llm_compressor"), "dequantize"),
    ("tinybook", "W4A16G64", ("auto_round", "mlx"), "transformers"),
    ("tinybook", "W4A16G64", ("auto_round", "hqq"), "hqq"),
    ("tinybook", "W4A16G64", ("auto_round", "auto_gptq", "auto_awq", "llm_compressor", "mlx", "auto_round"),
     "transformers"),
    ("llama", "W4A16_ASYM", ("auto_awq", "auto_gptq"), "transformers"),
    ("llama", "W4A16_ASYM", ("auto_gptq", "auto_awq"), "transformers"),
    ("llama", "W4A16_ASYM", ("auto_awq", "mlx"), "transformers"),  # with scales in float32
    ("llama", "W4A16_ASYM", ("auto_awq", "llm_compressor"), "dequantize"),
    ("llama", "W4A16_ASYM", ("hqq", "auto_round:mlx"), "transformers"),
    ("llama", "W3A16", ("mlx", "gptq_v2"), "transformers"),
    ("llama", "W5A16G64", ("mlx", "auto_gptq"), "transformers"),  # in 8 bits
    ("llama", "MXINT4", ("auto_round", "auto_awq"), "transformers"),
    ("llama", "MXFP4A16", ("llm_compressor", "mlx"), "transformers"),
    ("llama", "MXFP4A16", ("mlx", "llm_compressor"), "dequantize"),
    ("llama", "FP8_BLOCK", ("fp8", "llm_compressor"), "dequantize"),  # with scales in float32
    ("llama", "FP8_BLOCK", ("llm_compressor", "fp8"), "transformers"),
    ("llama", "FPW8A16", ("llm_compressor", "fake"), "transformers"),
    ("qwen3_moe", "W4A16G64", ("mlx", "auto_round"), "transformers"),
    ("qwen3_moe", "W4A16G64", ("auto_round", "mlx"), "transformers"),
)  # fmt: skip
IN_BFLOAT16 = ("llm_compressor", "fp8", "fake")  # the model's own, in which `fake` stores weights


def name_of(chain: tuple[str, str, tuple[str, ...], str]) -> str:
    model, scheme, formats, _ = chain
    return "-".join((model, scheme, *formats)).replace(":", "_")


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each consumer said of the last checkpoint of each chain."""
    work = tmp_path_factory.mktemp("conversions")
    sources = {model: make_model(model, work / model) for model in {chain[0] for chain in CHAINS}}
    jobs: dict[str, list[dict[str, Any]]] = {}
    for chain in CHAINS:
        model, scheme, formats, loader = chain
        consumer = CONSUMERS[formats[-1]]
        if not python_of(consumer).exists():
            continue
        folder = work / name_of(chain)
        roundel.quantize(sources[model], folder / "0", scheme=scheme, format=formats[0])
        for number, format in enumerate(formats[1:]):
            roundel.convert(folder / str(number), folder / str(number + 1), format=format)
        jobs.setdefault(consumer, []).append({
            "name": name_of(chain), "process": loader if consumer == "gptqmodel" else name_of(chain),
            "folder": str(folder / str(len(formats) - 1)), "ours": str(folder / "0"), "prompt": PROMPT,
            "logits": str(folder / "logits.npy"), "loader": loader,
            "dtype": "bfloat16" if formats[-1] in IN_BFLOAT16 else "float32",
        })  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for consumer, todo in jobs.items():
        (work / "jobs.json").write_text(json.dumps(sorted(todo, key=lambda job: str(job["process"]))))
        script = HERE / LOADER_OF.get(consumer, "load_checkpoint.py")
        with (work / f"{consumer}.log").open("w") as log:
            lines = subprocess.run(
                [str(python_of(consumer)), str(script), str(work / "jobs.json")],
                stdout=subprocess.PIPE, stderr=log, text=True, check=True,
            ).stdout  # fmt: skip
        said = {result["name"]: result for result in map(json.loads, lines.splitlines())}
        found |= {job["name"]: job | said[job["name"]] for job in todo}
    return found


@pytest.mark.parametrize("chain", CHAINS, ids=name_of)
def test_says_what_the_source_says(chain: tuple[str, str, tuple[str, ...], str], loaded: dict[str, Any]) -> None:
    model, scheme, formats, loader = chain
    consumer = CONSUMERS[formats[-1]]
    if name_of(chain) not in loaded:
        pytest.skip(f"{consumer} is not installed: no {python_of(consumer)}")
    result = loaded[name_of(chain)]
    assert result["ok"], result["error"]
    checkpoint = open_checkpoint(result["folder"])
    rounds_inputs = any(layer.scheme.input is not None for layer in checkpoint.layers.values())
    checkpoint.close()
    loader = loader if rounds_inputs else "dequantize"  # of weights alone, as the reference says
    case = Case(model=model, scheme=scheme, format=formats[-1], loader=loader)
    expected = reference(case, result)
    assert Path(result["logits"]).exists()
    assert divergence(expected, np.load(result["logits"])) < NEAR
