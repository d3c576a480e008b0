"""bitsandbytes' 4 bits: its tables, blocks that run over ends of rows, states that mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import roundel
from formats.test_formats import layer_of, rounded
from models.pico import build
from roundel.checkpoint import open_checkpoint
from roundel.errors import PlanError, SourceError
from roundel.formats import FORMATS
from roundel.formats.bnb import STATE
from roundel.scheme import ELEMENTS, PRESETS
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.verification import verify

BNB = FORMATS["bnb"]


@pytest.mark.parametrize("name", ["NF4", "FP4", "NF4_DQ", "FP4_DQ"])
def test_every_weight_has_its_nearest_value(name: str) -> None:
    layer = layer_of(PRESETS[name], (24, 192))
    weight = torch.randn(24, 192, generator=torch.Generator().manual_seed(3)) * 0.02
    weight[0, :64] = 0
    quantized = rounded(layer, weight)
    scale = quantized.scale.decode() if isinstance(quantized.scale, QuantizedTensor) else quantized.scale
    table = torch.tensor(layer.scheme.weight.element.values)
    reachable = table * scale.repeat_interleave(64, 1)[..., None]
    nearest = (reachable - weight[..., None]).abs().amin(-1)
    assert torch.allclose((quantized.decode() - weight).abs(), nearest, atol=1e-8)
    if not name.endswith("DQ"):
        assert torch.equal(scale, weight.view(24, 3, 64).abs().amax(-1))
        assert (quantized.decode()[0, :64] == 0).all()


def test_the_dynamic_table() -> None:
    values = ELEMENTS["dynamic8"].values
    assert values is not None
    assert len(set(values)) == 256
    assert list(values) == sorted(values)
    assert [values.index(v) for v in (0.0, 1.0)] == [127, 255]
    assert values[0] == -0.992968738079071
    assert (values[126], values[128]) == (-5.500000384017767e-07, 5.500000384017767e-07)


def foreign(shape: tuple[int, int], /, **state: Any) -> dict[str, torch.Tensor]:
    """A matrix in blocks of 64 that run over ends of rows, by the plainest arithmetic."""
    count = shape[0] * shape[1]
    codes = torch.randint(0, 16, (count,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    told = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(shape)} | state
    return {
        "weight": (codes[0::2] << 4 | codes[1::2])[:, None],
        "weight.absmax": torch.rand(-(-count // 64), generator=torch.Generator().manual_seed(2)),
        "weight.quant_map": torch.tensor(ELEMENTS["nf4"].values),
        STATE + "nf4": torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8),
    }


def checkpoint_with(folder: Path, parts: dict[str, torch.Tensor]) -> Path:
    """A pico Llama whose first down_proj is given."""
    build("llama", folder, dtype="float16")
    name = "model.layers.0.mlp.down_proj"
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(f"{name}.weight")
    save_file(tensors | {f"{name}.{part}": t for part, t in parts.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_blocks_may_run_over_ends_of_rows(tmp_path: Path) -> None:
    shape = (10, 36)
    parts = foreign(shape)
    checkpoint = open_checkpoint(checkpoint_with(tmp_path, parts))
    decoded = checkpoint.decode("model.layers.0.mlp.down_proj")
    checkpoint.close()
    octets = parts["weight"].flatten()
    codes = torch.stack((octets >> 4, octets & 15), -1).flatten().long()
    values = parts["weight.quant_map"][codes] * parts["weight.absmax"].repeat_interleave(64)[: len(codes)]
    assert torch.equal(decoded, values.view(shape))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "source")
    for scheme in ("NF4", "FP4_DQ"):
        report = roundel.quantize(source, tmp_path / scheme, scheme=scheme, format="bnb")
        checkpoint = open_checkpoint(tmp_path / scheme)
        assert {layer.scheme.name for layer in checkpoint.layers.values()} == {scheme}
        assert set(checkpoint.layers) == {layer.name for layer in report.plan.layers}
        checkpoint.close()
        assert verify(tmp_path / scheme, source).passed
    with pytest.raises(PlanError, match="whole blocks"):
        roundel.quantize(
            build("llama", tmp_path / "odd", intermediate_size=96), tmp_path / "o", scheme="NF4", format="bnb"
        )


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"shape": [10, 37]}, "shape"),
        ({"shape": [-10, -36]}, "shape"),
        ({"shape": "all"}, "shape"),
        ({"blocksize": 32}, "blocksize"),
        ({"blocksize": 0}, "blocksize"),
        ({"quant_type": "fp4"}, "type 'fp4'"),
        ({"nested_blocksize": 128}, "nested_blocksize"),
    ],
)
def test_a_state_that_means_nothing_is_told(state: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=why):
        open_checkpoint(checkpoint_with(tmp_path, foreign((10, 36), **state)))


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 5000, b'{"shape": ' + b"9" * 5000 + b"}"])
def test_a_state_that_is_no_json_is_told(raw: bytes, tmp_path: Path) -> None:
    parts = foreign((10, 36)) | {STATE + "nf4": torch.tensor(list(raw), dtype=torch.uint8)}
    with pytest.raises(SourceError, match="quant_state"):
        open_checkpoint(checkpoint_with(tmp_path, parts))


def test_lost_parts_and_other_tables_are_told(tmp_path: Path) -> None:
    for lost in ("weight.quant_map", "weight.absmax", STATE + "nf4"):
        parts = {name: t for name, t in foreign((10, 36)).items() if name != lost}
        with pytest.raises(SourceError, match=r"absmax|quant_map|quant_state"):
            open_checkpoint(checkpoint_with(tmp_path / lost, parts))
    parts = foreign((10, 36))
    parts["weight.quant_map"][3] += 0.01
    checkpoint = open_checkpoint(checkpoint_with(tmp_path / "other", parts))
    with pytest.raises(SourceError, match="quant_map is not nf4's"):
        checkpoint.decode("model.layers.0.mlp.down_proj")
    checkpoint.close()


def test_a_huge_state_is_not_read() -> None:
    def read(part: str) -> bytes:
        raise AssertionError(part)

    specs = {"weight": TensorSpec("", "U8", (180, 1)), STATE + "nf4": TensorSpec("", "U8", (1 << 30,))}
    with pytest.raises(SourceError, match="bytes"):
        BNB.known("a.b", specs, read)
