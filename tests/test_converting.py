"""Conversions: every format and scheme to every other, exactly or refused; whole checkpoints; what users are told."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import roundel
from commands import command
from formats.test_formats import SCHEMES, WRITTEN, bytes_of, cells, rounded, settled
from models.pico import build, build_fp8, build_mxfp4, build_nvfp4
from roundel.algorithms import Rtn
from roundel.checkpoint import open_checkpoint
from roundel.converting import convert_layer
from roundel.data.bundled import bundled_model
from roundel.errors import ConversionError, NumericsError, PlanError, RecipeError
from roundel.formats import FORMATS, Contents, Format, reader_of
from roundel.holding import exact_scheme, nearest_scheme
from roundel.regrid import is_certain
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer, Stored
from roundel.verification import verify

SHAPE = (64, 512)
UP = "model.layers.0.mlp.up_proj"
EXACT = (  # (stored as, scheme, to): what people do most; none of these may depend on luck
    *(("auto_round", "W4A16", to) for to in ("auto_gptq", "auto_awq", "llm_compressor", "mlx", "hqq", "gguf")),
    *(("auto_awq", "W4A16_ASYM", to) for to in ("auto_round", "gptq_v2", "llm_compressor", "mlx", "hqq")),
    *(("mlx", "W8A16G64", to) for to in ("auto_round", "auto_gptq", "llm_compressor", "auto_round:mlx", "gguf")),
    *(("llm_compressor", "W3A16", to) for to in ("auto_round", "auto_awq", "gptq_v2", "mlx")),
    *(("llm_compressor", "MXFP4", to) for to in ("auto_round", "mlx", "gguf")),
    *(("gguf", "GGUF:Q4_0", to) for to in ("auto_round", "auto_gptq", "auto_awq", "llm_compressor", "mlx", "hqq")),
    *(("gguf", "GGUF:Q8_0", to) for to in ("auto_round", "auto_gptq", "llm_compressor", "mlx", "hqq")),
    *(("gguf", f"GGUF:{kind}", "mlx") for kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K", "IQ4_NL", "MXFP4")),
    ("gguf", "GGUF:MXFP4", "llm_compressor"),
    ("llm_compressor", "FP8_BLOCK", "fp8"),
    ("fp8", "FP8_BLOCK", "llm_compressor"),
    ("auto_round", "NVFP4", "llm_compressor"),
    ("auto_round", "FP8_STATIC", "llm_compressor"),
    ("hqq", "W8A16_ASYM", "llm_compressor"),
)


def stored_layer(format: Format, layer: Layer, quantized: QuantizedTensor) -> tuple[Format, Layer, QuantizedTensor]:
    """(reader, layer as stored, matrix) of what a format wrote, found as a checkpoint finds it."""
    config = format.config(Contents(layers=[layer], kept=["lm_head"], default=layer.scheme))
    reader = reader_of({"quantization_config": config})
    assert reader is not None
    parts = format.pack(layer, quantized)
    specs = {s.name: TensorSpec(f"a.b.{s.name}", s.dtype, s.shape) for s in format.outputs(layer)}
    if format.name == "gguf":
        found_scheme = layer.scheme
    else:
        found = reader.find("a.b", reader.known("a.b", specs, lambda part: bytes_of(parts[part])))
        assert found is not None and found.shape == layer.shape
        found_scheme = found.scheme
    stored = replace(layer, scheme=found_scheme, stored=Stored(format=reader.name, scheme=found_scheme))
    return reader, stored, reader.unpack(stored, parts)


def matrix(name: str, scheme: str, shape: tuple[int, int] = SHAPE) -> tuple[Format, Layer, QuantizedTensor]:
    """What a format wrote of a random matrix on a scheme, read again."""
    found = settled(WRITTEN[name], SCHEMES[scheme], shape)
    assert found is not None
    format, layer = found
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.02
    weight[3, :64], weight[5] = weight[3, :64].abs(), 0.0  # a zero point of 0; blocks of nothing but zeros
    return stored_layer(format, layer, rounded(layer, weight))


def converted(reader: Format, layer: Layer, stored: QuantizedTensor, target: Format) -> Format | str:
    """The reader of the converted layer, after its numbers were compared; or why it is not converted."""
    weight = reader.decode(stored)
    scheme = exact_scheme(layer, target, None, None)
    if scheme is None:
        return "grids"
    moved = replace(layer, scheme=scheme)
    assert layer.stored.scheme is not None
    try:
        tensor = convert_layer(moved, stored, weight, target, None).tensor
    except ConversionError as error:
        assert reader.blurs(layer) or not is_certain(layer.stored.scheme.weight, scheme.weight), error
        return str(error)
    again, new, read = stored_layer(target.settle([moved]), moved, tensor)
    assert new.scheme.input in (None, layer.scheme.input) or "RCEIL" in layer.scheme.name
    assert torch.equal(again.decode(read), weight)
    return again


@pytest.mark.parametrize(("name", "scheme"), cells())
def test_every_format_to_every_other(name: str, scheme: str) -> None:
    if settled(WRITTEN[name], SCHEMES[scheme], SHAPE) is None:
        pytest.skip("not for this shape")  # groups of 96
    reader, layer, stored = matrix(name, scheme)
    results = {to: converted(reader, layer, stored, target) for to, target in WRITTEN.items()}
    assert not isinstance(results[name], str), results[name]  # at least to itself
    for to, target in WRITTEN.items():
        new = nearest_scheme(layer, target, Rtn())
        if isinstance(results[to], str) and new is not None:
            moved = replace(layer, scheme=new)
            tensor = convert_layer(moved, stored, reader.decode(stored), target, Rtn()).tensor
            noise = (target.decode(tensor) - reader.decode(stored)).square().mean()
            assert 0 <= noise < 0.4 * stored.decode().square().mean(), (to, new.name)


@pytest.mark.parametrize("shape", [(24, 224), (40, 96), (6, 288)])
@pytest.mark.parametrize("name", WRITTEN)
def test_odd_shapes(name: str, shape: tuple[int, int]) -> None:
    """Short last groups, words that are not full, rows that no byte divides: moved or refused, never otherwise."""
    moved = 0
    for scheme in ("W4A16", "W3A16G32", "W4A16G64_ASYM", "W8A16G-1", "MXFP4", "FP8_BLOCK", "NF4", "GGUF:Q5_1"):
        if scheme not in SCHEMES or settled(WRITTEN[name], SCHEMES[scheme], shape) is None:
            continue
        reader, layer, stored = matrix(name, scheme, shape)
        if layer.shape == shape and reader.grid_of(layer.scheme).weight.blocks(shape) == stored.grid.blocks(shape):
            results = [converted(reader, layer, stored, target) for target in WRITTEN.values()]
            moved += sum(not isinstance(result, str) for result in results)
    assert moved or name in ("bnb", "mlx", "auto_round:mlx", "gguf", "auto_awq", "hqq")


@pytest.mark.parametrize(("name", "scheme", "to"), EXACT)
def test_what_moves_whatever_the_numbers_are(name: str, scheme: str, to: str) -> None:
    found = converted(*matrix(name, scheme), FORMATS[to])
    assert not isinstance(found, str), found


def test_a_zero_point_of_0_is_named() -> None:
    reader, layer, stored = matrix("auto_awq", "W4A16_ASYM")
    reason = converted(reader, layer, stored, FORMATS["auto_gptq"])
    assert "a.b [64, 512] does not go into auto_gptq as it is: the zero point of row 5, group 0 is 0" in str(reason)


def test_checkpoints_through_all_formats_and_back(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    roundel.quantize(model, tmp_path / "0", scheme="W4A16G32", format="auto_round")
    names = ("auto_gptq", "auto_awq", "llm_compressor", "mlx", "hqq", "gptq_v2", "auto_round:mlx", "auto_round")
    first = open_checkpoint(tmp_path / "0")
    for number, name in enumerate(names):
        report = roundel.convert(tmp_path / f"{number}", tmp_path / f"{number + 1}", format=name)
        assert report.converted is not None and report.converted.changed == 0 and report.mean_sqnr == math.inf
        assert verify(tmp_path / f"{number + 1}", tmp_path / "0").passed
        last = open_checkpoint(tmp_path / f"{number + 1}")
        assert last.reader is not None and last.reader.name == name
        assert set(last.layers) == set(first.layers)
        for layer in first.layers.values():
            assert torch.equal(last.weights(last.layers[layer.name]), first.weights(layer))
        last.close()
    first.close()
    begun, ended = (load_file(tmp_path / n / "model.safetensors") for n in ("0", f"{len(names)}"))
    assert begun.keys() == ended.keys()
    assert all(torch.equal(begun[name], ended[name]) for name in begun)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "nvfp4", "modelopt", "gpt_oss"])
def test_foreign_checkpoints(kind: str, tmp_path: Path) -> None:
    source = {
        "fp8": lambda: build_fp8(tmp_path / "m"), "mxfp4": lambda: build_mxfp4(tmp_path / "m"),
        "nvfp4": lambda: build_nvfp4(tmp_path / "m"), "modelopt": lambda: build_nvfp4(tmp_path / "m", "modelopt"),
        "gpt_oss": lambda: build("gpt_oss", tmp_path / "m"),
    }[kind]()  # fmt: skip
    report = roundel.convert(source, tmp_path / "out", format="llm_compressor")
    assert report.converted is not None and report.converted.changed == 0 and report.converted.exact
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    for name, layer in before.layers.items():
        assert torch.equal(before.weights(layer), after.weights(after.layers[name])), name
    before.close()
    after.close()


def test_fake_takes_everything_and_says_what_the_dtype_costs(tmp_path: Path) -> None:
    source = build_nvfp4(tmp_path / "m", "modelopt")
    report = roundel.convert(source, tmp_path / "out", format="fake")
    assert report.converted is not None and 40 < report.converted.errors.sqnr < 80
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert after.reader is None
    assert torch.equal(after.weights(after.matrices[UP].layer()), before.weights(before.layers[UP]).bfloat16())
    before.close()
    after.close()


def test_fake_of_a_file_whose_embedding_is_rounded(tmp_path: Path) -> None:
    roundel.quantize(bundled_model(), tmp_path / "q", format="gguf:q8_0")
    report = roundel.convert(tmp_path / "q", tmp_path / "out", format="fake")
    assert [row.name for row in report.rows if row.kind == "decode" and row.sqnr is None] == ["model.embed_tokens"]
    assert verify(tmp_path / "out", tmp_path / "q").passed


def test_formats_are_named_that_hold_all_numbers(tmp_path: Path) -> None:
    """Not those that hold some: GPTQ's first version, where no zero point is 0."""
    roundel.quantize(build("llama", tmp_path / "model"), tmp_path / "m", scheme="W4A16G64_ASYM")
    with pytest.raises(
        PlanError, match="Convert to auto_round, gptq_v2, auto_awq, llm_compressor, mlx, auto_round:mlx or"
    ):
        roundel.convert(tmp_path / "m", tmp_path / "out", format="bnb")
    roundel.quantize(tmp_path / "model", tmp_path / "k", scheme="GGUF:Q4_1", format="mlx")
    with pytest.raises(PlanError, match="Convert to mlx, auto_round:mlx or gguf, or pass --requantize"):
        roundel.convert(tmp_path / "k", tmp_path / "out", format="bnb")


