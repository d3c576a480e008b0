"""What a block shows of itself, against the hooks of a loaded model: inputs of matrices, caught calls, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibration.cases import Case, make_case, tokens_of
from roundel.calibration.late import stand_ins
from roundel.calibration.skeleton import Block
from roundel.ops.encode import encode
from roundel.scheme import Scheme
from roundel.tensor import QuantizedTensor

# dense with q and k apart and fused, Conv1D, learned positions, linear attention, and every way experts are stored
TYPES = (
    "llama",
    "phi3",
    "gpt2",
    "opt",
    "qwen3_next",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "llama4_text",
    "qwen3_5_moe",
)
ROUTED = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "qwen3_5_moe")


# where the loaded model has its blocks
LAYERS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "qwen3_5_moe": "model.language_model.layers"}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    made: dict[str, Case] = {}

    def case(model_type: str) -> Case:
        if model_type not in made:
            made[model_type] = make_case(model_type, tmp_path_factory.mktemp(model_type))
        return made[model_type]

    yield case
    for each in made.values():
        each.checkpoint.close()


@dataclass
class Seen:
    """What `see` was given: module -> inputs [tokens, in], one after the other."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def __call__(self, module: str, x: Tensor) -> None:
        assert x.ndim == 2 and not x.requires_grad
        self.inputs.setdefault(module, []).append(x.clone())

    def of(self, module: str) -> Tensor:
        return torch.cat(self.inputs[module])


def observed(case: Case, block: Block, x: Tensor, modules: tuple[str, ...], *, every_expert: bool = False) -> Seen:
    seen = Seen()
    block.observe(x, case.weights, seen, modules, every_expert)
    return seen


def entering(model: Any, path: str, tokens: Tensor) -> tuple[Any, ...]:
    """Positional arguments of a module of the loaded model, or its first named one."""
    caught: list[tuple[Any, ...]] = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda _, arguments, named: caught.append(arguments or tuple(named.values())), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=tokens)
    hook.remove()
    return caught[0]


@pytest.mark.parametrize("model_type", TYPES)
def test_matrices_are_shown_what_enters_them_in_the_loaded_model(model_type: str, cases: Callable[[str], Case]) -> None:
    case, tokens = cases(model_type), tokens_of(3)
    compared = 0
    for number, block in enumerate(case.skeleton.blocks):
        seen = observed(case, block, case.inputs(number, tokens), block.modules)
        for module in block.modules:
            if ".experts." in module:
                continue
            path = f"{LAYERS.get(model_type, 'model.layers')}.{number}.{block.path(module)}"
            expected = entering(case.model, path, tokens)[0]
            torch.testing.assert_close(seen.of(module), expected.reshape(-1, expected.shape[-1]), rtol=0, atol=1e-5)
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize("model_type", ROUTED)
def test_experts_are_shown_the_tokens_routed_to_them(model_type: str, cases: Callable[[str], Case]) -> None:
    """The loaded model's router says who goes where; what enters the last projection is computed anew."""
    case, tokens = cases(model_type), tokens_of(3)
    block, x = case.skeleton.blocks[1], case.inputs(1, tokens)
    experts = [m.name for m in case.checkpoint.matrices.values() if m.role == "expert" and m.name in block.modules]
    assert len(experts) == 12
    seen = observed(case, block, x, tuple(experts))
    routed = routing(case, model_type, tokens)
    assert sum(len(rows) for rows in routed) == tokens.numel() * case.model.config.get_text_config().num_experts_per_tok
    for number, rows in enumerate(routed):
        names = {m.rpartition(".")[2]: m for m in experts if f".experts.{number}." in m}
        if not len(rows):
            assert not seen.inputs.keys() & set(names.values())
            continue
        gate, up, down = (
            names[each] for each in (("w1", "w3", "w2") if "w1" in names else ("gate_proj", "up_proj", "down_proj"))
        )
        torch.testing.assert_close(seen.of(gate), rows, rtol=0, atol=1e-5)
        torch.testing.assert_close(seen.of(up), rows, rtol=0, atol=1e-5)
        inner = gated(model_type, linear(case, gate, rows), linear(case, up, rows))
        torch.testing.assert_close(seen.of(down), inner, rtol=0, atol=1e-5)


def routing(case: Case, model_type: str, tokens: Tensor) -> list[Tensor]:
    """What enters each expert of block 1 in the loaded model, [tokens, hidden], in the tokens' order."""
    block = f"{LAYERS.get(model_type, 'model.layers')}.1"
    if model_type == "llama4_text":
        (by_expert,) = entering(case.model, f"{block}.feed_forward.experts", tokens)
        return [rows[rows.abs().sum(-1) > 0] for rows in by_expert.view(4, tokens.numel(), -1)]
    x, chosen, _ = entering(case.model, f"{block}.mlp.experts", tokens)
    return [x[(chosen == expert).any(-1)] for expert in range(4)]


