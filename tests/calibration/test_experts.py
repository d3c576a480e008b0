"""Experts taken apart compute what the fused module computes, for each way in which transformers fuses them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from roundel.calibration.experts import unfuse
from roundel.errors import PlanError

COUNT, HIDDEN, INNER, TOKENS = 5, 8, 6, 11


class Fused(nn.Module):
    """3-D parameters, and flags that say how they lie; what transformers' decorator adds is written out."""

    def __init__(self, *, gate: bool, transposed: bool, bias: bool, alternating: bool, norm: bool = False) -> None:
        super().__init__()
        self.has_gate, self.is_transposed, self.has_bias = gate, transposed, bias
        self.is_concatenated, self.has_post_expert_norm = not alternating, norm
        self.act_fn = nn.SiLU()
        first = (COUNT, INNER * (2 if gate else 1), HIDDEN)
        second = (COUNT, HIDDEN, INNER)
        numbers = torch.Generator().manual_seed(0)
        for name, shape in (("gate_up_proj" if gate else "up_proj", first), ("down_proj", second)):
            weight = torch.randn(shape, generator=numbers)
            self.register_parameter(name, nn.Parameter(weight.mT.contiguous() if transposed else weight))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(shape[:2], generator=numbers)))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1) if self.is_concatenated else (gate_up[..., ::2], gate_up[..., 1::2])
        return (up + 1) * self.act_fn(gate).clamp(max=0.5)

    def matrix(self, name: str, expert: int) -> tuple[Tensor, Tensor | None]:
        """[out, in] and its bias."""
        weight = self.get_parameter(name)[expert].detach()
        bias = self.get_parameter(f"{name}_bias")[expert].detach() if self.has_bias else None
        return (weight.mT if self.is_transposed else weight), bias

    def expert(self, number: int, x: Tensor) -> Tensor:
        first = nn.functional.linear(x, *self.matrix("gate_up_proj" if self.has_gate else "up_proj", number))
        inner = self._apply_gate(first) if self.has_gate else self.act_fn(first)
        return nn.functional.linear(inner, *self.matrix("down_proj", number))


def parts(fused: Fused) -> dict[str, Tensor]:
    """The parameters of the module taken apart, by name."""
    found: dict[str, Tensor] = {}
    for number in range(COUNT):
        first, bias = fused.matrix("gate_up_proj" if fused.has_gate else "up_proj", number)
        matrices = {"w2": fused.matrix("down_proj", number)}
        if fused.has_gate:
            rows = (
                (slice(0, INNER), slice(INNER, None))
                if fused.is_concatenated
                else (slice(0, None, 2), slice(1, None, 2))
            )
            matrices |= {
                n: (first[r], None if bias is None else bias[r]) for n, r in zip(("w1", "w3"), rows, strict=True)
            }
        else:
            matrices["w3"] = (first, bias)
        for name, (weight, of) in matrices.items():
            found[f"experts.{number}.{name}.weight"] = weight
            if of is not None:
                found[f"experts.{number}.{name}.bias"] = of
    return found


@pytest.mark.parametrize(
    ("gate", "transposed", "bias", "alternating"), list(itertools.product([True, False], repeat=4))
)
def test_parts_compute_what_the_whole_does(gate: bool, transposed: bool, bias: bool, alternating: bool) -> None:
    fused = Fused(gate=gate, transposed=transposed, bias=bias, alternating=alternating)
    model: Any = nn.Module()
    model.experts = fused
    unfuse(model, {"experts": {"gate": "w1", "up": "w3", "down": "w2"} if gate else {"up": "w3", "down": "w2"}})
    numbers = parts(fused)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        n: tuple(t.shape) for n, t in numbers.items()
    }
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    chosen = torch.stack([torch.randperm(COUNT, generator=torch.Generator().manual_seed(t))[:2] for t in range(TOKENS)])
    chosen[3, 1] = COUNT  # an expert beyond the last: nobody's
    weights = torch.rand(TOKENS, 2, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros(TOKENS, HIDDEN)
    for token, place in itertools.product(range(TOKENS), range(2)):
        if int(chosen[token, place]) < COUNT:
            expected[token] += fused.expert(int(chosen[token, place]), x[token]) * weights[token, place]
    own = {name.removeprefix("experts."): tensor for name, tensor in numbers.items()}
    torch.testing.assert_close(functional_call(model.experts, own, (x, chosen, weights)), expected)


def test_what_cannot_be_taken_apart_is_refused() -> None:
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    flags = {"transposed": False, "bias": False, "alternating": False}
    for fused, told, message in (
        (Fused(gate=True, norm=True, **flags), names, "Fused are fused in a way that cannot be taken apart"),
        (Fused(gate=False, **flags), names, "Fused has no gate, and the checkpoint calls an expert's projections w1"),
        (nn.Linear(3, 3), names, "Linear are fused in a way that cannot be taken apart"),
    ):
        model = nn.Module()
        model.add_module("experts", fused)
        with pytest.raises(PlanError, match=message):
            unfuse(model, {"experts": told})


def test_the_flags_are_those_that_transformers_sets() -> None:
    """Fused above stands for modules that this decorator makes."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    small = {"hidden_size": 8, "intermediate_size": 6, "num_local_experts": 2}
    experts = GptOssExperts(GptOssConfig(**small))
    assert (experts.has_gate, experts.has_bias, experts.is_transposed, experts.is_concatenated) == (
        True,
        True,
        True,
        False,
    )
    assert experts.has_post_expert_norm is False and callable(experts._apply_gate)
    config = SimpleNamespace(
        n_routed_experts=2, hidden_size=8, moe_intermediate_size=6, moe_latent_size=None, mlp_hidden_act="relu2"
    )
    assert NemotronHExperts(config).has_gate is False