def test_what_was_no_layer_before_counts_when_it_is_rounded(tmp_path: Path) -> None:
    roundel.quantize(bundled_model(), tmp_path / "q", scheme="W2A16G32")
    report = roundel.convert(tmp_path / "q", tmp_path / "out", format="gguf:q4_k_m", requantize=True)
    told = report.converted
    assert told is not None and told.exact + told.changed == 30 == len(report.plan.layers)
    assert [row.note for row in report.rows if row.name == "lm_head"] == ["rounded, and was BF16"]
    before, after = open_checkpoint(tmp_path / "q"), open_checkpoint(tmp_path / "out")
    pairs = [(before.decode(name).double(), after.decode(name).double()) for name in before.matrices]
    before.close()
    after.close()
    energy, noise = (sum(float(found.square().sum()) for found in of) for of in (
        (old for old, _ in pairs), (old - new for old, new in pairs),
    ))  # fmt: skip
    assert told.errors.sqnr == pytest.approx(10 * math.log10(energy / noise), abs=0.01)


def test_refused_before_any_work(tmp_path: Path) -> None:
    source = build_fp8(tmp_path / "m", "channel")
    reason = r"\(and 13 more\) is FP8_DYNAMIC: auto_gptq stores weight-only integers"
    with pytest.raises(PlanError, match=reason) as caught:
        roundel.convert(source, tmp_path / "out", format="auto_gptq")
    assert "--requantize" in str(caught.value) and "llm_compressor" in str(caught.value)
    assert not (tmp_path / "out").exists()
    report = roundel.convert(source, tmp_path / "out", format="auto_gptq", requantize=True)
    assert report.converted is not None and report.converted.exact == 0 and report.converted.errors.sqnr > 30
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["conversion"] == report.converted.to_dict()
    assert all("rounded anew" in row["note"] for row in saved["rows"] if "sqnr" in row)
    assert verify(tmp_path / "out", source).passed


