"""Every backend multiplies by what the codes decode to, over widths, grids, shapes, batches and dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inference.cases import (
    CELLS,
    FLOATS,
    SUMS,
    Cell,
    drawn,
    floats,
    gradient_share_of_allowed,
    layer_of,
    permuted,
    reference,
    rounding,
    share_of_allowed,
)
from roundel.errors import BackendError, RecipeError
from roundel.inference.backends import BACKENDS, better_but_absent, choose
from roundel.inference.backends.torch import Decoding, Torch
from roundel.inference.gradient import Kernel
from roundel.inference.planes import join_planes, split_planes
from roundel.scheme import PRESETS, Scheme, integer_scheme
from roundel.tensor import QuantizedTensor
from roundel.unit import Layer


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_products_are_those_of_decoded_weights(backend: str, cell: Cell, dtype: torch.dtype) -> None:
    layer = layer_of(cell.scheme, cell.shape)
    assert BACKENDS[backend].refuse(layer, "cpu") is None
    assert share_of_allowed(backend, layer, drawn(cell.scheme, cell.shape), dtype) <= 1


@pytest.mark.parametrize("scale", ["BF16", "F32"])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_scales_of_other_dtypes(backend: str, scale: str) -> None:
    scheme = integer_scheme(4, 32, False)
    scheme = replace(scheme, weight=replace(scheme.weight, scale=scale))
    quantized, x = drawn(scheme, (24, 96)), torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    expected, size = reference(quantized.decode(), x, None)
    found = BACKENDS[backend].make(layer_of(scheme, (24, 96)), quantized)(x)
    assert bool(((found.double() - expected).abs() <= SUMS * size + rounding(quantized, x)).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("backend", "name"),
    [("torch", "MXFP4"), ("torch", "MXFP8"), ("torch", "NVFP4"), ("numba", "MXFP4"), ("numba", "NVFP4")],
)
def test_products_of_floats_are_those_of_decoded_weights(backend: str, name: str, dtype: torch.dtype) -> None:
    for _, layer, quantized in floats(name):
        assert BACKENDS[backend].refuse(layer, "cpu") is None
        assert share_of_allowed(backend, layer, quantized, dtype) <= 1


@pytest.mark.parametrize("backend", ["numba", "ark", "triton", "marlin", "exllamav2"])
def test_what_is_added_to_codes_is_not_left_out(backend: str) -> None:
    device, symmetric = "cpu" if backend in ("numba", "ark") else "cuda", backend == "marlin"
    scheme = integer_scheme(4, 32, symmetric)
    assert BACKENDS[backend].refuse(layer_of(scheme, (64, 96)), device) is None
    for grid in (replace(scheme.weight, offset="F16"), replace(scheme.weight, zero="float")):  # MLX's, and HQQ's
        assert BACKENDS[backend].refuse(layer_of(replace(scheme, weight=grid), (64, 96)), device) is not None


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_columns_of_a_group_may_lie_apart(backend: str) -> None:
    assert share_of_allowed(backend, *permuted(), torch.float32) <= 1


@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.bits in (3, 4)], ids=lambda cell: cell.name)
@pytest.mark.parametrize("backend", ["torch", "numba", "by columns"])
def test_gradients_reach_inputs(backend: str, cell: Cell, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients_are_right(backend, layer_of(cell.scheme, cell.shape), drawn(cell.scheme, cell.shape), batch, monkeypatch)


@pytest.mark.parametrize("backend", ["torch", "numba", "by columns"])
def test_gradients_of_columns_apart_and_of_floats(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients_are_right(backend, *permuted(), 3, monkeypatch)
    for _, layer, quantized in floats("MXFP4", "NVFP4"):
        gradients_are_right(backend, layer, quantized, 3, monkeypatch)


def gradients_are_right(
    backend: str, layer: Layer, quantized: QuantizedTensor, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "by columns": as backends do that cannot decode."""
    if backend == "by columns":
        monkeypatch.setattr(Decoding, "back", Kernel.back)
        backend = "torch"
    for dtype in FLOATS:
        assert gradient_share_of_allowed(backend, layer, quantized, dtype, batch) <= 1


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 64, 101])
def test_planes_are_read_as_they_were_written(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    planes = split_planes(codes, bits)
    assert torch.equal(join_planes(planes, bits, count), codes)
    assert sum(plane.shape[1] for plane in planes) <= count * bits / 8 + len(planes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_weights_stay_packed(backend: str, bits: int) -> None:
    scheme, shape = integer_scheme(bits, 128), (256, 1024)
    module = BACKENDS[backend].make(layer_of(scheme, shape), drawn(scheme, shape))
    held = sum(buffer.nbytes for buffer in module.buffers())
    assert held <= scheme.weight.bits_per_weight(shape) / 8 * shape[0] * shape[1] * 1.01


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_another_dtype_changes_no_number(backend: str) -> None:
    scheme, shape = integer_scheme(4, 32, False), (24, 96)
    quantized = drawn(scheme, shape)
    module = BACKENDS[backend].make(layer_of(scheme, shape), quantized)
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x), module.half().bfloat16()(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(value: float) -> None:
    scheme, shape = integer_scheme(4, 32), (24, 96)
    module = BACKENDS["numba"].make(layer_of(scheme, shape), drawn(scheme, shape))
    x = torch.ones(2, 96)
    x[0, 40] = value
    found = module(x)
    assert not found[0].isfinite().any() and found[1].isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e30, 3e38])
