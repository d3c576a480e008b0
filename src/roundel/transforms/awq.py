"""AWQ: diagonal scales found by trying, judged by what rounding the readers costs the module they are in.

Source: Lin et al., arXiv 2306.00978, section 3.2. For ratios r in (0, 1], with x the mean |input| and w the mean
|weight| of each channel, weights relative to the largest of their group:

    s = x^r / w^(1 - r)   (duo scaling)   or   s = x^r
    loss(s) = |module(X; Q(W · s) / s) - module(X; W)|^2,  Q at each layer's own bits, group and symmetry

s = 1 is always tried first, so a space is never left worse than it was. Routers read a norm's output like any other
matrix: they are multiplied, and never rounded. Clipping, which follows, is in `clip`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from roundel.errors import RecipeError
from roundel.transforms.absorb import absorb, storable
from roundel.transforms.clip import clipped
from roundel.transforms.inputs import Entering, columns_to_channels, enter
from roundel.transforms.proof import prove
from roundel.transforms.transform import Transform, Transformed
from roundel.transforms.trial import refusal, round_trip
from roundel.unit import Call, Layer, Space, Stream, Unit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Awq"]

SMALLEST = 1e-4  # of x^r and of w^(1 - r), as in the authors' code
USUAL_LENGTH = 2048  # tokens of a sample, for estimates
EXPERT_SHARE = 4  # a routed expert keeps a quarter of the tokens


@dataclass(frozen=True, kw_only=True)
class Awq(Transform):
    """Searched scales, then searched clipping ranges.

    n_grid         ratios to try, evenly spaced up to 1
    duo_scaling    whether scales look at weights too: true, false, or "both": each ratio both ways
    clip           whether to search each group's clipping range afterwards
    n_clip_grid    steps of the clipping search, of which those that shrink by less than max_shrink are tried
    max_shrink     the most a range may shrink, 0 to 1
    search_tokens  tokens whose outputs a scale is judged by; 0 for all
    clip_tokens    tokens a clipping range is judged by
    stream         whose activations to look at: "float", or "quantized": what the rounded blocks before hand on
    """

    n_grid: int = 20
    duo_scaling: bool | str = True
    clip: bool = True
    n_clip_grid: int = 20
    max_shrink: float = 0.5
    search_tokens: int = 4096
    clip_tokens: int = 512
    stream: str = "float"

    name: ClassVar[str] = "awq"
    summary: ClassVar[str] = "diagonal scales and clipping ranges, searched"
    paper: ClassVar[str] = "Lin et al. 2023, arXiv 2306.00978"

    def __post_init__(self) -> None:
        for field in ("n_grid", "n_clip_grid", "clip_tokens"):
            if getattr(self, field) < 1:
                raise RecipeError(f"{field}={getattr(self, field)} is not possible: awq needs at least 1.")
        if self.search_tokens < 0:
            raise RecipeError(f"search_tokens={self.search_tokens} is not possible: 0 means all.")
        if self.duo_scaling not in (True, False, "both"):
            raise RecipeError(f'duo_scaling={self.duo_scaling!r} is not possible: true, false or "both".')
        if not 0 <= self.max_shrink < 1:
            raise RecipeError(f"max_shrink={self.max_shrink} is not possible: awq takes 0 up to, not with, 1.")
        if self.stream not in ("float", "quantized"):
            raise RecipeError(f'stream={self.stream!r} is not possible: "float" or "quantized".')

    @property
    def reads_activations(self) -> bool:
        return True

    @property
    def reads_float_stream(self) -> bool:
        return self.stream == "float"

    def passes(self, samples: int, batch: int) -> float:
        """Statistics and clipping look at all samples; candidates, at the modules they concern, on a few of them."""
        share = min(1.0, -(-self.search_tokens // USUAL_LENGTH) / samples) if self.search_tokens else 1.0
        candidates = self.n_grid * (2 if self.duo_scaling == "both" else 1)
        return 1.0 + self.clip + 0.7 * candidates * share

    def refuse(self, layer: Layer) -> str | None:
        return refusal(layer)

    def apply(self, unit: Unit) -> Transformed:
        entering = unit.entering()
        proven, notes = prove(unit)
        stream: Stream = "float" if self.stream == "float" else "quantized"
        tokens = self.search_tokens or entering.samples * entering.tokens
        seen = enter(proven, proven.spaces, stream, lambda space: _rows_to_keep(unit, space, tokens))
        weights = unit.weights
        for number, space in enumerate(proven.spaces):
            entered = seen.pop(space.name)
            if entered.tokens == 0:
                notes[space.name] = "skipped: no token reached it"
                continue
            loss = _lone_reader(unit, space, entered) if entered.rows else _module(unit, space, tokens, stream)
            scale, notes[space.name] = _search(unit, space, self.candidates(unit, space, entered), loss)
            if scale is not None:
                weights = absorb(weights, space, storable(unit.weights, space, scale))
            entering.tick((number + 1) / (len(proven.spaces) + 1), f"awq {space.name} {notes[space.name]}")
        moved = replace(proven, weights=weights)
        if self.clip:
            found = clipped(moved, stream, self.clip_tokens, self.n_clip_grid, self.max_shrink)
            moved = replace(moved, weights={**weights, **found})
        return Transformed(unit=moved, notes=notes)

    def candidates(self, unit: Unit, space: Space, seen: Entering) -> Iterator[tuple[str, Tensor]]:
        """(what it is, s [size]) for every scale to try beside 1."""
        inputs = columns_to_channels(space, seen.mean(), largest=False)
        weights = columns_to_channels(space, _relative_weights(unit, space), largest=False)
        duos = {True: (True,), False: (False,), "both": (True, False)}[self.duo_scaling]
        for step in range(1, self.n_grid + 1):
            for duo in duos:
                ratio = step / self.n_grid
                scale = inputs**ratio
                if duo:
                    scale = scale / (weights ** (1 - ratio) + SMALLEST)
                yield f"ratio {ratio:.2f}{'' if duo else ' of inputs alone'}", _centered(scale, inputs)


Loss = Callable[[Mapping[str, "Tensor"]], float]


def _search(
    unit: Unit, space: Space, candidates: Iterator[tuple[str, Tensor]], loss: Loss
) -> tuple[Tensor | None, str]:
    """The scale of smallest loss, None where 1 is, and what to say of it."""
    layers = [layer for layer in unit.layers if layer.name in space.readers]

    def rounded(columns: Tensor | None) -> dict[str, Tensor]:
        found = {}
        for layer in layers:
            weight, grid = unit.weight(layer), layer.scheme.weight
            found[layer.tensor] = (
                round_trip(weight, grid) if columns is None else round_trip(weight * columns, grid) / columns
            )
        return found

    plain = best = loss(rounded(None))
    chosen, text = None, "kept: no scale has a smaller error"
    for label, scale in candidates:
        tried = loss(rounded(space.columns(scale)))
        if tried < best:
            best, chosen, text = tried, scale, f"{label}, error {tried / plain:.3g} of unscaled"
    return chosen, text


def _lone_reader(unit: Unit, space: Space, seen: Entering) -> Loss:
    """The error of one layer's output, from kept tokens. |X·Δᵀ|² is |R·Δᵀ|² for the triangle R of X = Q·R."""
    import torch

    assert seen.rows is not None
    rows, (reader,) = seen.rows.kept(), space.readers
    if rows.shape[0] > 1.5 * rows.shape[1]:
        rows = torch.linalg.qr(rows, mode="r").R
    exact = unit.weights[f"{reader}.weight"]
    return lambda trial: float((rows @ (trial[f"{reader}.weight"] - exact).T).square().sum(dtype=torch.float64))


