"""`gguf:f32`, `gguf:f16` and `gguf:bf16` beside llama.cpp's converter: the same files, byte for byte.

llama.cpp's source stands in `.peers/llama-cpp` (or `$ROUNDEL_PEERS/llama-cpp`); without it this skips. Its converter
takes Gemma 2 and Phi-3 only with a sentencepiece tokenizer, which the test models have not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import roundel
from formats.test_gguf_reading import OWN, SIZES
from models.pico import build
from roundel.data.bundled import bundled_model

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("ROUNDEL_PEERS", HERE.parents[1] / ".peers"))
PYTHON = PEERS / "llama-cpp" / "bin" / "python"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llama", "f32", {}),
    ("llama", "f16", {}),
    ("llama", "bf16", {"rope_parameters": LLAMA3}),  # has a tensor of its own
    ("mistral", "f16", {}),
    ("mixtral", "bf16", {}),
    ("qwen2", "f16", {}),  # with biases
    ("qwen2_moe", "f16", {}),
    ("qwen3", "f16", {"tie_word_embeddings": True}),
    ("qwen3_moe", "bf16", {}),
    ("gemma3_text", "f16", {}),
    ("gpt_oss", "f16", {}),
)

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"llama.cpp is not there: no {PYTHON}")


@pytest.mark.parametrize(("model_type", "kind", "config"), CASES)
def test_same_file(model_type: str, kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    more = {"max_position_embeddings": 512, "vocab_size": 2048, **SIZES, **OWN.get(model_type, {}), **config}
    model = build(model_type, tmp_path / "model", **more)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, model)
    theirs = tmp_path / "theirs.gguf"
    done = subprocess.run(
        [PYTHON, HERE / "llama_cpp.py", "convert", model, theirs, kind], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    roundel.quantize(model, tmp_path / "out", format=f"gguf:{kind}", workers=2)
    (ours,) = (tmp_path / "out").glob("*.gguf")
    assert ours.read_bytes() == theirs.read_bytes()
