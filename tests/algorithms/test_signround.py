"""SignRound: its steps are those of a slow obvious loop, and no unit ends worse than plain rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from algorithms.blocks import BLOCK, ToyActivations, make_unit, plain_weights, rebound
from roundel.algorithms.algorithm import Rounded
from roundel.algorithms.signround import SignRound
from roundel.errors import RecipeError
from roundel.ops.encode import encode
from roundel.scheme import PRESETS, Scheme
from roundel.tensor import plain
from roundel.unit import Layer, Stored, Stream, Unit

SCHEMES = (
    *(f"W{bits}A16G32{asym}" for bits in (2, 3, 4, 5, 6, 7, 8) for asym in ("", "_ASYM")),
    "W3A16G-1",
    "W4A16G-1_ASYM",
    "W4A16G48",
    "MXFP4",
    "MXFP8",
)


def activations(unit: Unit) -> ToyActivations:
    assert isinstance(unit.activations, ToyActivations)
    return unit.activations


def decoded(unit: Unit, found: Mapping[str, Rounded]) -> dict[str, Tensor]:
    return {layer.tensor: found[layer.name].tensor.decode() for layer in unit.layers}


def error(unit: Unit, weights: Mapping[str, Tensor], stream: Stream = "quantized") -> float:
    """The mean squared error of the block's output over all samples."""
    entering, every = unit.entering(), range(unit.entering().samples)
    with torch.no_grad():
        found = entering.forward(entering.inputs(every, stream), weights)
    return float((found - entering.inputs(every, "target")).square().mean())


def plain_error(unit: Unit, stream: Stream = "quantized") -> float:
    return error(unit, {la.tensor: encode(unit.weight(la), la.scheme.weight).decode() for la in unit.layers}, stream)


def assert_same(left: Mapping[str, Rounded], right: Mapping[str, Rounded]) -> None:
    for name in left:
        a, b = left[name].tensor, right[name].tensor
        assert torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8)), name
        assert torch.equal(a.decode(), b.decode()), name


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.round(x)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def slow_signround(unit: Unit, how: SignRound, steps: int) -> dict[str, Tensor]:
    """SignRound as the paper writes it, by autograd and a loop over layers: the codes after `steps` of symmetric grids
    and plain starts."""
    entering = unit.entering()
    shifts, factors, bases = {}, {}, {}
    for layer in unit.layers:
        weight = unit.weight(layer)
        shifts[layer.name] = torch.zeros_like(weight, requires_grad=True)
        bases[layer.name] = encode(weight, layer.scheme.weight).scale.float()  # type: ignore[union-attr]
        factors[layer.name] = torch.ones_like(bases[layer.name], requires_grad=True)

    def codes_and_weight(layer: Layer) -> tuple[Tensor, Tensor]:
        raw = bases[layer.name] * factors[layer.name]
        scale = raw + (raw.half().float() - raw).detach()
        scale = scale.repeat_interleave(layer.scheme.weight.block_of(layer.shape)[1], dim=1)[:, : layer.shape[1]]
        codes = _Round.apply(unit.weight(layer) / scale + shifts[layer.name])  # type: ignore[no-untyped-call]
        half = 2 ** (layer.scheme.bits - 1)
        codes = codes.clamp(-half, half - 1)
        return codes, codes * scale

    generator, left = torch.Generator().manual_seed(how.seed), []
    size = how.batch_size * how.gradient_accumulation
    for step in range(steps):
        if len(left) < size:
            left = torch.randperm(entering.samples, generator=generator).tolist()
        samples, left = left[:size], left[size:]
        weights = {layer.tensor: codes_and_weight(layer)[1] for layer in unit.layers}
        found = entering.forward(entering.inputs(samples, "quantized"), weights)
        (found - entering.inputs(samples, "target")).square().mean().backward()  # type: ignore[no-untyped-call]
        rate = (how.lr or 1 / how.iters) * (1 - step / how.iters)
        with torch.no_grad():
            for layer in unit.layers:
                for each in (shifts[layer.name], factors[layer.name]):
                    assert each.grad is not None
                    each -= rate * each.grad.sign()
                    each.grad = None
    return {layer.name: codes_and_weight(layer)[0].detach() for layer in unit.layers}


