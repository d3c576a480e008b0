"""A picoscopic decoder block in plain torch, and what enters it: `Unit` with `Activations` for tests, no model library.

`make_unit` builds one laid out like Llama's: grouped-query attention (causal, no rotary embedding), a gated MLP or
experts behind a router with a shared expert, RMS norms with or without Gemma's offset, biases on q, k and v. Inputs
have correlated channels, a few of them large. Everything is float32 and seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from roundel.scheme import Scheme
from roundel.unit import Call, Decodable, Layer, Stored, Stream, Unit

__all__ = ["BLOCK", "Shape", "ToyActivations", "forward", "make_unit", "plain_weights", "rebound"]

BLOCK = "model.layers.0"
See = Callable[[str, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The block's sizes. experts 0: a dense MLP; offset: what its norms add to their weights (Gemma: 1.0)."""

    hidden: int = 64
    inner: int = 128
    heads: int = 4
    kv_heads: int = 2
    head: int = 16
    experts: int = 0
    top_k: int = 2
    shared: bool = False
    offset: float = 0.0
    bias: bool = False

    @property
    def config(self) -> dict[str, object]:
        """The fields of config.json that tell about the block."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
        }

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Module name below the block -> [out, in]."""
        wide, narrow = self.heads * self.head, self.kv_heads * self.head
        found = {
            "self_attn.q_proj": (wide, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, wide),
        }
        for scope in self.scopes:
            found |= {f"{scope}.gate_proj": (self.inner, self.hidden), f"{scope}.up_proj": (self.inner, self.hidden)}
            found[f"{scope}.down_proj"] = (self.hidden, self.inner)
        return found | ({"mlp.gate": (self.experts, self.hidden)} if self.experts else {})

    @property
    def scopes(self) -> list[str]:
        """Where gated MLPs are."""
        if not self.experts:
            return ["mlp"]
        return [f"mlp.experts.{e}" for e in range(self.experts)] + (["mlp.shared_expert"] if self.shared else [])


def forward(shape: Shape, module: str, x: Tensor, weights: Mapping[str, Tensor], see: See | None = None) -> Tensor:
    """The output of a module below BLOCK, or of BLOCK itself; `see` is told what enters every module inside."""
    if see is not None:
        see(module, x)
    inside = module[len(BLOCK) + 1 :]

    def run(name: str, x: Tensor) -> Tensor:
        return forward(shape, f"{BLOCK}.{name}", x, weights, see)

    if module == BLOCK:
        x = x + run("self_attn", run("input_layernorm", x))
        return x + run("mlp", run("post_attention_layernorm", x))
    if inside.endswith("layernorm"):
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return scaled * (weights[f"{module}.weight"] + shape.offset)
    if inside == "self_attn":
        return run("self_attn.o_proj", _attention(shape, x, run))
    if inside == "mlp" and shape.experts:
        return _experts(shape, x, run)
    if inside in shape.scopes:
        return run(f"{inside}.down_proj", functional.silu(run(f"{inside}.gate_proj", x)) * run(f"{inside}.up_proj", x))
    return functional.linear(x, weights[f"{module}.weight"], weights.get(f"{module}.bias"))


def _attention(shape: Shape, x: Tensor, run: Callable[[str, Tensor], Tensor]) -> Tensor:
    q, k, v = (
        run(f"self_attn.{name}_proj", x).view(*x.shape[:2], -1, shape.head).transpose(1, 2) for name in ("q", "k", "v")
    )
    k, v = (each.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for each in (k, v))
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.transpose(1, 2).flatten(2)


