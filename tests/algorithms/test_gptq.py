"""GPTQ on a unit: stages, shared Hessians, fallbacks, and what other tools got wrong."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from algorithms.blocks import BLOCK, ToyActivations, forward, make_unit
from algorithms.fed import Fed
from roundel.algorithms import Rounded, Rtn
from roundel.algorithms.gptq import Gptq
from roundel.algorithms.hessians import Collector, stages
from roundel.errors import RecipeError
from roundel.formats import FORMATS, Contents, reader_of
from roundel.ops.encode import encode
from roundel.ops.fit import fit_symmetric
from roundel.scheme import Scheme
from roundel.tensor import QuantizedTensor, TensorSpec
from roundel.unit import Layer, Stored, Unit

SCHEMES = ("W2A16G32", "W3A16G32_ASYM", "W4A16G-1", "W4A16G48", "W8A16G32", "MXFP4", "MXFP8")
OPTIONS = (
    {},
    {"act_order": True},
    {"act_order": True, "static_groups": True},
    {"static_groups": True},
    {"group_order": False},
    {"true_sequential": False},
    {"trials": 0},
)


def unit_of(fed: Mapping[str, list[Tensor]], schemes: str | Mapping[str, str] = "W4A16G32", out: int = 24) -> Unit:
    """Linears of a weight each, named and fed as given."""
    generator = torch.Generator().manual_seed(7)
    layers, weights = [], {}
    for name, batches in fed.items():
        scheme = Scheme.parse(schemes if isinstance(schemes, str) else schemes[name])
        shape = (out, batches[0].shape[1])
        layers.append(Layer(name=name, shape=shape, dtype="BF16", scheme=scheme, stored=Stored()))
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.05
    return Unit(name="unit", layers=tuple(layers), weights=weights, activations=Fed(fed))  # type: ignore[arg-type]


def inputs(width: int = 64, tokens: int = 256, seed: int = 0) -> Tensor:
    """[tokens, width]: correlated channels of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    return torch.randn(tokens, width, generator=generator) @ mixing * torch.exp(torch.randn(width, generator=generator))


def output_error(unit: Unit, name: str, tensor: QuantizedTensor, x: Tensor) -> float:
    weight = unit.weights[f"{name}.weight"]
    return float((x @ (weight - tensor.decode()).T).double().square().sum() / (x @ weight.T).double().square().sum())


def weights_of(unit: Unit, rounded: Mapping[str, Rounded]) -> dict[str, Tensor]:
    return {layer.tensor: rounded[layer.name].tensor.decode() for layer in unit.layers}


def block_error(unit: Unit, rounded: Mapping[str, Rounded]) -> float:
    """How far the rounded block's output on its own inputs is from the float block's."""
    entering = unit.entering()
    x = entering.inputs(range(entering.samples))
    return float((entering.forward(x, weights_of(unit, rounded)) - entering.forward(x, {})).square().mean())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_layer_ends_below_plain_rounding(scheme: str, options: dict[str, bool]) -> None:
    algorithm = Gptq(**options)  # type: ignore[arg-type]
    unit = make_unit(scheme, samples=6)
    if algorithm.refuse(unit.layers[0]):
        assert scheme.startswith("MX")
        assert algorithm.permutes
        return
    rounded = algorithm.quantize(unit)
    assert set(rounded) == {layer.name for layer in unit.layers}
    for layer in unit.layers:
        result = rounded[layer.name]
        assert result.tensor.grid == layer.scheme.weight
        assert result.tensor.shape == layer.shape
        assert result.tokens == 6 * 32
        assert result.error is not None
        assert result.baseline is not None
        assert result.error <= result.baseline
        if algorithm.trials:
            assert result.fallback is None
            assert result.error < 0.9 * result.baseline
        else:  # fitted to their range, scales of two bits may serve feedback worse than no feedback at all
            assert result.fallback in (None, "plain rounding errs less: rtn")


def test_the_error_is_the_relative_output_error() -> None:
    x = inputs()
    unit = unit_of({"a": [x[:100], x[100:]]})
    result = Gptq(damping=1e-5, shrinkage=False).quantize(unit)["a"]
    assert result.error == pytest.approx(output_error(unit, "a", result.tensor, x), rel=5e-3)
    plain = encode(unit.weights["a.weight"], unit.layers[0].scheme.weight)
    assert result.baseline == pytest.approx(output_error(unit, "a", plain, x), rel=5e-3)


