"""TEQ: diagonal scales trained by gradients, on what the rounded block does to its output.

Source: Cheng et al., arXiv 2310.10944, section 3: for each space a trainable s, weights Q(W · diag(s)) with gradients
passing straight through Q, everything else frozen. Other than the paper, which trains all of a model at once, `apply`
trains a block at a time against the block's unrounded output, and starts from whichever is better of 1 and
SmoothQuant's closed form. s is exp of the trained number, so it stays positive.

`Training` is the same without the loop, for a loop of one's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from roundel.errors import RecipeError
from roundel.transforms.absorb import absorb, storable
from roundel.transforms.inputs import enter
from roundel.transforms.proof import prove
from roundel.transforms.smoothquant import smooth_scale
from roundel.transforms.transform import Transform, Transformed
from roundel.transforms.trial import refusal, rounded_weights
from roundel.unit import Layer, Unit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Teq", "Training"]

CHECKS = 10  # times the loss is measured on the same samples, of which the best is kept


class Training:
    """The scales of one unit while they are trained.

    spaces are proven first; `notes` says which were dropped. Layers that are in no space are rounded in the trial too,
    so that the loss knows of them.
    """

    def __init__(self, unit: Unit) -> None:
        import torch

        self.unit, self.notes = prove(unit)
        self._logs = {
            space.name: torch.zeros(
                space.size,
                dtype=torch.float32,
                device=unit.weights[space.writers[0].tensor].device,
                requires_grad=True,
            )
            for space in self.unit.spaces
        }

    def parameters(self) -> list[Tensor]:
        """The trainable tensors, for an optimizer: log s of each space, all zero at first."""
        return list(self._logs.values())

    def weights(self) -> dict[str, Tensor]:
        """The unit's tensors with the present scales, its layers rounded at their own bits. Differentiable."""
        return rounded_weights(self.unit, self._scaled(), self.unit.layers)

    def finish(self) -> Transformed:
        """The unit with the present scales, unrounded."""
        import torch

        weights = self.unit.weights
        with torch.no_grad():
            for space in self.unit.spaces:
                log = self._logs[space.name]
                if bool((log == 0).all()):
                    self.notes.setdefault(space.name, "kept: no scale has a smaller error")
                    continue
                scale = storable(self.unit.weights, space, log.exp())
                weights = absorb(weights, space, scale)
                self.notes[space.name] = f"scaled by {float(scale.min()):.3g} to {float(scale.max()):.3g}"
        return Transformed(unit=replace(self.unit, weights=weights), notes=self.notes)

    def state(self) -> dict[str, Tensor]:
        """A copy of the parameters by space name."""
        return {name: log.detach().clone() for name, log in self._logs.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set the parameters to what `state` returned, or to log s of one's own."""
        import torch

        with torch.no_grad():
            for name, log in self._logs.items():
                log.copy_(state[name])

    def _scaled(self) -> dict[str, Tensor]:
        weights = dict(self.unit.weights)
        for space in self.unit.spaces:
            weights = absorb(weights, space, self._logs[space.name].exp())
        return weights


@dataclass(frozen=True, kw_only=True)
class Teq(Transform):
    """Scales trained a block at a time.

    steps        updates of a block's scales
    lr           Adam's step on log s, after warm-up; it then falls linearly to 0
    beta1        Adam's decay rate of the mean gradient
    beta2        Adam's decay rate of the mean square
    warmup       share of the steps in which lr rises
    batch_size   samples of one step
    smooth_start   whether to start from SmoothQuant's scales where they are better than none
    seed         of the order of samples
    """

    steps: int = 200
    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    warmup: float = 0.05
    batch_size: int = 8
    smooth_start: bool = True
    seed: int = 42

    name: ClassVar[str] = "teq"
    summary: ClassVar[str] = "diagonal scales trained on each block's output"
    paper: ClassVar[str] = "Cheng et al. 2023, arXiv 2310.10944"

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size"):
            if getattr(self, field) < 1:
                raise RecipeError(f"{field}={getattr(self, field)} is not possible: teq needs at least 1.")
        if self.lr <= 0:
            raise RecipeError(f"lr={self.lr} is not possible: teq needs a positive step.")
        for field in ("beta1", "beta2", "warmup"):
            if not 0 <= getattr(self, field) < 1:
                raise RecipeError(f"{field}={getattr(self, field)} is not possible: 0 up to, not with, 1.")

    @property
    def reads_activations(self) -> bool:
        return True

    @property
    def reads_float_stream(self) -> bool:
        return True

    def passes(self, samples: int, batch: int) -> float:
        return 2.0 + 3.0 * self.steps * min(self.batch_size, samples) / samples

    def learns_on(self, batch: int, part: int) -> int:
        return self.batch_size

    def refuse(self, layer: Layer) -> str | None:
        return refusal(layer)

    def apply(self, unit: Unit) -> Transformed:
        training = Training(unit)
        if training.unit.spaces:
            self._train(training)
        return training.finish()

    def _train(self, training: Training) -> None:
        """Leave the best scales found in `training`: those at the start, or at one of CHECKS looks on the way."""
        import torch

        entering = training.unit.entering()
        fixed = _spread(entering.samples, self.batch_size)
        plain = best = _loss(training, fixed)
        if plain == 0:
            return
        kept = training.state()
        if self.smooth_start:
            training.restore(_smooth(training))
            found = _loss(training, fixed)
            if found < best:
                best, kept = found, training.state()
            else:
                training.restore(kept)
        optimizer = torch.optim.Adam(training.parameters(), lr=self.lr, betas=(self.beta1, self.beta2))
        order = torch.Generator().manual_seed(self.seed)
        queue: list[int] = []
        for step in range(self.steps):
            while len(queue) < min(self.batch_size, entering.samples):
                queue += torch.randperm(entering.samples, generator=order).tolist()
            samples, queue = queue[: self.batch_size], queue[self.batch_size :]
            for group in optimizer.param_groups:
                group["lr"] = self.lr * self._share(step)
            optimizer.zero_grad()
            self._backward(training, samples)
            optimizer.step()
            if (step + 1) % max(1, self.steps // CHECKS) == 0 or step + 1 == self.steps:
                found = _loss(training, fixed)
                if found < best:
                    best, kept = found, training.state()
                entering.tick((step + 1) / self.steps, f"teq error {found / plain:.3g} of unscaled")
        training.restore(kept)

    def _share(self, step: int) -> float:
        """How much of lr a step takes."""
        rise = max(1, round(self.warmup * self.steps))
        return (step + 1) / rise if step < rise else (self.steps - step) / (self.steps - rise + 1)

    def _backward(self, training: Training, samples: Sequence[int]) -> None:
        entering = training.unit.entering()
        output = entering.forward(entering.inputs(samples), training.weights())
        (output - entering.inputs(samples, "target")).square().mean().backward()  # type: ignore[no-untyped-call]


def _loss(training: Training, samples: Sequence[int]) -> float:
    """Mean squared error of the rounded block's output, on these samples."""
    import torch

    entering = training.unit.entering()
    with torch.no_grad():
        weights = training.weights()
        total = 0.0
        for start in range(0, len(samples), entering.batch):
            part = samples[start : start + entering.batch]
            missed = entering.forward(entering.inputs(part), weights) - entering.inputs(part, "target")
            total += float(missed.square().mean(dtype=torch.float64)) * len(part)
    return total / len(samples)


def _spread(samples: int, count: int) -> list[int]:
    """`count` samples, or all there are, evenly spread."""
    count = min(samples, 2 * count)
    return [number * samples // count for number in range(count)]


def _smooth(training: Training) -> dict[str, Tensor]:
    """log s of SmoothQuant's scales, their geometric mean 1; 0 for spaces that no token reached."""
    seen = enter(training.unit, training.unit.spaces, "quantized")
    found = training.state()
    for space in training.unit.spaces:
        if seen[space.name].tokens:
            logs = smooth_scale(training.unit, space, seen[space.name], 0.5).log()
            found[space.name] = logs - logs.mean()
    return found