def test_inputs_of_any_size(size: float) -> None:
    scheme, shape = integer_scheme(8, 32), (24, 96)
    quantized, x = drawn(scheme, shape), torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    x[1, 32:64] = 0
    x *= size
    found = BACKENDS["numba"].make(layer_of(scheme, shape), quantized)(x / 1000).double()
    expected, length = reference(quantized.decode(), x / 1000, None)
    allowed = SUMS * length + rounding(quantized, x / 1000) + 1e-39  # inputs among the smallest numbers may be lost
    assert bool(((found - expected).abs() <= allowed).all())


def here(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if the packages of these backends were installed, and no others."""
    for name, backend in BACKENDS.items():
        if backend.priority and name != "numba":
            needs = None if name in names else f"pip install {name}"
            monkeypatch.setattr(type(backend), "needs", property(lambda self, needs=needs: needs))


CHOSEN = [  # device, scheme, shape, packages -> the backend, and the better one that is missing
    ("cpu", "W4A16", (64, 256), (), "numba", None),
    ("cpu", "W7A16", (64, 256), ("ark",), "numba", None),
    ("cpu", "W4A16G40", (64, 240), ("ark",), "ark", None),
    ("cpu", "W4A16G40", (64, 240), (), "torch", "ark"),
    ("cpu", "MXFP4", (64, 256), ("ark",), "numba", None),
    ("cpu", "MXFP8", (64, 256), ("ark",), "torch", None),
    ("cpu", "NF4", (64, 256), ("ark",), "torch", None),
    ("cuda", "W4A16", (64, 256), (), "torch", "marlin"),
    ("cuda", "W4A16", (64, 256), ("triton",), "triton", "marlin"),
    ("cuda", "W4A16", (64, 256), ("triton", "exllamav2", "marlin"), "marlin", None),
    ("cuda:1", "W4A16_ASYM", (64, 256), ("triton", "exllamav2", "marlin"), "triton", None),
    ("cuda", "W4A16_ASYM", (64, 256), ("exllamav2", "marlin"), "exllamav2", "triton"),
    ("cuda", "W4A16_ASYM", (60, 256), ("exllamav2", "marlin"), "torch", "triton"),
    ("cuda", "W8A16G64", (64, 256), ("exllamav2", "marlin"), "marlin", None),
    ("cuda", "W8A16G48", (64, 240), ("triton", "marlin"), "triton", None),
    ("cuda", "W3A16", (64, 256), ("triton", "marlin"), "triton", None),
    ("cuda", "MXFP4", (64, 256), ("triton", "marlin"), "triton", None),
    ("cuda", "NVFP4", (64, 256), ("triton", "marlin"), "torch", None),
    ("xpu", "W4A16", (64, 256), ("triton", "marlin", "ark"), "triton", None),
]


@pytest.mark.parametrize(("device", "scheme", "shape", "packages", "name", "better"), CHOSEN)
def test_the_best_backend_is_chosen(
    device: str,
    scheme: str,
    shape: tuple[int, int],
    packages: tuple[str, ...],
    name: str,
    better: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here(monkeypatch, *packages)
    layer = layer_of(Scheme.parse(scheme), shape)
    chosen = choose(layer, device)
    assert chosen.name == name
    absent = better_but_absent(layer, device, chosen)
    assert (absent.name if absent else None) == better


def test_a_refusal_names_the_wanted_backend_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "marlin")
    layer, odd = layer_of(integer_scheme(5), (64, 256)), layer_of(integer_scheme(4, 40), (60, 240))
    for wanted, device, asked, reason in (
        ("numba", "cuda:0", layer, "it runs on cpu, not on cuda"),
        ("numba", "cpu", odd, "it takes groups of whole sixteens, not of 40"),
        (
            "numba",
            "cpu",
            layer_of(PRESETS["NF4"], (64, 256)),
            "it multiplies integers and E2M1 in groups, NF4 is neither",
        ),
        ("ark", "xpu", layer, "on xpu it multiplies in 8 bits"),
        ("ark", "cpu", layer, r"it is not installed \(pip install ark\)"),
        ("triton", "cpu", layer, "it runs on cuda and xpu, not on cpu"),
        ("triton", "cuda", layer_of(PRESETS["MXFP8"], (64, 256)), "it multiplies integers in groups, and MXFP4"),
        ("marlin", "cuda", layer, "it multiplies 4 or 8 bits, not 5"),
        ("marlin", "cuda", layer_of(integer_scheme(4, 128, False), (64, 256)), "it multiplies symmetric integers"),
        ("marlin", "cuda", layer_of(integer_scheme(4), (60, 256)), "it takes whole words, 8 outputs and 8 inputs each"),
        ("exllamav2", "cuda", odd, "it takes whole groups of 32, 64, 128 or of all columns, not 240 in 40"),
        ("exllamav2", "cuda", layer_of(integer_scheme(4), (80, 256)), "it takes outputs and inputs in multiples of 32"),
    ):
        with pytest.raises(BackendError, match=rf"block\.proj .* on {device}: {wanted}: .*{reason}.*Leave backend out"):
            choose(asked, device, wanted)
    with pytest.raises(RecipeError, match="Did you mean 'numba'"):
        choose(layer, "cpu", "nunba")


def test_a_refusal_of_the_one_that_is_wanted_says_which_others_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    with pytest.raises(BackendError) as caught:
        choose(layer_of(integer_scheme(4), (64, 256)), "cpu", "triton")
    told = str(caught.value)
    assert "triton: it runs on cuda and xpu, not on cpu. Of the others, numba, torch can; marlin: it runs on" in told
    assert all(f"; {name}: " in told for name in ("marlin", "exllamav2", "ark"))


def test_a_refusal_names_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    monkeypatch.setattr(Torch, "refuse", lambda self, layer, device: "it is out of order")
    with pytest.raises(BackendError) as caught:
        choose(layer_of(integer_scheme(4), (64, 256)), "cuda:0")
    told = str(caught.value)
    assert all(
        f"{name}: it is not installed (pip install {name})" in told for name in ("marlin", "triton", "exllamav2")
    )
    assert "numba: it runs on cpu" in told and "ark: it runs on cpu" in told and "torch: it is out of order" in told