def linear(case: Case, name: str, x: Tensor) -> Tensor:
    return nn.functional.linear(x, case.weights[f"{name}.weight"], case.weights.get(f"{name}.bias"))


def gated(model_type: str, gate: Tensor, up: Tensor) -> Tensor:
    if model_type == "gpt_oss":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("model_type", ROUTED)
def test_every_expert_can_be_shown_every_token(model_type: str, cases: Callable[[str], Case]) -> None:
    """A counter proves it: all tokens reach each projection of each expert, and each sees its own inputs among them."""
    case, tokens = cases(model_type), tokens_of(3)
    block, x = case.skeleton.blocks[1], case.inputs(1, tokens)
    experts = tuple(m for m in block.modules if ".experts." in m)
    routed = observed(case, block, x, experts)
    shown = observed(case, block, x, experts, every_expert=True)
    assert {name: len(shown.of(name)) for name in experts} == dict.fromkeys(experts, tokens.numel())
    assert sum(len(routed.of(name)) for name in routed.inputs) < sum(len(shown.of(name)) for name in experts)
    for name in routed.inputs:
        nearest = torch.cdist(routed.of(name).double(), shown.of(name).double()).amin(1)
        assert float(nearest.max()) < 1e-5


@pytest.mark.parametrize("model_type", ROUTED)
def test_showing_every_token_changes_no_output(model_type: str, cases: Callable[[str], Case]) -> None:
    """The pass is watched from outside while all tokens are shown: what the experts hand on, and the block."""
    case, tokens = cases(model_type), tokens_of(3)
    block, x = case.skeleton.blocks[1], case.inputs(1, tokens)
    asked = tuple(m for m in block.modules if ".experts." in m)
    mixture = block._module.get_submodule(block.path(asked[0]).partition(".")[0])
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    block._repeated = frozenset({block.path(asked[0])})  # so that the pass does not end early
    hooks = [module.register_forward_hook(keep) for module in (mixture, block._module)]
    try:
        observed(case, block, x, asked)
        observed(case, block, x, asked, every_expert=True)
        with torch.no_grad():
            block.forward(x, case.weights)
    finally:
        block._repeated = frozenset()
        for hook in hooks:
            hook.remove()
    assert len(outputs) == 6
    assert all(torch.equal(outputs[at], outputs[at + 2]) and torch.equal(outputs[at], outputs[at + 4]) for at in (0, 1))