def _module(unit: Unit, space: Space, tokens: int, stream: Stream) -> Loss:
    """The error of the parent module's output, on samples spread over all."""
    import torch

    entering = unit.entering()
    count = min(entering.samples, max(1, -(-tokens // entering.tokens)))
    chosen = [number * entering.samples // count for number in range(count)]
    runs: list[Callable[[Mapping[str, Tensor]], Tensor]] = []
    for start in range(0, count, entering.part):
        runs.append(_run(unit, space.parent, chosen[start : start + entering.part], stream))
    with torch.no_grad():
        exact = [run(unit.weights) for run in runs]

    def loss(trial: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            outputs = (run({**unit.weights, **trial}) for run in runs)
            pairs = zip(outputs, exact, strict=True)
            return sum(float((output - right).square().sum(dtype=torch.float64)) for output, right in pairs)

    return loss


def _run(unit: Unit, module: str, samples: Sequence[int], stream: Stream) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A module as a function of the weights, on what entered it; the block itself where it is the parent."""
    entering = unit.entering()
    if module == unit.name:
        x = entering.inputs(samples, stream)
        return lambda weights: entering.forward(x, weights)
    call: Call = entering.calls(module, samples, stream)
    return lambda weights: entering.call(call, weights)


def _rows_to_keep(unit: Unit, space: Space, tokens: int) -> int:
    """Tokens kept of a space with one reader, whose output's error needs no module."""
    if space.parent not in space.readers:
        return 0
    expert = any(layer.role == "expert" and layer.name == space.parent for layer in unit.layers)
    return max(1, tokens // EXPERT_SHARE) if expert else tokens


def _relative_weights(unit: Unit, space: Space) -> Tensor:
    """Mean over the readers' rows of |w| / its group's largest [in]."""
    import torch

    from roundel.ops.fit import grouped

    total, rows = None, 0
    for layer in unit.layers:
        if layer.name not in space.readers:
            continue
        sizes = unit.weight(layer).abs()
        groups = grouped(sizes, layer.scheme.weight.block_of(layer.shape)[1])
        relative = (groups / (groups.amax(-1, keepdim=True) + 1e-6)).flatten(1)[:, : sizes.shape[1]]
        summed = relative.sum(0, dtype=torch.float64)
        total, rows = summed if total is None else total + summed, rows + sizes.shape[0]
    assert total is not None, "a space without rounded readers is not searched"
    return (total / rows).float()


def _centered(scale: Tensor, inputs: Tensor) -> Tensor:
    """The scale divided by the root of its largest times its smallest; 1 for channels that nothing enters."""
    import torch

    live = (inputs > 0) & torch.isfinite(scale)
    scale = torch.where(live, scale.clamp(min=SMALLEST), 1.0)
    kept = scale[live]
    if not kept.numel():
        return torch.ones_like(scale)
    return torch.where(live, scale / (kept.max() * kept.min()).sqrt(), 1.0)
