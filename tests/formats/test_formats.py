"""Every format over every grid it does not refuse: exact outputs, `unpack` inverse of `pack`, fusion equal to both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from roundel.algorithms import Rtn
from roundel.errors import GridError, PlanError, RecipeError, SourceError
from roundel.formats import FORMATS, Contents, Format, format_named, reader_of
from roundel.fusion import fuses, round_and_pack
from roundel.ops.bits import unpack_stream
from roundel.scheme import PRESETS, Scheme
from roundel.support import nominal_layer, shown_schemes, support_rows
from roundel.tensor import QuantizedTensor, TensorSpec, plain, torch_dtype
from roundel.unit import Layer, Piece, Stored, Unit

SCHEMES = {**shown_schemes(), "W4A16G-1": Scheme.parse("W4A16G-1"), "W3A16G96_ASYM": Scheme.parse("W3A16G96_ASYM")}
SHAPES = ((64, 128), (24, 224), (40, 96), (200, 144), (6, 512))
UNFUSED = ("mlx", "auto_round:mlx", "bnb", "hqq")
WRITTEN = {name: f for name, f in FORMATS.items() if f.writes and name != "fake"}  # which keeps no codes


def layer_of(scheme: Scheme, shape: tuple[int, int], dtype: str = "BF16") -> Layer:
    return Layer(
        name="a.b", shape=shape, dtype=dtype, scheme=scheme, stored=Stored(parts={"weight": Piece(tensor="a.b.weight")})
    )


def cells() -> list[tuple[str, str]]:
    return [
        (f, s)
        for f, form in WRITTEN.items()
        for s, scheme in SCHEMES.items()
        if form.refuse(nominal_layer(form.grid_of(scheme))) is None
    ]


def settled(format: Format, scheme: Scheme, shape: tuple[int, int], dtype: str = "BF16") -> tuple[Format, Layer] | None:
    layer = layer_of(format.grid_of(scheme), shape, dtype)
    return None if format.refuse(layer) else (format.settle([layer]), layer)


def rounded(layer: Layer, weight: torch.Tensor) -> QuantizedTensor:
    """A layer rounded plainly, with a scale of its inputs where its scheme stores one."""
    found = Rtn().quantize(Unit(name=layer.name, layers=(layer,), weights={layer.tensor: weight}))[layer.name].tensor
    return replace(found, input_scale=torch.tensor([0.0625])) if layer.scheme.stores_input_scale else found


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: torch.Tensor | QuantizedTensor | None, other: torch.Tensor | QuantizedTensor | None) -> bool:
    """Bit for bit."""
    if isinstance(one, QuantizedTensor) and isinstance(other, QuantizedTensor):
        parts = ("codes", "scale", "zero", "offset", "group_index", "input_scale")
        return one.grid == other.grid and all(same(getattr(one, part), getattr(other, part)) for part in parts)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    return one is other is None


@pytest.mark.parametrize(("format_name", "scheme_name"), cells())
def test_pack_and_back(format_name: str, scheme_name: str) -> None:
    tried = 0
    for shape in SHAPES:
        found = settled(WRITTEN[format_name], SCHEMES[scheme_name], shape)
        if found is None:
            continue
        format, layer = found
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
        quantized = rounded(layer, weight)
        parts = format.pack(layer, quantized)
        outputs = {s.name: s for s in format.outputs(layer)}
        assert list(outputs) == list(parts)
        for name, tensor in parts.items():
            assert tuple(tensor.shape) == outputs[name].shape
            assert tensor.dtype == torch_dtype(outputs[name].dtype)
        assert same(format.unpack(layer, parts), quantized)
        tried += 1
    assert tried


@pytest.mark.parametrize(("format_name", "scheme_name"), cells())
def test_found_again_from_its_own_tensors(format_name: str, scheme_name: str) -> None:
    """What a format writes, and its config, are enough to find the layer and its grid again."""
    for shape in SHAPES:
        found = settled(WRITTEN[format_name], SCHEMES[scheme_name], shape)
        if found is None:
            continue
        format, layer = found
        config = format.config(Contents(layers=[layer], kept=["lm_head"], default=layer.scheme))
        reader = reader_of({"quantization_config": config})
        assert reader is not None
        assert reader.name == format.name
        specs = {s.name: TensorSpec(f"a.b.{s.name}", s.dtype, s.shape) for s in format.outputs(layer)}
        parts = format.pack(layer, rounded(layer, torch.zeros(shape)))
        again = reader.find("a.b", reader.known("a.b", specs, lambda part, parts=parts: bytes_of(parts[part])))
        assert again is not None
        assert set(again.parts) == set(specs) or format_name == "hqq"  # some of its parts only HQQ needs
        assert again.scheme.bits == layer.scheme.bits
        assert again.scheme.weight.symmetric == layer.scheme.weight.symmetric
        if format_name == "llm_compressor" and layer.scheme.input is not None and "RCEIL" not in scheme_name:
            assert again.scheme == layer.scheme
        exact = shape[1] * layer.scheme.bits % 32 == 0
        assert again.shape == shape or not exact
        if exact:
            assert again.scheme.weight.blocks(shape) == layer.scheme.weight.blocks(shape)


@pytest.mark.parametrize(("format_name", "scheme_name"), cells())
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_fusion_is_the_composition(
    format_name: str, scheme_name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("roundel.fusion.SLAB_BYTES", 1)  # several slabs, a short one last
    monkeypatch.setattr("roundel.fusion.ROW_STEP", 16)
    for shape in SHAPES:
        found = settled(WRITTEN[format_name], SCHEMES[scheme_name], shape, dtype)
        if found is None:
            continue
        format, layer = found
        if not fuses(layer, [format], Rtn()):
            apart = format.words(layer) is None and not layer.scheme.weight.is_mx
            assert apart or shape[1] % 32 or layer.scheme.weight.exponent != "floor" or format_name in UNFUSED
            continue
        weight = (torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.02).to(torch_dtype(dtype))
        raw = weight.view(torch.uint8).numpy()
        parts, errors = round_and_pack(
            layer,
            format,
            lambda start, into, raw=raw: np.copyto(into, raw.reshape(-1)[start * raw.shape[1] :][: len(into)]),
        )
        quantized = (
            Rtn().quantize(Unit(name=layer.name, layers=(layer,), weights={layer.tensor: weight}))[layer.name].tensor
        )
        for name, tensor in format.pack(layer, quantized).items():
            assert parts[name].tobytes() == tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes(), name
        noise = (weight.float() - quantized.decode()).double().square().sum().item()
        assert errors.noise == pytest.approx(noise, rel=1e-4)


def test_gptq_never_stores_a_zero_it_cannot_hold() -> None:
    format, layer = settled(WRITTEN["auto_gptq"], SCHEMES["W4A16_ASYM"], (8, 128))  # type: ignore[misc]
    weight = torch.rand(8, 128)
    quantized = (
        Rtn().quantize(Unit(name=layer.name, layers=(layer,), weights={layer.tensor: weight}))[layer.name].tensor
    )
    parts = format.pack(layer, quantized)
    assert (parts["qzeros"] == 0).all()  # zero point 1, stored minus one: no field wraps
    assert torch.equal(format.unpack(layer, parts).decode(), quantized.decode())


def test_autoround_settles_by_what_all_layers_are() -> None:
    def packing(*schemes: str) -> str:
        layers = [replace(layer_of(Scheme.parse(s), (64, 128)), name=str(i)) for i, s in enumerate(schemes)]
        return FORMATS["auto_round"].settle(layers).packing  # type: ignore[attr-defined, no-any-return]

    assert packing("W4A16", "W8A16") == "auto_round:auto_gptq"
    assert packing("W4A16_ASYM") == "auto_round:auto_awq"
    assert packing("W4A16_ASYM", "W4A16") == "auto_round"
    assert packing("W2A16_ASYM") == "auto_round"
    assert packing("MXFP4", "MXFP8") == packing("NVFP4") == "auto_round:llm_compressor"
    assert packing("MXINT4") == "auto_round"
    assert packing("FP8_STATIC") == "auto_round:fp8_static"
    assert packing("FP8_BLOCK") == "auto_round:fp8"
    assert packing("FPW8A16") == ""  # auto-round names none
    with pytest.raises(SourceError, match="packing '' is not read"):
        reader_of({"quantization_config": {"quant_method": "auto-round", "packing_format": "", "bits": 4}})
    with pytest.raises(PlanError, match="not several"):
        packing("MXFP4", "W4A16")


@pytest.mark.parametrize("scheme_name", ["NVFP4", "FP8_STATIC", "FP8"])
def test_a_scale_of_inputs_is_stored_or_missed(scheme_name: str) -> None:
    format, layer = settled(WRITTEN["llm_compressor"], SCHEMES[scheme_name], (64, 128))  # type: ignore[misc]
    quantized = rounded(layer, torch.randn(64, 128))
    part = "input_global_scale" if scheme_name == "NVFP4" else "input_scale"
    assert float(format.pack(layer, quantized)[part]) == (16.0 if scheme_name == "NVFP4" else 0.0625)
    with pytest.raises(GridError, match="calibration"):
        format.pack(layer, replace(quantized, input_scale=None))


def test_a_divisor_comes_back_as_the_factor_it_was() -> None:
    format, layer = settled(WRITTEN["llm_compressor"], SCHEMES["NVFP4A16"], (8, 16))  # type: ignore[misc]
    for seed in range(500):  # one reciprocal in eight misses its inverse by the last bit
        quantized = rounded(layer, torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)))
        back = format.unpack(layer, format.pack(layer, quantized))
        assert torch.equal(plain(back.scale), plain(quantized.scale))


def test_fake_stores_what_the_codes_mean() -> None:
    for scheme in SCHEMES.values():
        width = 144 if scheme.weight.rule == "range" else 256
        layer = layer_of(scheme, (200, width))
        quantized = rounded(layer, torch.randn(200, width))
        parts = FORMATS["fake"].pack(layer, quantized)
        assert [s.name for s in FORMATS["fake"].outputs(layer)] == list(parts)
        assert torch.equal(parts["weight"], quantized.decode().bfloat16())


def test_awq_holds_one_scheme() -> None:
    layers = [replace(layer_of(Scheme.parse(s), (64, 128)), name=s) for s in ("W4A16", "W4A16G64")]
    with pytest.raises(PlanError, match="one scheme"):
        FORMATS["auto_awq"].settle(layers)


def test_matrix_is_asked_and_complete() -> None:
    rows = dict(support_rows())
    assert rows["W4A16"] == {
        "auto_round": None,
        "auto_gptq": None,
        "gptq_v2": None,
        "auto_awq": None,
        "llm_compressor": None,
        "mlx": None,
        "auto_round:mlx": None,
        "bnb": rows["W4A16"]["bnb"],
        "hqq": None,
        "fp8": rows["W4A16"]["fp8"],
        "gguf": rows["W4A16"]["gguf"],
        "fake": None,
    }
    assert "no layout" in str(rows["MXINT4"]["llm_compressor"])
    assert rows["FP8_STATIC"]["llm_compressor"] is None
    assert "4-bit only" in str(rows["W8A16"]["auto_awq"])


def test_unknown_format_is_named_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="auto_gptq"):
        format_named("auto_gtpq")
    with pytest.raises(RecipeError, match="only read"):
        format_named("modelopt")


def test_unread_quantization_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match="8-bit"):
        reader_of({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    with pytest.raises(SourceError, match="quanto"):
        reader_of({"quantization_config": {"quant_method": "quanto"}})
    with pytest.raises(SourceError, match="gemv"):
        reader_of({"quantization_config": {"quant_method": "awq", "version": "gemv"}})


def test_missing_companions_are_named() -> None:
    reader = reader_of({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}})
    assert reader is not None
    with pytest.raises(SourceError, match="scales"):
        reader.find("a.b", {"qweight": TensorSpec("", "I32", (16, 64)), "qzeros": TensorSpec("", "I32", (1, 8))})


def permuted_case(scheme_name: str = "W4A16G32") -> tuple[Format, Layer, QuantizedTensor]:
    """A matrix whose columns belong to groups in no order, as act-order makes them; the last group is short."""
    format, layer = settled(WRITTEN["auto_gptq"], Scheme.parse(scheme_name), (8, 112))  # type: ignore[misc]
    layer = replace(layer, permuted=True)
    generator = torch.Generator().manual_seed(3)
    index = (torch.arange(112) // 32)[torch.randperm(112, generator=generator)].to(torch.int32)
    weight = torch.randn(8, 112, generator=generator)
    found = Rtn().quantize(Unit(name=layer.name, layers=(layer,), weights={layer.tensor: weight}))[layer.name].tensor
    return format, layer, replace(found, group_index=index)


@pytest.mark.parametrize("scheme_name", ["W4A16G32", "W2A16G32_ASYM"])
def test_a_group_index_is_stored_and_read_again(scheme_name: str) -> None:
    format, layer, quantized = permuted_case(scheme_name)
    assert format.refuse(layer) is None
    parts = format.pack(layer, quantized)
    outputs = {s.name: s for s in format.outputs(layer)}
    assert {name: (tuple(t.shape), t.dtype) for name, t in parts.items()} == {
        name: (s.shape, torch_dtype(s.dtype)) for name, s in outputs.items()
    }
    back = format.unpack(layer, parts)
    assert back.group_index is not None
    assert torch.equal(back.decode(), quantized.decode())
    codes = unpack_stream(parts["qweight"].T.contiguous(), layer.scheme.bits, 112)
    zeros = unpack_stream(parts["qzeros"], layer.scheme.bits, 8) + 1  # GPTQ v1
    for column in range(112):  # as readers of GPTQ files compute: scales[g_idx[k], n] * (code - zero)
        group = int(parts["g_idx"][column])
        for row in range(8):
            level = int(codes[row, column]) - int(zeros[group, row])
            assert back.decode()[row, column] == parts["scales"][group, row].float() * level
    config = format.config(Contents(layers=[layer], kept=[], default=layer.scheme))
    assert config["desc_act"] is True
    assert (
        format.config(Contents(layers=[replace(layer, permuted=False)], kept=[], default=layer.scheme))["desc_act"]
        is False
    )


def test_who_cannot_store_a_group_index_says_so() -> None:
    for name, format in WRITTEN.items():
        for scheme in (SCHEMES["W4A16G32"], SCHEMES["W4A16_ASYM"], PRESETS["MXFP4"]):
            layer = layer_of(format.grid_of(scheme), (64, 128))
            if format.refuse(layer) is None and name not in ("auto_gptq", "gptq_v2"):
                assert "group" in str(format.refuse(replace(layer, permuted=True)))


def test_a_group_index_is_not_dropped() -> None:
    format, layer, quantized = permuted_case()
    with pytest.raises(GridError, match="group index"):
        format.pack(replace(layer, permuted=False), quantized)
    with pytest.raises(GridError, match="group index"):
        FORMATS["auto_round"].settle([layer]).pack(layer, quantized)


def test_a_damaged_group_index_is_told() -> None:
    format, layer, quantized = permuted_case()
    parts = format.pack(layer, quantized)
    parts["g_idx"][5] = 4
    with pytest.raises(SourceError, match="g_idx names groups"):
        format.unpack(layer, parts)


def test_mx_writes_the_reference_bytes() -> None:
    """Golden: 0.5, 1, -6 and 0.3 in a block whose largest is 6."""
    weight = torch.zeros(1, 32)
    weight[0, :5] = torch.tensor([0.5, 1.0, -6.0, 0.3, -0.1])
    layer = layer_of(PRESETS["MXFP4"], (1, 32))
    parts = FORMATS["llm_compressor"].pack(
        layer, Rtn().quantize(Unit(name="a.b", layers=(layer,), weights={"a.b.weight": weight}))["a.b"].tensor
    )
    assert parts["weight_scale"].tolist() == [[127]]
    assert parts["weight_packed"][0, :3].tolist() == [0x21, 0x1F, 0x08]
