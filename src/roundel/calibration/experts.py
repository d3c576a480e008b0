"""Routed experts with one linear layer for each projection, where transformers 5 has 3-D parameters for all of them.

They compute what transformers' fused modules compute, whose gating function (clamped, interleaved or plain) is kept and
called. Every expert is called at most once in a forward pass, on the tokens that were routed to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from roundel.calibration.architecture import DATA_FREE
from roundel.errors import PlanError

__all__ = ["Projection", "experts_and_inputs", "experts_prefix", "unfuse"]

Gating = Callable[[Tensor, Tensor], Tensor]


class Projection(nn.Module):
    """A linear layer without numbers; torch's own would draw random ones for each of thousands, even on meta."""

    def __init__(self, into: int, out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, into, device="meta"))
        self.bias = nn.Parameter(torch.empty(out, device="meta")) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Expert(nn.Module):
    """down(gating(gate(x), up(x))), its layers under the checkpoint's names; without a gate, down(gating(up(x)))."""

    def __init__(self, names: Mapping[str, str], hidden: int, inner: int, bias: bool, gating: Gating) -> None:
        super().__init__()
        self.names, self.gating = dict(names), gating
        for role, name in names.items():
            into, out = (inner, hidden) if role == "down" else (hidden, inner)
            self.add_module(name, Projection(into, out, bias))

    def forward(self, x: Tensor) -> Tensor:
        up = self._project("up", x)
        gate = self._project("gate", x) if "gate" in self.names else up
        return self._project("down", self.gating(gate, up))

    def _project(self, role: str, x: Tensor) -> Tensor:
        result: Tensor = self.get_submodule(self.names[role])(x)
        return result


class RoutedExperts(nn.Module):
    """Experts called as transformers calls its `Experts` modules: with tokens, their experts, and their weights."""

    def __init__(self, experts: Iterator[Expert]) -> None:
        super().__init__()
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden]."""
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self._modules)).tolist()
        result = torch.zeros_like(hidden_states)
        start = 0
        for expert, count in zip(self.children(), counts, strict=False):  # past the last: tokens that nobody takes
            if count:
                picked = order[start : start + count]
                rows, place = picked // top_k_index.shape[-1], picked % top_k_index.shape[-1]
                out = expert(hidden_states[rows]) * top_k_weights[rows, place, None]
                result = result.index_add(0, rows, out.to(result.dtype))
            start += count
        return result


class ScaledExperts(nn.Module):
    """Llama 4's mixture: the router's score scales what enters an expert, and a shared expert sees every token."""

    def __init__(self, router: nn.Module, shared_expert: nn.Module, experts: Iterator[Expert]) -> None:
        super().__init__()
        self.router, self.shared_expert = router, shared_expert
        self.experts = nn.ModuleList(experts)

    def scaled(self, tokens: Tensor) -> Iterator[Tensor]:
        """What enters each expert when all tokens are sent to it, [tokens, hidden]."""
        scores = self.router(tokens)[1].sigmoid().to(tokens.dtype)
        for column in range(len(self.experts)):
            yield tokens * scores[:, column, None]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(tokens)
        result = self.shared_expert(tokens)
        for column, expert in enumerate(self.experts):
            rows = scores[:, column].nonzero()[:, 0]  # the sigmoid of minus infinity is zero
            if len(rows):
                result = result.index_add(0, rows, expert(tokens[rows] * scores[rows, column, None]))
        return result, logits


def experts_prefix(path: str, module: nn.Module) -> str | None:
    """How the paths of experts begin in a module that is called with all tokens and sends them to experts, or None.

    That is one of ours, or one whose `experts` are a list of modules, as models had them before they were fused.
    """
    dot = path + "." if path else ""
    if isinstance(module, RoutedExperts):
        return dot
    return f"{dot}experts." if isinstance(module._modules.get("experts"), nn.ModuleList) else None


def experts_and_inputs(module: nn.Module, arguments: Sequence[Any]) -> Iterator[tuple[nn.Module, Tensor]]:
    """Each expert, and what enters it if all tokens are sent to it; `arguments` are those of the module they are in."""
    tokens = arguments[0].reshape(-1, arguments[0].shape[-1])
    experts = module if isinstance(module, RoutedExperts) else module.get_submodule("experts")
    scaled = module.scaled(tokens) if isinstance(module, ScaledExperts) else itertools.repeat(tokens)
    yield from zip(experts.children(), scaled, strict=False)


def unfuse(model: nn.Module, experts: Mapping[str, Mapping[str, str]]) -> None:
    """Put one linear layer for each projection in the place of every fused experts module.

    experts   module -> {"gate" | "up" | "down": what the checkpoint calls that projection}, as `Spelling` has them
    Raises PlanError for a module that is fused in a way this file does not know.
    """
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

    for path, names in experts.items():
        fused: Any = model.get_submodule(path)
        above = path.rpartition(".")[0]
        parent: Any = model.get_submodule(above)
        if isinstance(fused, Llama4TextExperts) and isinstance(parent, Llama4TextMoe):
            _check(fused, names, has_gate=True)
            split = _split(fused, names, gating=_product(fused), transposed=True, bias=False)
            model.set_submodule(above, ScaledExperts(parent.router, parent.shared_expert, split))
        elif hasattr(fused, "has_gate") and hasattr(fused, "is_transposed") and not fused.has_post_expert_norm:
            _check(fused, names, has_gate=fused.has_gate)
            split = _split(fused, names, gating=_gating(fused), transposed=fused.is_transposed, bias=fused.has_bias)
            model.set_submodule(path, RoutedExperts(split))
        else:
            raise PlanError(
                f"{path}: the experts of {type(fused).__name__} are fused in a way that cannot be taken apart. "
                f"{DATA_FREE}"
            )


def _check(fused: nn.Module, names: Mapping[str, str], *, has_gate: bool) -> None:
    """Raises PlanError when the checkpoint's experts have other projections than the module's."""
    if set(names) != ({"gate", "up", "down"} if has_gate else {"up", "down"}):
        raise PlanError(
            f"{type(fused).__name__} has {'a gate' if has_gate else 'no gate'}, and the checkpoint calls an expert's "
            f"projections {', '.join(sorted(names.values()))}. {DATA_FREE}"
        )


def _split(fused: Any, names: Mapping[str, str], *, gating: Gating, transposed: bool, bias: bool) -> Iterator[Expert]:
    """Experts like those of a fused module, whose down_proj is [experts, out, in], or [experts, in, out]."""
    count, first, second = fused.down_proj.shape
    hidden, inner = (second, first) if transposed else (first, second)
    for _ in range(count):
        yield Expert(names, hidden, inner, bias, gating)


def _product(fused: Any) -> Gating:
    return lambda gate, up: up * fused.act_fn(gate)


def _gating(fused: Any) -> Gating:
    """A fused module's own function of gate and up, which takes them side by side or alternating."""
    if not fused.has_gate:
        return lambda up, _: fused.act_fn(up)
    if fused.is_concatenated:
        return lambda gate, up: fused._apply_gate(torch.cat([gate, up], -1))
    return lambda gate, up: fused._apply_gate(torch.stack([gate, up], -1).flatten(-2))