def _experts(shape: Shape, x: Tensor, run: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Each token goes to the top_k experts of the router; an expert is run on its tokens only, and not on none."""
    tokens = x.flatten(0, -2)
    chances, chosen = run("mlp.gate", tokens).softmax(-1).topk(shape.top_k)
    out = torch.zeros_like(tokens)
    for expert in range(shape.experts):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        if len(token):
            found = run(f"mlp.experts.{expert}", tokens[token])
            out = out.index_add(0, token, found * chances[token, place, None])
    if shape.shared:
        out = out + run("mlp.shared_expert", tokens)
    return out.view(x.shape)


def plain_weights(weights: Mapping[str, Tensor | Decodable]) -> dict[str, Tensor]:
    return {name: each if isinstance(each, Tensor) else each.decode() for name, each in weights.items()}


@dataclass(frozen=True, kw_only=True)
class ToyActivations:
    """`roundel.unit.Activations` of a toy block.

    own       the unit's tensors
    streams   "float" and "quantized" hidden states [samples, tokens, hidden]
    ticks     (done, text) of every call of `tick`, in order
    """

    shape: Shape
    own: Mapping[str, Tensor]
    streams: Mapping[str, Tensor]
    batch: int = 4
    part: int = 4
    ticks: list[tuple[float, str]] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return self.streams["float"].shape[0]

    @property
    def tokens(self) -> int:
        return self.streams["float"].shape[1]

    def inputs(self, samples: Sequence[int], stream: Stream = "quantized") -> Tensor:
        if stream == "target":
            with torch.no_grad():
                return self.forward(self.inputs(samples, "float"), {})
        return self.streams[stream][list(samples)]

    def forward(self, x: Tensor, weights: Mapping[str, Tensor | Decodable]) -> Tensor:
        return forward(self.shape, BLOCK, x, {**self.own, **plain_weights(weights)})

    @torch.no_grad()
    def observe(
        self,
        see: See,
        weights: Mapping[str, Tensor | Decodable],
        *,
        modules: Collection[str] | None = None,
        stream: Stream = "quantized",
        every_expert: bool = False,
    ) -> None:
        whole = {**self.own, **plain_weights(weights)}
        asked = {f"{BLOCK}.{m}" for m in self.shape.matrices if m != "mlp.gate"} if modules is None else set(modules)
        apart = {m for m in asked if every_expert and ".experts." in m}

        def tell(module: str, x: Tensor) -> None:
            if module in asked - apart:
                see(module, x.reshape(-1, x.shape[-1]))
            elif module == f"{BLOCK}.mlp" and apart:
                for expert in range(self.shape.experts):
                    forward(self.shape, f"{module}.experts.{expert}", x.flatten(0, -2), whole, tell_apart)

        def tell_apart(module: str, x: Tensor) -> None:
            if module in apart:
                see(module, x)

        for start in range(0, self.samples, self.batch):
            x = self.inputs(range(start, min(start + self.batch, self.samples)), stream)
            forward(self.shape, BLOCK, x, whole, tell)

    @torch.no_grad()
    def calls(self, module: str, samples: Sequence[int], stream: Stream = "float") -> Call:
        caught: list[Tensor] = []
        forward(
            self.shape,
            BLOCK,
            self.inputs(samples, stream),
            self.own,
            lambda name, x: caught.append(x) if name == module else None,
        )
        return Call(module=module, arguments=(caught[0],), named={})

    def call(self, call: Call, weights: Mapping[str, Tensor | Decodable]) -> Tensor:
        (x,) = call.arguments
        assert isinstance(x, Tensor)
        return forward(self.shape, call.module, x, {**self.own, **plain_weights(weights)})

    def tick(self, done: float, text: str) -> None:
        assert 0 <= done <= 1
        self.ticks.append((done, text))


def make_unit(
    scheme: str | Scheme = "W4A16G32",
    *,
    samples: int = 8,
    tokens: int = 32,
    seed: int = 0,
    noise: float = 0.02,
    **sizes: float,
) -> Unit:
    """A block whose every linear layer is to be on `scheme`; routers and norms stay. `sizes` are fields of Shape.

    noise   how far the quantized stream is from the float one, relative
    """
    shape = Shape(**sizes)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    parsed = Scheme.parse(scheme)
    weights: dict[str, Tensor] = {}
    for module, (out, into) in shape.matrices.items():
        name = f"{BLOCK}.{module}"
        spread = torch.exp(0.5 * torch.randn(into, generator=generator))
        weights[f"{name}.weight"] = torch.randn(out, into, generator=generator) * spread / into**0.5
        if shape.bias and module.endswith(("q_proj", "k_proj", "v_proj")):
            weights[f"{name}.bias"] = 0.1 * torch.randn(out, generator=generator)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        drawn = torch.exp(0.3 * torch.randn(shape.hidden, generator=generator)) - shape.offset
        weights[f"{BLOCK}.{norm}.weight"] = drawn.bfloat16().float()
    exact = _hidden_states(shape, samples, tokens, generator)
    rounded = exact * (1 + noise * torch.randn(exact.shape, generator=generator))
    return Unit(
        name=BLOCK,
        layers=tuple(
            Layer(
                name=f"{BLOCK}.{module}",
                shape=size,
                dtype="BF16",
                scheme=parsed,
                stored=Stored(),
                bias=f"{BLOCK}.{module}.bias" if f"{BLOCK}.{module}.bias" in weights else None,
                role="expert" if ".experts." in module else "linear",
            )
            for module, size in shape.matrices.items()
            if module != "mlp.gate"
        ),
        weights=weights,
        activations=ToyActivations(shape=shape, own=weights, streams={"float": exact, "quantized": rounded}),
    )


def rebound(unit: Unit, weights: Mapping[str, Tensor | Decodable]) -> Unit:
    """The unit with other weights, and activations that know them for the unit's own."""
    assert isinstance(unit.activations, ToyActivations)
    return replace(unit, weights=weights, activations=replace(unit.activations, own=weights))


def _hidden_states(shape: Shape, samples: int, tokens: int, generator: torch.Generator) -> Tensor:
    rank = shape.hidden // 2
    mixing = torch.randn(rank, shape.hidden, generator=generator) / rank**0.5
    low = torch.randn(samples, tokens, rank, generator=generator) @ mixing
    sizes = torch.exp(0.5 * torch.randn(shape.hidden, generator=generator))
    sizes[torch.randperm(shape.hidden, generator=generator)[:3]] *= 8
    return (low + 0.3 * torch.randn(low.shape, generator=generator)) * sizes
