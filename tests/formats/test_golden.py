"""Files that other tools wrote decode to what those tools decode them to, and go back to the same bytes.

`golden/` is written by `peers/write_golden.py`: a layer [32, 128] for each scheme, and the tool's own decode of it, in
the dtype it computes in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from roundel.formats import reader_of
from roundel.tensor import TensorSpec
from roundel.unit import Layer, Stored

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors") if not path.stem.endswith(".decoded"))
DTYPES = {"torch.uint8": "U8", "torch.int8": "I8", "torch.int32": "I32", "torch.int64": "I64", "torch.bfloat16": "BF16",
          "torch.float32": "F32", "torch.float8_e4m3fn": "F8_E4M3"}  # fmt: skip


def test_every_layout_has_a_file() -> None:
    layouts = {config_of(name)["format"] for name in NAMES}
    assert layouts >= {"pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized"}


@pytest.mark.parametrize("name", NAMES)
def test_decodes_as_its_writer_does(name: str) -> None:
    tensors, decoded = load_file(GOLDEN / f"{name}.safetensors"), load_file(GOLDEN / f"{name}.decoded.safetensors")
    reader = reader_of({"quantization_config": config_of(name)})
    assert reader is not None
    for module, expected in decoded.items():
        parts = {key.removeprefix(f"{module}."): t for key, t in tensors.items() if key.startswith(f"{module}.")}
        specs = {part: TensorSpec(part, DTYPES[str(t.dtype)], tuple(t.shape)) for part, t in parts.items()}
        found = reader.find(module, specs)
        assert found is not None
        assert found.shape == tuple(expected.shape)
        stored = Stored(format=reader.name, scheme=found.scheme)
        layer = Layer(name=module, shape=found.shape, dtype="BF16", scheme=found.scheme, stored=stored)
        quantized = reader.unpack(layer, {part: parts[part] for part in found.parts})
        assert torch.equal(quantized.decode().bfloat16(), expected)
        if name != "W4AFP8":  # of which the tool stores a byte for each code, and ours are packed
            again = reader.pack(layer, quantized)
            assert set(again) == set(found.parts)
            for part, tensor in again.items():
                assert torch.equal(tensor.flatten().view(torch.uint8), parts[part].flatten().view(torch.uint8)), part


def config_of(name: str) -> dict[str, Any]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        config: dict[str, Any] = json.loads(file.metadata()["config"])
    return config