def test_a_pass_ends_when_all_has_been_seen(cases: Callable[[str], Case]) -> None:
    case = cases("llama")
    block, x = case.skeleton.blocks[0], case.inputs(0, tokens_of(2))
    called: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: called.append(path))
        for path, module in block._module.named_modules()
    ]
    seen = observed(case, block, x, ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"))
    nothing = observed(case, block, x, ())
    for hook in hooks:
        hook.remove()
    assert called[-1] == "self_attn.v_proj" and not any(path.startswith("mlp") for path in called)
    assert len(seen.inputs) == 2 and not nothing.inputs


def test_the_head_is_shown_its_inputs(cases: Callable[[str], Case]) -> None:
    case, tokens = cases("opt"), tokens_of(2)
    x = case.inputs(len(case.skeleton.blocks), tokens)
    seen = observed(case, case.skeleton.tail, x, ("lm_head", "model.decoder.project_out"))
    for name in seen.inputs:
        (expected,) = entering(case.model, name, tokens)
        torch.testing.assert_close(seen.of(name), expected.reshape(-1, expected.shape[-1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "module"),
    [
        ("llama", "model.layers.1"),
        ("llama", "model.layers.1.self_attn"),
        ("llama", "model.layers.1.mlp"),
        ("llama", "model.layers.1.mlp.down_proj"),
        ("gpt2", "transformer.h.1.attn"),
        ("opt", "model.decoder.layers.1.self_attn"),
        ("mixtral", "model.layers.1.block_sparse_moe"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w2"),
        ("qwen3_next", "model.layers.0.linear_attn"),
        ("llama4_text", "model.layers.1.feed_forward"),
        ("qwen3_5_moe", "model.language_model.layers.1.mlp.shared_expert"),
    ],
)
def test_a_module_is_run_again_with_other_weights(model_type: str, module: str, cases: Callable[[str], Case]) -> None:
    """With the same weights it gives what it gave in the block; with others, what the block would give with those."""
    case, tokens = cases(model_type), tokens_of(3)
    number = int(module.partition("layers.")[2][:1] or module.partition("h.")[2][:1])
    block, x = case.skeleton.blocks[number], case.inputs(number, tokens)
    call = block.calls(x, case.weights, module)
    assert call.module == module
    others = {name: w * 1.5 if name.startswith(module + ".") else w for name, w in case.weights.items()}
    for weights in (case.weights, others):
        caught = output_of(block, x, weights, module)
        with torch.no_grad():
            assert torch.equal(block.call(call, weights), caught)
    assert not torch.equal(output_of(block, x, case.weights, module), output_of(block, x, others, module))


def output_of(block: Block, x: Tensor, weights: Any, module: str) -> Tensor:
    outputs: list[Any] = []
    inner = block._module.get_submodule(block.path(module))
    hook = inner.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        block.forward(x, weights)
    hook.remove()
    result: Tensor = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    return result


def test_an_expert_that_no_token_reaches_is_entered_by_nothing(cases: Callable[[str], Case]) -> None:
    case = cases("qwen3_moe")
    block = case.skeleton.blocks[0]
    x = case.inputs(0, tokens_of(1, length=1))
    calls = [block.calls(x, case.weights, f"model.layers.0.mlp.experts.{number}.up_proj") for number in range(4)]
    assert sorted(len(call.arguments[0]) for call in calls) == [0, 0, 1, 1]  # type: ignore[arg-type]
    assert all(block.call(call, case.weights).shape[1] == 64 for call in calls)
    with pytest.raises(LookupError, match=r"model\.layers\.1\.mlp\.gate is no module of model\.layers\.0"):
        block.calls(x, case.weights, "model.layers.1.mlp.gate")


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe", "gpt_oss", "llama4_text"])
def test_gradients_are_those_of_the_loaded_model(model_type: str, tmp_path: Any) -> None:
    case, tokens = make_case(model_type, tmp_path), tokens_of(2)
    target = torch.randn(2, 40, 256, generator=torch.Generator().manual_seed(1))
    (case.model(input_ids=tokens).logits * target).sum().backward()
    weights = {name: w.clone().requires_grad_() for name, w in case.weights.items()}
    (case.logits(tokens, weights) * target).sum().backward()
    expected = {name: p.grad for name, p in case.model.named_parameters()}
    for block in case.skeleton.blocks:
        for name in block.tensors:
            wanted = expected[name] if name in expected else of_expert(expected, name, model_type)
            found = weights[name].grad
            assert found is not None, name
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def of_expert(gradients: dict[str, Any], name: str, model_type: str) -> Tensor:
    """The part of a fused parameter's gradient that belongs to one projection of one expert."""
    stem, _, rest = name.partition(".experts.")
    expert, projection, part = rest.split(".")
    fused = "down_proj" if projection == "down_proj" else "gate_up_proj"
    whole: Tensor = gradients[f"{stem}.experts.{fused}{'_bias' if part == 'bias' else ''}"][int(expert)]
    if part == "weight" and model_type in ("gpt_oss", "llama4_text"):
        whole = whole.T
    if fused == "down_proj":
        return whole
    place = ("gate_proj", "up_proj").index(projection)
    return whole[place::2] if model_type == "gpt_oss" else whole.chunk(2)[place]


@pytest.mark.parametrize("model_type", TYPES)
def test_matrices_as_they_are_stored_or_rounded_compute_what_wide_ones_do(
    model_type: str, cases: Callable[[str], Case]
) -> None:
    case, tokens = cases(model_type), tokens_of(3)
    grid = Scheme.parse("W4A16G-1").weight
    for block, x in ((case.skeleton.blocks[1], case.inputs(1, tokens)), (case.skeleton.tail, case.inputs(1, tokens))):
        narrow: dict[str, Tensor | QuantizedTensor] = dict(case.weights)
        for number, tensor in enumerate(f"{module}.weight" for module in block.modules):
            stored = case.weights[tensor].bfloat16()
            narrow[tensor] = encode(stored, grid) if number % 2 else stored
        wide = {n: w.float() if isinstance(w, Tensor) else w.decode() for n, w in narrow.items()}
        assert any(not torch.equal(wide[f"{m}.weight"], case.weights[f"{m}.weight"]) for m in block.modules)
        with torch.no_grad():
            assert torch.equal(block.forward(x, narrow), block.forward(x, wide))
        for module in block.modules[:2]:
            call = block.calls(x, narrow, module)
            assert torch.equal(call.arguments[0], block.calls(x, wide, module).arguments[0])  # type: ignore[arg-type]
            with torch.no_grad():
                assert torch.equal(block.call(call, narrow), block.call(call, wide))


def test_a_stand_in_that_is_used_unnoticed_shows() -> None:
    """It is NaN for what does not pass through torch's functions, and knows its shape without being made."""
    made: list[int] = []

    class Matrix:
        shape = (3, 4)

        def decode(self) -> Tensor:
            made.append(1)
            return torch.ones(self.shape)

    given, late = stand_ins({"w": Matrix(), "b": torch.zeros(3)}, torch.float32, torch.device("cpu"))
    assert bool(torch.isnan(given["w"]).all())
    with late:
        assert given["w"].shape == (3, 4) and given["w"].dtype == torch.float32 and not made
        assert torch.equal(nn.functional.linear(torch.ones(2, 4), given["w"], given["b"]), torch.full((2, 3), 4.0))
        assert torch.equal(torch.ones(2, 4) @ given["w"].T, torch.full((2, 3), 4.0))
        assert torch.equal(torch.addmm(given["b"], torch.ones(2, 4), given["w"].mT), torch.full((2, 3), 4.0))
    assert len(made) == 3
