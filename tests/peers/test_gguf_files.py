"""Our GGUF files as the gguf package and llama.cpp read them, and a file of the gguf package as we do.

Both run in an environment of their own (`.peers/gguf`, or `$ROUNDEL_PEERS/gguf`); without it these tests skip.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ops.block_cases import matrix
from roundel.formats.gguf.block_types import BLOCK_TYPES
from roundel.io.gguf import GgufTensor, GgufValue, lay_out_gguf, read_gguf, read_tensor
from roundel.io.safetensors import Shard

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("ROUNDEL_PEERS", HERE.parents[1] / ".peers"))
PYTHON = PEERS / "gguf" / "bin" / "python"
NAMES = {"u32": "UINT32", "i32": "INT32", "f32": "FLOAT32", "bool": "BOOL", "str": "STRING", "u64": "UINT64"}

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"xllamacpp is not installed: no {PYTHON}")


def ran(*arguments: object) -> str:
    done = subprocess.run(
        [PYTHON, HERE / "gguf_files.py", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("alignment", [32, 128])
def test_others_see_what_was_written(alignment: int, tmp_path: Path) -> None:
    values = {
        "general.architecture": GgufValue("str", "llama"),
        "general.alignment": GgufValue("u32", alignment),
        "llama.block_count": GgufValue("u32", 2),
        "llama.rope.freq_base": GgufValue("f32", 500000.0),
        "tokenizer.ggml.add_bos_token": GgufValue("bool", False),
        "tokenizer.ggml.tokens": GgufValue("str", ("<s>", "ü", "日本")),
        "tokenizer.ggml.scores": GgufValue("f32", np.array([0.5, -1, 3], "<f4")),
        "tokenizer.ggml.token_type": GgufValue("i32", np.array([3, 1, 1], "<i4")),
        "size": GgufValue("u64", 2**60),
    }
    weight = matrix("normal", (4, 512))
    contents = {f"{name}.weight": (name, kind.round_and_pack(weight)) for name, kind in BLOCK_TYPES.items()}
    contents |= {"norm.weight": ("F32", weight), "half.weight": ("BF16", weight.bfloat16().view(torch.int16))}
    tensors = [GgufTensor(name, kind, (4, 512)) for name, (kind, _) in contents.items()]
    shard = Shard(tmp_path, lay_out_gguf("model.gguf", values, tensors))
    digests = {}
    for name, (kind, content) in reversed(contents.items()):
        data = content.numpy().tobytes()
        shard.put(name, data)
        digests[name] = [kind, [4, 512], hashlib.sha256(data).hexdigest()]
    shard.finish()
    seen = json.loads(ran("read", tmp_path / "model.gguf"))
    assert seen["tensors"] == digests
    for key, value in values.items():
        kinds, content = seen["values"][key]
        assert kinds == ["ARRAY"] * value.is_array + [NAMES[value.kind]]
        assert content == (list(value.value) if isinstance(value.value, tuple | np.ndarray) else value.value)
    assert set(seen["values"]) == set(values)
    assert seen["llama"] == {
        "n_tensors": len(tensors),
        "n_kv": len(values),
        "alignment": alignment,
        "data_offset": len(shard.layout.header),
    }


def test_a_file_of_another_is_read(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    ran("write", path)
    header = read_gguf(path)
    assert header.metadata["general.architecture"].value == "llama"
    assert header.metadata["tokenizer.ggml.tokens"].value == ("<s>", "a", "ü")
    assert header.tensors["blocks.weight"] == GgufTensor("blocks.weight", "Q8_0", (2, 256))
    values = torch.arange(512).float().view(2, 256)
    raw = read_tensor(path, header.places["float.weight"])
    assert torch.equal(torch.from_numpy(raw.view(np.float32).reshape(2, 256).copy()), values)
    packed = torch.from_numpy(read_tensor(path, header.places["blocks.weight"]).reshape(2, -1).copy())
    assert torch.equal(packed, BLOCK_TYPES["Q8_0"].round_and_pack(values))
