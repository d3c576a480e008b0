"""Our GGUF files are those of llama.cpp's converter and quantizer: keys, their types and order, tensors, bytes.

llama.cpp's source and library stand in `.peers/llama-cpp` (or `$ROUNDEL_PEERS/llama-cpp`); without them this skips.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import roundel
from formats.test_gguf import tokenized
from formats.test_gguf_deepseek import importances
from formats.test_gguf_reading import sized
from roundel.formats.gguf.mixtures import MIXTURES
from roundel.io.gguf import GgufValue, read_gguf, read_tensor

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("ROUNDEL_PEERS", HERE.parents[1] / ".peers"))
PYTHON = PEERS / "llama-cpp" / "bin" / "python"
LIBRARY = PEERS / "llama-cpp" / "build" / "bin" / "libllama.so"
KINDS = {"u32": "UINT32", "i32": "INT32", "f32": "FLOAT32", "bool": "BOOL", "str": "STRING", "u64": "UINT64"}
PIECES = ("gemma2", "phi3")  # which the converter takes with a SentencePiece tokenizer alone
TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gemma3",
         "phi3", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3")  # fmt: skip
TRAINED = (
    "import sentencepiece, sys; sentencepiece.SentencePieceTrainer.train(input=sys.argv[1], model_prefix=sys.argv[2], "
    "vocab_size=250, model_type='bpe', character_coverage=0.98, hard_vocab_limit=False, pad_id=3)"
)
FEW = ("q8_0", "q4_k_m", "q2_k", "mxfp4_moe")

pytestmark = pytest.mark.skipif(
    not (PYTHON.exists() and LIBRARY.exists()), reason=f"llama.cpp is not there: no {PYTHON} or no {LIBRARY}"
)


def ran(*arguments: object) -> str:
    done = subprocess.run(
        [PYTHON, HERE / "llama_cpp.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        errors="replace",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def seen(path: Path) -> dict[str, Any]:
    """A file as the gguf package reads it."""
    found: dict[str, Any] = json.loads(ran("see", path))[str(path)]
    return found


def ours(path: Path) -> dict[str, Any]:
    """A file as `seen` has it, by our own reader."""
    header = read_gguf(path)
    tensors = {
        name: [tensor.type, list(tensor.shape), hashlib.sha256(read_tensor(path, header.places[name])).hexdigest()]
        for name, tensor in header.tensors.items()
    }
    return {"values": {key: _told(value) for key, value in header.metadata.items()}, "tensors": tensors}


def _told(value: GgufValue) -> list[Any]:
    content = value.value
    if isinstance(content, np.ndarray):
        content = content.tolist()
    elif isinstance(content, tuple):
        content = list(content)
    return [["ARRAY"] * value.is_array + [KINDS[value.kind]], content]


def model_of(model_type: str, folder: Path) -> Path:
    # by 27 blocks llama.cpp knows that queries are not latent
    more = {"num_hidden_layers": 27} if model_type == "deepseek_v2_lite" else {}
    if model_type not in PIECES:
        return tokenized(sized(model_type, folder, **more))
    model = sized(model_type, folder)
    (model / "text.txt").write_text((HERE.parents[1] / "README.md").read_text())
    subprocess.run([PYTHON, "-c", TRAINED, model / "text.txt", model / "tokenizer"], check=True, capture_output=True)
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def compare(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert set(mine["values"]) == set(theirs["values"])
    for key, value in theirs["values"].items():
        assert mine["values"][key] == value, key
    assert set(mine["tensors"]) == set(theirs["tensors"])
    for name, tensor in theirs["tensors"].items():
        assert mine["tensors"][name] == tensor, name


@pytest.mark.parametrize("model_type", TYPES)
def test_the_converter_writes_the_same(model_type: str, tmp_path: Path) -> None:
    model = model_of(model_type, tmp_path / "model")
    ran("convert", model, tmp_path / "theirs.gguf", "f16")
    roundel.quantize(model, tmp_path / "out", format="gguf:f16", workers=1)
    (file,) = (tmp_path / "out").glob("*.gguf")
    mine, theirs = ours(file), seen(tmp_path / "theirs.gguf")
    compare(mine, theirs)
    assert list(mine["values"]) == list(theirs["values"])


@pytest.mark.parametrize("model_type", [*TYPES, "gpt_oss"])
def test_the_quantizer_writes_the_same(model_type: str, tmp_path: Path) -> None:
    model = model_of(model_type, tmp_path / "model")
    mixtures = FEW
    if model_type in ("deepseek_v2", "deepseek_v3"):
        mixtures = tuple(name for name, m in MIXTURES.items() if m.type not in ("F32", "F16", "BF16"))
        mixtures = tuple(name for name in mixtures if not MIXTURES[name].importance)
    numbers = {name: MIXTURES[name].file_type for name in mixtures}
    ran("convert", model, tmp_path / "whole.gguf", "bf16")
    answers = ran("quantize", tmp_path / "whole.gguf", tmp_path / "{}.gguf", "none", *numbers.values()).splitlines()
    assert [json.loads(line)["failed"] for line in answers if line.startswith("{")] == [0] * len(mixtures)
    for name, number in numbers.items():
        roundel.quantize(model, tmp_path / name, format=f"gguf:{name}", workers=1)
        (file,) = (tmp_path / name).glob("*.gguf")
        mine, theirs = ours(file), seen(tmp_path / f"{number}.gguf")
        mine["tensors"] |= {name: [kind, _short(shape), sha] for name, (kind, shape, sha) in mine["tensors"].items()}
        compare(mine, theirs)


def _short(shape: list[int]) -> list[int]:
    """As llama.cpp's quantizer writes it, without outer axes of 1."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def test_the_quantizer_counts_importances_by_heads_as_we_do(tmp_path: Path) -> None:
    """Both parts of DeepSeek's kv_b_proj, of which a file of importances has every head's columns."""
    model = model_of("deepseek_v3", tmp_path / "model")
    importances(tmp_path / "imatrix.gguf")
    mixtures = ("q4_k_m", "q2_k", "q4_0", "iq4_nl")
    numbers = [MIXTURES[name].file_type for name in mixtures]
    ran("convert", model, tmp_path / "whole.gguf", "f32")
    ran("quantize", tmp_path / "whole.gguf", tmp_path / "{}.gguf", tmp_path / "imatrix.gguf", *numbers)
    for name, number in zip(mixtures, numbers, strict=True):
        wish = {"imatrix": str(tmp_path / "imatrix.gguf"), "workers": 1}
        roundel.quantize(model, tmp_path / name, format=f"gguf:{name}", **wish)
        roundel.quantize(model, tmp_path / f"{name}.plain", format=f"gguf:{name}", workers=1)
        mine, plain = (ours(next((tmp_path / out).glob("*.gguf"))) for out in (name, f"{name}.plain"))
        theirs = seen(tmp_path / f"{number}.gguf")
        for part in ("blk.0.attn_k_b.weight", "blk.1.attn_v_b.weight"):
            assert mine["tensors"][part] == theirs["tensors"][part] != plain["tensors"][part]
        assert mine["tensors"] == theirs["tensors"]