@pytest.mark.parametrize("scheme", ["W2A16G32", "W3A16G-1", "W4A16G48"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_are_those_of_the_paper(scheme: str, accumulation: int) -> None:
    unit = make_unit(scheme)
    how = SignRound(
        iters=5, lr=0.03, optimizer="sign", schedule="linear", start="rtn", keep_best=False,
        batch_size=4 // accumulation, gradient_accumulation=accumulation,
    )  # fmt: skip
    expected, found = slow_signround(unit, how, 5), how.quantize(unit)
    changed = 0
    for layer in unit.layers:
        codes, plainly = found[layer.name].tensor.codes, encode(unit.weight(layer), layer.scheme.weight).codes
        changed += int((codes != plainly).sum())
        # Weights next to a boundary may fall to either side by the last bit of a sum.
        assert (codes != expected[layer.name]).float().mean() < 2e-3, layer.name
    assert changed > 300


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_grid_is_learned(scheme: str) -> None:
    unit = make_unit(scheme)
    found = SignRound(iters=20, batch_size=4).quantize(unit)
    for layer in unit.layers:
        result = found[layer.name]
        assert result.tensor.grid == layer.scheme.weight
        assert result.tokens == 8 * 32
        assert result.error is not None and result.error < (1.0 if layer.scheme.bits == 8 else 0.8) * result.baseline  # type: ignore[operator]
    # With eight samples all are measured: what is reported is the error of what is handed on.
    assert error(unit, decoded(unit, found)) == pytest.approx(found[unit.layers[0].name].error, rel=1e-4)
    assert plain_error(unit) == pytest.approx(found[unit.layers[0].name].baseline, rel=1e-4)


def test_zero_points_below_the_lowest_are_not_chosen() -> None:
    parsed = Scheme.parse("W3A16G32_ASYM")
    unit = make_unit(replace(parsed, weight=replace(parsed.weight, lowest_zero=1)))
    positive = {n: w.abs() if n.endswith("up_proj.weight") else w for n, w in unit.weights.items()}
    found = SignRound(iters=10, batch_size=4).quantize(rebound(unit, positive))
    assert all(int(each.tensor.zero.min()) >= 1 for each in found.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("optimizer", ["sign", "adam"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("start", ["rtn", "search"])
def test_learning_helps_however_it_is_done(optimizer: str, schedule: str, start: str) -> None:
    unit = make_unit("W2A16G32")
    how = SignRound(iters=30, optimizer=optimizer, schedule=schedule, start=start, batch_size=4)
    assert error(unit, decoded(unit, how.quantize(unit))) < 0.6 * plain_error(unit)


def test_ranges_may_stay_as_they_are() -> None:
    unit = make_unit("W3A16G32_ASYM")
    found = SignRound(iters=10, batch_size=4, start="rtn", tune_range=False).quantize(unit)
    for layer in unit.layers:
        plainly = encode(unit.weight(layer), layer.scheme.weight)
        assert torch.equal(found[layer.name].tensor.scale, plainly.scale)  # type: ignore[arg-type]
    assert error(unit, decoded(unit, found)) < plain_error(unit)


def test_the_same_seed_gives_the_same_codes() -> None:
    unit, how = make_unit("W2A16G32"), SignRound(iters=8, batch_size=2)
    torch.manual_seed(0)
    first = how.quantize(unit)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert_same(first, how.quantize(unit))
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())  # nothing was drawn from the shared generator
    other = replace(how, seed=43).quantize(unit)
    assert any(not torch.equal(first[n].tensor.codes, other[n].tensor.codes) for n in first)


def test_the_reference_gives_the_same_as_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    unit, how = make_unit("W3A16G32_ASYM"), SignRound(iters=3, batch_size=4, start="rtn", tune_range=False)
    first = how.quantize(unit)
    monkeypatch.setenv("ROUNDEL_REFERENCE", "1")
    assert_same(first, how.quantize(unit))


def test_a_bad_course_is_not_taken() -> None:
    """Steps so large that learning ruins the unit: plain rounding is kept, and said so."""
    unit = make_unit("W8A16G32")
    how = SignRound(iters=8, lr=1.0, batch_size=4, start="rtn")
    found = how.quantize(unit)
    for layer in unit.layers:
        result = found[layer.name]
        assert result.error == result.baseline
        assert result.fallback is not None and "plain rounding" in result.fallback
    ruined = replace(how, keep_best=False).quantize(unit)
    assert all(r.error is not None and r.baseline is not None and r.error > 2 * r.baseline for r in ruined.values())
    assert error(unit, decoded(unit, ruined)) == pytest.approx(ruined[unit.layers[0].name].error, rel=1e-4)


def test_nothing_learned_is_the_start() -> None:
    unit = make_unit("W4A16G32")
    found = SignRound(iters=0, start="rtn").quantize(unit)
    for layer in unit.layers:
        plainly = encode(unit.weight(layer), layer.scheme.weight)
        assert torch.equal(found[layer.name].tensor.codes, plainly.codes)


def test_inputs_are_the_stream_that_is_asked_for() -> None:
    """With inputs far from the float ones, learning on the quantized stream makes up for them; else it does not."""
    unit = make_unit("W3A16G32", noise=0.3)
    how = SignRound(iters=40, batch_size=8)
    answered, unaware = (decoded(unit, replace(how, quantized_inputs=q).quantize(unit)) for q in (True, False))
    assert error(unit, answered) < error(unit, unaware)
    assert error(unit, unaware, "float") < error(unit, answered, "float")


def test_low_memory_takes_the_same_steps() -> None:
    unit, how = make_unit("W3A16G32"), SignRound(iters=3, batch_size=4, start="rtn", optimizer="sign", lr=0.05)
    seen: list[int] = []
    entering = activations(unit)

    class Watched:
        def __getattr__(self, name: str) -> object:
            return getattr(entering, name)

        def forward(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
            seen.append(len(x))
            return entering.forward(x, weights)

    watched = replace(unit, activations=Watched())  # type: ignore[arg-type]
    small = replace(how, low_memory=True).quantize(watched)
    assert set(seen) == {1}
    large = how.quantize(unit)
    for layer in unit.layers:
        different = small[layer.name].tensor.codes != large[layer.name].tensor.codes
        assert different.float().mean() < 5e-3


def test_experts_learn_and_those_without_tokens_stay_at_the_start() -> None:
    unit = make_unit("W3A16G32", experts=4, top_k=1, shared=True)
    router = f"{BLOCK}.mlp.gate.weight"
    closed = unit.weights[router].clone()
    closed[2] = -100 * closed[[0, 1, 3]].sum(0)  # such a direction that it loses on almost every token
    closed[3] = closed[2]
    unit = rebound(unit, {**unit.weights, router: closed})
    found = SignRound(iters=20, batch_size=4, keep_best=False).quantize(unit)
    tokens = {layer.name: found[layer.name].tokens for layer in unit.layers if layer.role == "expert"}
    assert 0 in tokens.values(), tokens
    for layer in unit.layers:
        result = found[layer.name]
        if result.tokens == 0:
            assert result.fallback is not None and "no token" in result.fallback
            assert bool((result.tensor.codes != 0).any())
        else:
            assert result.fallback is None
    assert error(unit, decoded(unit, found)) < 0.8 * plain_error(unit)


def test_a_layer_that_saw_few_tokens_stays_at_the_start_and_says_so() -> None:
    unit = make_unit("W3A16G32", experts=4, top_k=1, shared=True)
    how = SignRound(iters=10, batch_size=4, keep_best=False)
    usual, start = how.quantize(unit), replace(how, iters=0).quantize(unit)
    tokens = sorted({found.tokens or 0 for name, found in usual.items() if ".experts." in name})
    assert tokens[0] > 0
    few = replace(how, min_tokens=tokens[0] + 1).quantize(unit)
    for name, found in few.items():
        stays = found.tokens == tokens[0]
        assert torch.equal(found.tensor.decode(), start[name].tensor.decode()) == stays, name
        reached = f"{tokens[0]} tokens reached it, fewer than {tokens[0] + 1}: it is rounded as learning would"
        assert (found.fallback or "").startswith(reached if stays else ""), name
        assert (found.fallback is None) != stays
    with pytest.raises(RecipeError, match="min_tokens=0"):
        SignRound(min_tokens=0)


@pytest.mark.parametrize("optimizer", ["sign", "adam"])
@pytest.mark.parametrize("scheme", ["W2A16G32_ASYM", "W4A16G32", "MXFP4"])
@pytest.mark.parametrize("reference", ["0", "1"])
def test_blocks_of_zeros_stay_zeros(
    scheme: str, optimizer: str, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least scale is not 0, and a gradient would move their codes."""
    monkeypatch.setenv("ROUNDEL_REFERENCE", reference)
    unit = make_unit(scheme)
    layer = unit.layers[0]
    holed = unit.weights[layer.tensor].clone()
    holed[3, :32] = 0
    holed[5] = 0
    unit = rebound(unit, {**unit.weights, layer.tensor: holed})
    how = SignRound(iters=8, batch_size=4, keep_best=False, optimizer=optimizer)
    found = how.quantize(unit)[layer.name].tensor.decode()
    assert not found[3, :32].any() and not found[5].any()
    assert found[3, 32:].any()


def test_a_head_is_a_unit_like_any_other() -> None:
    head = make_head("W4A16G32")
    found = SignRound(iters=40, batch_size=4).quantize(head)
    result = found["lm_head"]
    assert result.error is not None and result.baseline is not None and result.error < 0.8 * result.baseline
    assert error(head, decoded(head, found)) == pytest.approx(result.error, rel=1e-4)


def make_head(scheme: str) -> Unit:
    """The output head behind its norm: `forward` gives logits."""
    block = make_unit(scheme)
    streams = activations(block).streams
    generator = torch.Generator().manual_seed(5)
    weights = {
        "model.norm.weight": torch.rand(64, generator=generator) + 0.5,
        "lm_head.weight": torch.randn(160, 64, generator=generator) / 8,
    }

    class Head(ToyActivations):
        def forward(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
            whole = {**self.own, **plain_weights(weights)}
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * whole["model.norm.weight"]
            return x @ whole["lm_head.weight"].T

        def observe(self, see, weights, *, modules=None, stream="quantized", every_expert=False) -> None:  # type: ignore[no-untyped-def]
            x = self.inputs(range(self.samples), stream)
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.own["model.norm.weight"]
            see("lm_head", x.flatten(0, 1))

    layer = Layer(
        name="lm_head", shape=(160, 64), dtype="BF16", scheme=Scheme.parse(scheme), stored=Stored(), role="head"
    )
    entering = Head(shape=activations(block).shape, own=weights, streams=streams)
    return Unit(name="lm_head", layers=(layer,), weights=weights, activations=entering)


def test_progress_is_told() -> None:
    unit = make_unit("W4A16G32")
    SignRound(iters=4, batch_size=4).quantize(unit)
    done = [each for each, _ in activations(unit).ticks]
    assert done == [0.25, 0.5, 0.75, 1.0]
    assert all(text.startswith("loss ") for _, text in activations(unit).ticks)


def test_unit_and_weights_are_left_alone() -> None:
    unit = make_unit("W2A16G32")
    before = {name: weight.clone() for name, weight in unit.weights.items()}
    SignRound(iters=4, batch_size=4).quantize(unit)
    assert all(torch.equal(before[name], weight) and not weight.requires_grad for name, weight in unit.weights.items())


def test_rates_are_the_papers_for_few_bits_and_many_steps() -> None:
    two, four = make_unit("W2A16G32").layers[0], make_unit("W4A16G32").layers[0]
    assert SignRound(iters=200, lr=0.01).rates(two) == (0.01, 0.01)
    assert SignRound(iters=200, lr=0.01, minmax_lr=0.02).rates(two) == (0.01, 0.02)
    assert SignRound(iters=200, lr=0.01, tune_range=False).rates(two) == (0.01, 0.0)
    paper = SignRound(iters=1000, optimizer="sign")
    assert (paper.rates(four)[0], paper.rates(two)[0]) == (0.001, 0.002)


@pytest.mark.parametrize(
    "fields",
    [
        {"iters": -1},
        {"lr": 0.0},
        {"minmax_lr": 2.0},
        {"batch_size": 0},
        {"gradient_accumulation": 0},
        {"optimizer": "sgd"},
        {"schedule": "step"},
        {"start": "gptq"},
        {"blocks": 0},
        {"seed": -1},
    ],
)
def test_values_that_make_no_sense(fields: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=next(iter(fields))):
        SignRound(**fields)  # type: ignore[arg-type]


def test_levels_of_super_blocks_stay() -> None:
    layer = replace(make_unit("W4A16G32").layers[0], scheme=Scheme.parse("GGUF:Q4_0"))
    assert SignRound(iters=50).rates(layer) == (0.02, 0.02)
    levelled = replace(layer, scheme=Scheme.parse("GGUF:Q4_K"))
    assert SignRound(iters=50).rates(levelled) == (0.02, 0.0)


def test_grids_out_of_reach_are_refused() -> None:
    layer = make_unit("W4A16G32").layers[0]
    tile = replace(layer.scheme, weight=replace(layer.scheme.weight, block=(128, 128)))
    assert SignRound().refuse(layer) is None
    assert "signround" in str(SignRound().refuse(replace(layer, scheme=tile)))


@pytest.mark.parametrize(
    ("scheme", "same"), [("W2A16G32_ASYM", "rtn"), ("W2A16G32", "search"), ("W3A16G32_ASYM", "search")]
)
def test_where_learning_starts(scheme: str, same: str) -> None:
    unit = make_unit(scheme)
    auto, named = (SignRound(iters=0, start=start, keep_best=False).quantize(unit) for start in ("auto", same))
    assert all(torch.equal(auto[n].tensor.decode(), named[n].tensor.decode()) for n in auto)


@pytest.mark.parametrize("scheme", ["W4A16G32", "W2A16G32_ASYM", "W3A16G-1"])
@pytest.mark.parametrize("iters", [0, 8])
def test_scales_may_be_numbers_that_bfloat16_has_too(scheme: str, iters: int) -> None:
    unit = make_unit(scheme)
    narrow = SignRound(iters=iters, scale_dtype="bfloat16", keep_best=iters > 0).quantize(unit)
    for found in narrow.values():
        scale = plain(found.tensor.scale)
        assert torch.equal(scale, scale.bfloat16().float())
    free = SignRound(iters=iters, keep_best=iters > 0).quantize(unit)
    assert not all(torch.equal(s := plain(f.tensor.scale), s.bfloat16().float()) for f in free.values())
    assert error(unit, decoded(unit, narrow)) < 1.2 * error(unit, decoded(unit, free))


def test_ggml_has_its_own_scales() -> None:
    layer = make_unit("W4A16G32").layers[0]
    blocks = replace(layer, shape=(8, 256), scheme=PRESETS["GGUF:Q4_0"])
    assert SignRound().refuse(blocks) is None
    assert "scale_dtype=bfloat16" in str(SignRound(scale_dtype="bfloat16").refuse(blocks))