def test_it_is_deterministic_and_changes_nothing() -> None:
    unit = make_unit("W3A16G32")
    before = {name: weight.clone() for name, weight in unit.weights.items()}
    first, second = Gptq().quantize(unit), Gptq().quantize(unit)
    for name, result in first.items():
        assert torch.equal(result.tensor.codes, second[name].tensor.codes)
        assert torch.equal(result.tensor.scale, second[name].tensor.scale)  # type: ignore[arg-type]
    assert all(torch.equal(before[name], weight) for name, weight in unit.weights.items())


def test_later_layers_see_what_earlier_ones_rounded_hand_on() -> None:
    """Every stage is run on the unit's own inputs: INC ran later stages on the block's output."""
    unit = make_unit("W2A16G32")
    seen: list[tuple[set[str], set[str]]] = []

    class Watched(ToyActivations):
        def observe(self, see, weights, *, modules=None, stream="quantized", every_expert=False):  # type: ignore[no-untyped-def]
            seen.append(({m.rsplit(".", 1)[1] for m in modules}, {w.split(".")[-2] for w in weights}))
            super().observe(see, weights, modules=modules, stream=stream, every_expert=every_expert)

    toy = unit.activations
    assert isinstance(toy, ToyActivations)
    Gptq().quantize(replace(unit, activations=Watched(shape=toy.shape, own=toy.own, streams=toy.streams)))
    qkv, o, gate_up, down = {"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}
    assert seen == [
        (qkv | o | gate_up | down, set()),
        (o, qkv),
        (gate_up, qkv | o),
        (down, qkv | o | gate_up),
    ]


def test_true_sequential_lowers_the_blocks_error() -> None:
    """INC's grew: 2.15e-4 with it, 1.32e-4 without."""
    in_turn = at_once = 0.0
    for seed in range(4):
        unit = make_unit("W2A16G32", seed=seed, samples=16)
        error = block_error(unit, Gptq().quantize(unit))
        assert error < 0.5 * block_error(unit, Rtn().quantize(unit))
        in_turn += error
        at_once += block_error(unit, Gptq(true_sequential=False).quantize(unit))
    assert in_turn < at_once


def test_layers_handed_the_same_tensor_share_one_hessian() -> None:
    x, y = inputs(), inputs(seed=1)
    collector = Collector(1 << 30)
    for part in (slice(0, 100), slice(100, 256)):
        for name in ("q", "k", "v"):
            collector.see(name, x[part])
        collector.see("o", y[part])
    found = {frozenset(h.layers): h for h in collector.finish()}
    assert set(found) == {frozenset("qkv"), frozenset("o")}
    torch.testing.assert_close(found[frozenset("qkv")].total, x.T @ x / 256)
    torch.testing.assert_close(found[frozenset("o")].total, y.T @ y / 256)
    assert [h.tokens for h in found.values()] == [256, 256]


def test_a_hessian_that_was_handed_over_is_gone_with_its_last_user() -> None:
    collector = Collector(1 << 30)
    for name in ("q", "o"):
        collector.see(name, inputs())
    totals = [weakref.ref(hessian.total) for hessian in collector.finish()]
    assert len(totals) == 2
    assert all(total() is None for total in totals)


def test_sharing_ends_where_inputs_differ() -> None:
    x, y, z = inputs(tokens=64), inputs(tokens=64, seed=1), inputs(tokens=64, seed=2)
    collector = Collector(1 << 30)
    for name, each in (("a", x), ("b", x), ("a", y), ("b", z), ("c", z), ("a", z), ("b", x), ("b", x)):
        collector.see(name, each)
    expected = {"a": (x, y, z), "b": (x, z, x, x), "c": (z,)}
    found = {name: h for h in collector.finish() for name in h.layers}
    for name, parts in expected.items():
        whole = torch.cat(parts)
        assert found[name].tokens == len(whole)
        torch.testing.assert_close(found[name].total, whole.T @ whole / len(whole))


def test_memory_for_hessians_is_bounded() -> None:
    """More experts than there is room for are done in several passes, with the same result."""
    fed = {f"m.experts.{i}.{part}": [inputs(seed=10 * i)] for i in range(6) for part in ("up", "down")}
    unit = unit_of(fed, out=16)  # weights of 16 x 64 leave room for 3 Hessians of 64 x 64
    rounded = Gptq().quantize(unit)
    activations = unit.activations
    assert isinstance(activations, Fed)
    sizes = [len(asked) for asked, _ in activations.passes]
    assert sizes[0] == 12 and len(sizes) > 2
    again = Gptq(true_sequential=False).quantize(unit)
    for name, result in rounded.items():
        assert torch.equal(result.tensor.codes, again[name].tensor.codes), name


def test_stages_follow_calls_and_gather_experts() -> None:
    calls = {"b.0.q": 1, "b.0.k": 1, "b.0.o": 2}
    for expert in range(3):
        calls |= {f"b.0.experts.{expert}.w{n}": 10 * expert + (10 if n != 2 else 11) for n in (1, 3, 2)}
    assert stages(calls) == [
        ["b.0.q", "b.0.k"],
        ["b.0.o"],
        [f"b.0.experts.{e}.w{n}" for e in range(3) for n in (1, 3)],
        [f"b.0.experts.{e}.w2" for e in range(3)],
    ]
    assert stages({"l.fc1": 1, "l.fc2": 2}) == [["l.fc1"], ["l.fc2"]]


def test_experts_with_few_tokens_are_rounded_plainly_and_say_so() -> None:
    fed = {"m.experts.0.up": [inputs(tokens=300)], "m.experts.1.up": [inputs(tokens=20)]}
    unit = unit_of(fed)
    never = replace(unit.layers[0], name="m.experts.2.up")
    unit = replace(unit, layers=(*unit.layers, never), weights={**unit.weights, never.tensor: torch.randn(24, 64)})
    rounded = Gptq(min_tokens=64).quantize(unit)
    assert rounded["m.experts.0.up"].fallback is None
    assert rounded["m.experts.1.up"].fallback == "20 tokens reached it, fewer than 64: rtn"
    assert rounded["m.experts.2.up"].fallback == "no token reached it: rtn"
    assert [rounded[layer.name].tokens for layer in unit.layers] == [300, 20, 0]
    for layer in unit.layers[1:]:
        plain = encode(unit.weight(layer), layer.scheme.weight)
        assert torch.equal(rounded[layer.name].tensor.codes, plain.codes)
        assert rounded[layer.name].tensor.decode().abs().max() > 0  # never all zeros


def test_moe_block_has_every_layer() -> None:
    unit = make_unit("W3A16G32", experts=4, top_k=1, shared=True, samples=8)
    rounded = Gptq().quantize(unit)
    assert set(rounded) == {layer.name for layer in unit.layers}
    for layer in unit.layers:
        result = rounded[layer.name]
        assert result.tokens is not None
        assert (result.fallback is not None) == (result.tokens < 16), layer.name
        assert result.tensor.decode().abs().max() > 0
    total = sum(rounded[f"{BLOCK}.mlp.experts.{e}.up_proj"].tokens or 0 for e in range(4))
    assert total == 8 * 32


@pytest.mark.parametrize(
    ("value", "why"),
    [(0.0, "nothing but zeros entered it"), (float("nan"), "no damping makes its Hessian positive definite")],
)
def test_inputs_of_no_use_end_in_plain_rounding(value: float, why: str) -> None:
    """INC's lm_head, whose inputs it never saw, became zeros."""
    unit = unit_of({"lm_head": [torch.full((100, 64), value)]})
    result = Gptq().quantize(unit)["lm_head"]
    assert result.fallback == f"{why}: rtn"
    plain = encode(unit.weights["lm_head.weight"], unit.layers[0].scheme.weight)
    assert torch.equal(result.tensor.decode(), plain.decode())
    assert result.tensor.decode().abs().max() > 0


def test_damping_that_was_not_enough_is_told() -> None:
    unit = unit_of({"lm_head": [torch.ones(100, 64)]})  # one direction of 64
    result = Gptq(damping=0.0, shrinkage=False).quantize(unit)["lm_head"]
    assert result.fallback is None and result.note is not None
    assert result.note.startswith("damping raised from 0 to 0.01")
    assert Gptq(damping=0.02).quantize(unit)["lm_head"].note is None


def test_an_output_head_is_one_more_layer() -> None:
    unit = unit_of({"lm_head": [inputs()]})
    unit = replace(unit, layers=(replace(unit.layers[0], role="head"),))
    result = Gptq().quantize(unit)["lm_head"]
    assert result.fallback is None
    assert result.error < 0.7 * result.baseline  # type: ignore[operator]


def test_few_tokens_make_a_singular_hessian_that_is_survived() -> None:
    x = inputs(tokens=3).repeat(30, 1)
    unit = unit_of({"a": [x]})
    result = Gptq(damping=0.0).quantize(unit)["a"]
    assert result.fallback is None
    assert output_error(unit, "a", result.tensor, x) < 0.1 * output_error(
        unit, "a", encode(unit.weights["a.weight"], unit.layers[0].scheme.weight), x
    )


def test_columns_without_inputs_keep_their_weights() -> None:
    x = inputs()
    x[:, [3, 40]] = 0
    unit = unit_of({"a": [x]})
    decoded = Gptq().quantize(unit)["a"].tensor.decode()
    weight = unit.weights["a.weight"]
    for column in (3, 40):
        assert (decoded[:, column] - weight[:, column]).abs().max() < 0.5 * weight.abs().max()
        assert torch.corrcoef(torch.stack((decoded[:, column], weight[:, column])))[0, 1] > 0.9


def test_a_zero_matrix_stays_zero() -> None:
    unit = unit_of({"a": [inputs()]})
    unit = replace(unit, weights={"a.weight": torch.zeros(24, 64)})
    assert (Gptq().quantize(unit)["a"].tensor.decode() == 0).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("width", [70, 100, 20])
def test_inputs_need_not_fill_groups(width: int, options: dict[str, bool]) -> None:
    unit = unit_of({"a": [inputs(width)]}, "W4A16G32_ASYM", out=9)
    result = Gptq(**options).quantize(unit)["a"]  # type: ignore[arg-type]
    assert result.fallback is None
    assert result.tensor.shape == (9, width)
    assert result.error < result.baseline  # type: ignore[operator]


def test_layers_keep_their_own_schemes() -> None:
    """INC rounded a layer by another one's settings; here two that share their inputs differ in bits and groups."""
    x = inputs(128)
    schemes = {"q": "W4A16G32", "k": "W2A16_ASYM", "v": "W4A16G64"}
    unit = unit_of({"q": [x], "k": [x], "v": [x]}, schemes)
    rounded = Gptq().quantize(unit)
    for name, scheme in schemes.items():
        alone = Gptq().quantize(
            Unit(
                name="unit",
                layers=tuple(layer for layer in unit.layers if layer.name == name),
                weights=unit.weights,
                activations=Fed({name: [x]}),  # type: ignore[arg-type]
            )
        )
        assert rounded[name].tensor.grid == Scheme.parse(scheme).weight
        assert torch.equal(rounded[name].tensor.codes, alone[name].tensor.codes)


@pytest.mark.parametrize("scheme", ["W4A16G32", "W3A16G32_ASYM"])
def test_act_order_survives_its_file(scheme: str) -> None:
    """INC lost g_idx between saving and loading: the written parts and the config are enough for the same matrix."""
    x = inputs(128)
    format = FORMATS["auto_gptq"]
    unit = unit_of({"model.layers.0.a": [x]}, out=32)
    layer = replace(unit.layers[0], scheme=format.grid_of(Scheme.parse(scheme)), permuted=True)
    algorithm = Gptq(act_order=True, damping=1e-5, shrinkage=False)
    assert algorithm.permutes
    result = algorithm.quantize(replace(unit, layers=(layer,)))[layer.name]
    assert result.tensor.group_index is not None
    parts = format.pack(layer, result.tensor)
    config = format.config(Contents(layers=[layer], kept=[], default=layer.scheme))
    assert config["desc_act"] is True
    reader = reader_of({"quantization_config": config})
    assert reader is not None
    found = reader.find(layer.name, {s.name: TensorSpec("", s.dtype, s.shape) for s in format.outputs(layer)})
    assert found is not None
    back = reader.unpack(replace(layer, stored=Stored(format=reader.name, scheme=found.scheme)), parts)
    assert torch.equal(back.decode(), result.tensor.decode())
    assert result.error == pytest.approx(output_error(unit, "model.layers.0.a", back, x), rel=0.05)


def test_static_groups_need_no_group_index_and_keep_every_scale() -> None:
    """INC kept the last group's scale only."""
    x = inputs(128)
    unit = unit_of({"a": [x]})
    for act_order in (False, True):
        algorithm = Gptq(act_order=act_order, static_groups=True, trials=0)
        assert not algorithm.permutes
        tensor = algorithm.quantize(unit)["a"].tensor
        assert tensor.group_index is None
        expected = fit_symmetric(unit.weights["a.weight"].view(24, 4, 32), 4)
        assert torch.equal(tensor.scale, expected)  # type: ignore[arg-type]


def test_scales_follow_the_errors_fed_to_their_groups() -> None:
    """llm-compressor's scales are those of the weights as they were; ours are better where errors are large."""
    x = inputs(128)
    unit = unit_of({"a": [x]}, "W2A16G32")
    moving, fixed = (Gptq(static_groups=static).quantize(unit)["a"] for static in (False, True))
    assert not torch.equal(moving.tensor.scale, fixed.tensor.scale)  # type: ignore[arg-type]
    assert moving.error < fixed.error  # type: ignore[operator]


def test_the_search_beats_the_range() -> None:
    x = inputs(128)
    for scheme, gain in (("W2A16G32", 0.8), ("W3A16G64_ASYM", 0.85), ("W4A16", 0.9)):
        unit = unit_of({"a": [x]}, scheme)
        searched, ranged = (Gptq(trials=trials).quantize(unit)["a"] for trials in (6, 0))
        assert searched.error < gain * ranged.error  # type: ignore[operator]


def test_large_inputs_first_beats_the_matrix_order() -> None:
    gain = 0.0
    for seed in range(4):
        unit = unit_of({"a": [inputs(128, seed=seed)]}, "W3A16G32")
        ordered, natural = (Gptq(group_order=order).quantize(unit)["a"] for order in (True, False))
        gain += ordered.error / natural.error  # type: ignore[operator]
    assert gain / 4 < 0.97


def test_wishes_that_make_no_sense_are_refused() -> None:
    for options in ({"damping": -0.1}, {"damping": 2.0}, {"trials": -1}, {"block_size": 0}, {"damping_step": 0.0}):
        with pytest.raises(RecipeError, match=next(iter(options))):
            Gptq(**options)  # type: ignore[arg-type]
    layer = unit_of({"a": [inputs()]}).layers[0]
    assert Gptq().refuse(layer) is None
    grid = replace(layer.scheme.weight, block=(128, 128))
    assert "gptq" in str(Gptq().refuse(replace(layer, scheme=replace(layer.scheme, weight=grid))))


def test_forward_of_the_toy_block_is_what_is_measured() -> None:
    """The fixture itself: a block's stated output is its forward on the stream that is observed."""
    unit = make_unit("W4A16G32")
    toy = unit.activations
    assert isinstance(toy, ToyActivations)
    x = toy.inputs([0, 1])
    assert torch.equal(toy.forward(x, {}), forward(toy.shape, BLOCK, x, unit.weights))


def test_few_tokens_do_not_mislead() -> None:
    """Rounded for some dozens of tokens, a layer must serve those it has not seen: damping follows their number."""
    x, unseen = inputs(128, tokens=4032).split([32, 4000])
    unit = unit_of({"a": [x]}, "W4A16G32")
    plain = encode(unit.weights["a.weight"], unit.layers[0].scheme.weight)
    fitting, fixed = (Gptq(shrinkage=on).quantize(unit)["a"].tensor for on in (True, False))
    ours, usual, base = (output_error(unit, "a", tensor, unseen) for tensor in (fitting, fixed, plain))
    assert ours < 0.85 * usual
    assert ours < 0.9 * base
