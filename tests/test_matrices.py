"""What matrices have in common: NVFP4's float for the whole matrix, among those that runtimes stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import roundel
from models.pico import build
from models.raw import hashes, plant
from roundel.checkpoint import open_checkpoint
from roundel.errors import PlanError
from roundel.families.stacked import stacked_with
from roundel.matrices import errors_in, errors_of, largest
from roundel.ops.encode import encode
from roundel.scheme import PRESETS
from roundel.tensor import QuantizedTensor
from victim import Victims

NVFP4: dict[str, Any] = {"scheme": "NVFP4A16", "format": "llm_compressor"}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    served = Victims()
    yield served
    served.close()


def floats(out: Path) -> dict[str, float]:
    """The divisors of whole matrices, by module."""
    end = ".weight_global_scale"
    tensors = {name: t for path in out.glob("*.safetensors") for name, t in load_file(path).items()}
    return {name.removesuffix(end): float(t) for name, t in tensors.items() if name.endswith(end)}


def test_names_of_those_that_are_stacked() -> None:
    assert stacked_with("a.k_proj") == ("a.q_proj", "a.k_proj", "a.v_proj")
    assert stacked_with("experts.3.w3") == ("experts.3.w1", "experts.3.w3")
    assert stacked_with("a.down_proj") == ()
    assert stacked_with("up_proj") == ("gate_proj", "up_proj")


def test_the_largest_of_finite_weights() -> None:
    assert largest(torch.tensor([[1.0, -3.0], [float("nan"), float("inf")]])) == 3.0
    assert largest(torch.empty(0, 4)) == 0.0


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_errors_are_those_of_the_whole_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 512, generator=torch.Generator().manual_seed(0))
    rounded = encode(weight, PRESETS[name].weight)
    whole = errors_of(weight, rounded.decode())
    monkeypatch.setattr("roundel.matrices.COMPARED", 2048)
    shapes: list[tuple[int, int]] = []

    def decode(part: QuantizedTensor) -> Tensor:
        shapes.append(part.shape)
        return part.decode()

    found = errors_in(weight, rounded, decode)
    assert (found.signal, found.noise) == pytest.approx((whole.signal, whole.noise), rel=1e-12)
    assert len(shapes) == (10 if rounded.has_rows else 1)
    assert rounded.has_rows == (PRESETS[name].weight.block[0] == 1 and not name.endswith("_DQ"))
    if rounded.has_rows:
        assert torch.equal(rounded.rows(torch.tensor([30, 2])).decode(), rounded.decode()[[30, 2]])


@pytest.mark.parametrize("algorithm", ["rtn", "opt-rtn"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "mixtral", "gpt_oss"])
def test_stacked_matrices_share_their_float(model_type: str, algorithm: str, tmp_path: Path) -> None:
    source = build(model_type, tmp_path / "model", shards=3)
    roundel.quantize(source, tmp_path / "out", algorithm=algorithm, **NVFP4)
    found, checkpoint = floats(tmp_path / "out"), open_checkpoint(source)
    for name, divisor in found.items():
        together = [other for other in stacked_with(name) or (name,) if other in found]
        if checkpoint.matrices[name].stored.scheme is not None and together == [name]:
            assert divisor == 1.0  # MXFP4 moves over as it is
            continue
        highest = max(float(checkpoint.decode(other).abs().max()) for other in together)
        assert divisor == pytest.approx(448 * 6 / highest, rel=1e-6), name
        assert {found[other] for other in together} == {divisor}
    assert any(len(stacked_with(name)) > 1 for name in found)
    checkpoint.close()


def test_others_on_the_same_grid_only(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "model")
    plant(source, f"{ATTENTION}.q_proj.weight", 7, 9.0)
    plant(source, f"{ATTENTION}.v_proj.weight", 7, 7.0)
    options = NVFP4 | {"layer_config": {f"{ATTENTION}.q_proj": "FP8_DYNAMIC"}}
    roundel.quantize(source, tmp_path / "out", **options)
    assert floats(tmp_path / "out")[f"{ATTENTION}.k_proj"] == pytest.approx(448 * 6 / 7)
    roundel.quantize(source, tmp_path / "kept", **NVFP4, ignore_layers=["q_proj", "v_proj"])
    assert floats(tmp_path / "kept")[f"{ATTENTION}.k_proj"] > 448 * 6 / 7


def test_calibrated_runs_share_them_too(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "model")
    roundel.quantize(source, tmp_path / "plain", **NVFP4)
    ids = [list(range(3, 19)), list(range(20, 36))]
    measured = NVFP4 | {"scheme": "NVFP4", "dataset": ids, "nsamples": 2, "seqlen": 16}
    roundel.quantize(source, tmp_path / "measured", **measured)
    assert floats(tmp_path / "measured") == floats(tmp_path / "plain")
    tensors = load_file(tmp_path / "measured" / "model.safetensors")
    inputs = {float(tensors[f"{ATTENTION}.{name}_proj.input_global_scale"]) for name in "qkv"}
    assert len(inputs) == 1


def test_conversions_share_them_too(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "model", shards=3)
    plant(source, f"{ATTENTION}.k_proj.weight", 7, 3.0)
    roundel.quantize(source, tmp_path / "in", scheme="W8A16G32", format="llm_compressor")
    wish: dict[str, Any] = {"format": "llm_compressor", "scheme": "NVFP4A16", "requantize": True}
    roundel.convert(tmp_path / "in", tmp_path / "out", workers=2, **wish)
    found, checkpoint = floats(tmp_path / "out"), open_checkpoint(tmp_path / "in")
    for name, divisor in found.items():
        together = stacked_with(name) or (name,)
        highest = max(float(checkpoint.decode(other).abs().max()) for other in together)
        assert divisor == pytest.approx(448 * 6 / highest, rel=1e-6), name
        assert {found[other] for other in together} == {divisor}
    checkpoint.close()
    roundel.quantize(tmp_path / "in", tmp_path / "quantized", **NVFP4)
    assert floats(tmp_path / "quantized") == found


@pytest.mark.parametrize("old", ["W8A16G32", "FP8_STATIC"])
def test_scales_of_inputs_are_not_made_up(old: str, tmp_path: Path) -> None:
    measured: dict[str, Any] = {"dataset": [list(range(3, 19))], "nsamples": 1, "seqlen": 16}
    given = {} if old == "W8A16G32" else measured
    source = build("llama", tmp_path / "model")
    roundel.quantize(source, tmp_path / "in", scheme=old, format="llm_compressor", **given)
    with pytest.raises(PlanError, match=r"and 13 more are .*, which says nothing of inputs as NVFP4 stores them"):
        roundel.convert(tmp_path / "in", tmp_path / "out", format="llm_compressor", scheme="NVFP4", requantize=True)


def test_what_moves_is_rounded_where_another_is(tmp_path: Path) -> None:
    """Powers of two go over as e4m3 under a factor of 1, as far as e4m3 reaches; where one matrix leaves it, all that
    share its float are rounded."""
    source = build("llama", tmp_path / "model")
    plant(source, f"{ATTENTION}.k_proj.weight", 7, 1e5)
    roundel.quantize(source, tmp_path / "in", scheme="MXFP4A16", format="llm_compressor")
    wish: dict[str, Any] = {"format": "llm_compressor", "scheme": "NVFP4A16", "requantize": True}
    report = roundel.convert(tmp_path / "in", tmp_path / "out", **wish)
    found = floats(tmp_path / "out")
    largest_key = 6 * 2.0**14
    (divisor,) = {found[f"{ATTENTION}.{name}_proj"] for name in "qkv"}
    assert divisor == pytest.approx(448 * 6 / largest_key, rel=1e-6)
    assert found[f"{ATTENTION}.o_proj"] == 1.0
    notes = {row.name: row.note or "" for row in report.rows}
    assert "k_proj, with which it shares a scale, cannot move" in notes[f"{ATTENTION}.q_proj"]


def test_a_bad_matrix_does_not_spoil_those_beside_it(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "model")
    roundel.quantize(source, tmp_path / "kept", **NVFP4, ignore_layers=[f"{MLP}.gate_proj"])
    plant(source, f"{MLP}.gate_proj.weight", 5, float("nan"))
    roundel.quantize(source, tmp_path / "out", **NVFP4)
    assert floats(tmp_path / "out") == floats(tmp_path / "kept")


def test_the_same_bytes_whatever_happens(tmp_path: Path, victims: Victims) -> None:
    source = build("llama", tmp_path / "model", shards=3)
    roundel.quantize(source, tmp_path / "one" / "out", workers=1, **NVFP4)
    roundel.quantize(source, tmp_path / "three" / "out", workers=3, **NVFP4)
    expected = hashes(tmp_path / "one" / "out")
    assert hashes(tmp_path / "three" / "out") == expected
    for number in (20, 45):
        out = tmp_path / str(number) / "out"
        assert victims.killed_at(number, source, out, **NVFP4)
        roundel.quantize(source, out, **NVFP4)
        assert hashes(out) == expected
