"""Our GGUF files in llama.cpp: they load and generate, and it says of the next token what our own reading of them says.

llama.cpp runs as a program in an environment of its own (`.peers/gguf`, or `$ROUNDEL_PEERS/gguf`); without it these
tests skip. It rounds what enters a matrix to 8 bits, and keys and values to 16; the bounds leave room for that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import roundel
from formats.test_gguf_reading import remade, sized
from roundel.calibration.tokenizer import load_tokenizer
from roundel.data.bundled import bundled_model
from roundel.formats.gguf.mixtures import MIXTURES
from roundel.formats.gguf.source import tokenizer_home
from roundel.io.gguf import GgufValue

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("ROUNDEL_PEERS", HERE.parents[1] / ".peers"))
PYTHON = PEERS / "gguf" / "bin" / "python"
BOUNDS = {"f32": 1e-5, "f16": 1e-4, "bf16": 1e-3}  # where weights are floats, inputs are rounded to these
PROMPT = [3, 17, 99, 42, 7, 7, 201, 150, 33, 250, 12, 64]

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"xllamacpp is not installed: no {PYTHON}")


def compared(files: dict[str, Path], tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Name -> what llama.cpp said of a file: its greedy `tokens`, and its mean KL divergence from our reading, `kl`."""
    models = {name: roundel.load(file, backend="torch") for name, file in files.items()}
    jobs = [
        {"path": str(file), "prompt": PROMPT, "output": str(tmp_path / f"{name}.npy"),
         "vocabulary": models[name].config.get_text_config().vocab_size}
        for name, file in files.items()
    ]  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [PYTHON, HERE / "load_gguf.py", tmp_path / "jobs.json"], capture_output=True, text=True, check=False
    )
    found = {}
    for name, line in zip(files, done.stdout.splitlines(), strict=True):
        said = json.loads(line)
        assert said["ok"], f"{name}: {said.get('error')}\n{done.stderr[-2000:]}"
        with torch.no_grad():
            ours = models[name](input_ids=torch.tensor([PROMPT])).logits[0].double().log_softmax(-1)
        theirs = torch.from_numpy(np.load(tmp_path / f"{name}.npy")).double()
        found[name] = said | {"kl": float((ours.exp() * (ours - theirs)).sum(-1).mean()), "ours": ours}
    return found


def untold() -> list[int]:
    """Tokens after which the server tells no probabilities: the end of a text, and parts of characters."""
    vocabulary = json.loads((bundled_model() / "tokenizer.json").read_text())["model"]["vocab"]
    return [0, *(number for text, number in vocabulary.items() if not text.strip("ĠĊ").isascii())]


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma2",
                                        "gemma3_text", "phi3", "gpt_oss", "deepseek_v2", "deepseek_v2_lite",
                                        "deepseek_v3"])  # fmt: skip
def test_every_family(model_type: str, tmp_path: Path) -> None:
    more = {"max_position_embeddings": 512, "vocab_size": 2048}
    if model_type == "deepseek_v2_lite":
        more["num_hidden_layers"] = 27  # by which llama.cpp knows that queries are not latent
    model = sized(model_type, tmp_path / "model", **more)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, model)
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name][untold()] = 0  # so that they are never the likeliest
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    files = {}
    for mixture in ("f32", "f16", "bf16", "q8_0", "q4_k_m"):
        roundel.quantize(model, tmp_path / mixture, format=f"gguf:{mixture}", workers=1)
        (files[mixture],) = (tmp_path / mixture).glob("*.gguf")
    found = compared(files, tmp_path)
    for name, said in found.items():
        assert said["kl"] < BOUNDS.get(name, 1e-2), f"{name}: {said['kl']}"
    assert all(len(said["tokens"]) == 8 for said in found.values())


@pytest.mark.parametrize("mixture", [name for name in MIXTURES if name != "mxfp4_moe"])
def test_every_mixture(mixture: str, tmp_path: Path) -> None:
    if MIXTURES[mixture].importance:
        pytest.skip("written with an importance matrix only")
    roundel.quantize(bundled_model(), tmp_path / "out", format=f"gguf:{mixture}", workers=1)
    (file,) = (tmp_path / "out").glob("*.gguf")
    said = compared({"file": file}, tmp_path)["file"]
    assert said["kl"] < 5e-3, said["kl"]
    assert len(said["tokens"]) == 8


TEXT = (
    "It's 12345 o'clock; don't  stop!\n\n\tdef f(x): return x**2  # why?\r\n\u4f60\u597d\uff0c\u4e16\u754c 3.14 "
    "\u00dcn\u00efc\u00f6d\u00e9 \u10d0\u10d1 \u0561\u0562 \u30ab\u30bf $HOME/.x (a_b)[-1] \u201cq\u201d ..."
)


@pytest.mark.parametrize("split", ["deepseek-llm", "deepseek-v3", "gpt-2", "qwen2", "llama-bpe", "gpt-4o", "tekken"])
def test_made_tokenizers_split_words_as_llama_cpp_does(split: str, tmp_path: Path) -> None:
    roundel.quantize(bundled_model(), tmp_path / "out", format="gguf:q8_0", workers=1)
    (file,) = (tmp_path / "out").glob("*.gguf")
    bare = remade(file, tmp_path / "bare.gguf", tokenizer__ggml__pre=GgufValue("str", split))
    size = len(json.loads((bundled_model() / "tokenizer.json").read_text())["model"]["vocab"])
    job = {"path": str(bare), "prompt": PROMPT[:1], "output": str(tmp_path / "x.npy"), "vocabulary": size, "text": TEXT}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    done = subprocess.run(
        [PYTHON, HERE / "load_gguf.py", tmp_path / "jobs.json"], capture_output=True, text=True, check=False
    )
    said = json.loads(done.stdout.splitlines()[-1])
    with tokenizer_home(bare) as home:
        ours = load_tokenizer(home).encode(TEXT, add_special_tokens=True, verbose=False)
    assert said["ok"], said
    assert said["ids"] == ours