def test_what_the_numbers_tell_stops_the_run_or_falls_back(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {f"{UP}.weight": tensors[f"{UP}.weight"].abs()}, model / "model.safetensors")
    roundel.quantize(model, tmp_path / "m", scheme="W4A16G32_ASYM")  # all zero points of this layer are 0
    with pytest.raises(ConversionError, match=rf"{UP} .* does not go into auto_gptq .* --requantize"):
        roundel.convert(tmp_path / "m", tmp_path / "out", format="auto_gptq")
    report = roundel.convert(tmp_path / "m", tmp_path / "out", format="auto_gptq", requantize=True)
    told = report.converted
    assert told is not None and told.changed == 1 == sum(bool(row.note) for row in report.rounded)
    assert verify(tmp_path / "out", tmp_path / "m").passed


def test_a_scheme_that_is_asked_for(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    roundel.quantize(model, tmp_path / "m", scheme="W4A16G64")
    report = roundel.convert(tmp_path / "m", tmp_path / "wide", format="llm_compressor", scheme="W8A16G32_ASYM")
    assert report.converted is not None and report.converted.changed == 0
    assert any("take more bits for the same numbers" in note for note in report.plan.notes)
    with pytest.raises(PlanError, match="is W4A16G64: it does not fit W3A16G32: int3 has no code for every int4"):
        roundel.convert(tmp_path / "m", tmp_path / "narrow", format="llm_compressor", scheme="W3A16G32")
    with pytest.raises(PlanError, match=r"Leave --scheme out, or pass --requantize"):
        roundel.convert(tmp_path / "m", tmp_path / "narrow", format="llm_compressor", scheme="W3A16G32")
    roundel.convert(tmp_path / "m", tmp_path / "narrow", format="llm_compressor", scheme="W3A16G32", requantize=True)
    assert verify(tmp_path / "narrow", tmp_path / "m").passed


def test_embeddings_that_are_rounded_become_floats_where_readers_take_no_others(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    config = {"model.embed_tokens": "W8A16G32"}
    roundel.quantize(model, tmp_path / "m", scheme="W4A16G32", format="mlx", layer_config=config)
    roundel.convert(tmp_path / "m", tmp_path / "mlx", format="auto_round:mlx")
    with pytest.raises(
        ConversionError, match=r"model\.embed_tokens .* it becomes BF16, which does not hold its numbers"
    ):
        roundel.convert(tmp_path / "m", tmp_path / "out", format="auto_round")
    report = roundel.convert(tmp_path / "m", tmp_path / "out", format="auto_round", requantize=True)
    changed = [row for row in report.rows if row.noise]
    assert [row.name for row in changed] == ["model.embed_tokens"] and "became BF16" in str(changed[0].note)
    assert report.converted is not None and report.converted.errors.sqnr > 40
    assert verify(tmp_path / "out", tmp_path / "m").passed


def test_groups_by_activation(tmp_path: Path) -> None:
    source = Path(__file__).parent / "data" / "golden" / "gptq"
    with pytest.raises(PlanError, match="which group each column belongs to"):
        roundel.convert(source, tmp_path / "awq", format="auto_awq")
    assert roundel.convert(source, tmp_path / "v2", format="gptq_v2").converted is not None
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "v2")
    for name, layer in before.layers.items():
        assert torch.equal(before.decode(name), after.weights(after.layers[layer.name]))
    before.close()
    after.close()


def test_the_same_bytes_after_a_kill_and_with_any_number_of_workers(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", shards=3)
    roundel.quantize(model, tmp_path / "m", scheme="W4A16G32_ASYM", shard_size="200KB")
    roundel.convert(tmp_path / "m", tmp_path / "one", format="mlx", workers=1)

    def stop(work: object, row: object) -> None:
        seen.append(work)
        if len(seen) == 9:
            raise MemoryError

    seen: list[object] = []
    with pytest.raises(MemoryError):
        roundel.convert(tmp_path / "m", tmp_path / "two", format="mlx", workers=1, progress=stop)
    report = roundel.convert(tmp_path / "m", tmp_path / "two", format="mlx", workers=3)
    assert report.resumed
    files = sorted(path.name for path in (tmp_path / "one").iterdir() if path.suffix in (".safetensors", ".json"))
    assert "recipe.json" in files and files == sorted(
        path.name for path in (tmp_path / "two").iterdir() if path.suffix in (".safetensors", ".json")
    )
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert roundel.convert(tmp_path / "m", tmp_path / "two", format="mlx").already_complete


def test_the_command(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    found = command("convert", model, tmp_path / "out", "--format", "mlx")
    assert (
        found.code == 3
        and "model is not quantized, so there is nothing to convert. Use roundel quantize" in found.error
    )
    roundel.quantize(model, tmp_path / "m", scheme="W4A16G32")
    found = command("convert", tmp_path / "m", "--format", "mlx", "--dry-run")
    assert found.code == 0 and "14 layers are stored on grids within the asked ones" in found.output
    found = command("convert", tmp_path / "m", tmp_path / "out", "--format", "mlx")
    assert found.code == 0 and "14 layers hold the same numbers as before, bit for bit" in found.output
    assert "roundel convert m OUT --format mlx" in (tmp_path / "out" / "README.md").read_text()
    assert "<p class=sub>Converted by roundel" in (tmp_path / "out" / "report.html").read_text()
    found = command("convert", tmp_path / "m", tmp_path / "two", "--format", "bnb")
    assert found.code == 3 and "bnb stores NF4 and FP4" in found.error and not (tmp_path / "two").exists()
    found = command("convert", tmp_path / "m", tmp_path / "two", "--format", "bnb", "--requantize")
    assert found.code == 0 and "14 layers changed: signal to noise" in found.output
    plan = json.loads(command("convert", tmp_path / "m", "--format", "auto_awq", "--dry-run", "--json").output)
    assert plan["recipe"] == {"scheme": "STORED", "algorithm": "rtn", "formats": ["auto_awq"], "conversion": "exact"}


@pytest.mark.parametrize(
    ("wishes", "why"),
    [
        ({"conversion": "maybe"}, "it is exact or requantize"),
        ({"scheme": "STORED"}, "that of a conversion"),
        ({"conversion": "exact", "formats": ("mlx", "auto_gptq")}, "writes one format"),
        ({"conversion": "exact", "algorithm": "gptq"}, "algorithm has no meaning"),
        ({"conversion": "exact", "ignore_layers": ("up",)}, "ignore_layers has no meaning"),
    ],
)
def test_wishes_that_make_no_sense(wishes: dict[str, object], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        roundel.Recipe.from_dict(wishes)


def test_weights_that_are_not_finite_are_no_reason_to_keep_a_layer(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    roundel.quantize(model, tmp_path / "m", scheme="W4A16G32")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors[f"{UP}.scales"][1, 5] = float("nan")
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    for requantize in (False, True):
        with pytest.raises(NumericsError, match=rf"{UP} .*weight \[5, 32\] is nan"):
            roundel.convert(tmp_path / "m", tmp_path / "out", format="mlx", requantize=requantize, overwrite=True)
