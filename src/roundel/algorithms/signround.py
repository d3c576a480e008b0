"""SignRound: shifts and ranges learned by signed gradient descent on the output error of a decoder block.

Source: Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
(arXiv 2309.05516), algorithm 1. The loop is in `descent.py`, the arithmetic in `roundel.ops.learned_rounding`
and `learned_descent`.

Three things differ from the paper, each because it lowers the error at the same number of steps. Learning starts from
scales that were searched for (`start`), the range factors multiply those. The best state is not the one whose batch
happened to have the lowest loss: states are compared on the same samples. And plain rounding is one of those states,
so that no unit ends worse than with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from roundel.algorithms.algorithm import Algorithm, Rounded, misfit
from roundel.errors import RecipeError
from roundel.scheme import Grid
from roundel.unit import Layer, Unit

__all__ = ["SignRound"]

CHOICES = {
    "start": ("auto", "search", "rtn"),
    "optimizer": ("sign", "adam"),
    "schedule": ("linear", "cosine"),
    "scale_dtype": ("float16", "bfloat16"),
}


@dataclass(frozen=True)
class SignRound(Algorithm):
    """Learned rounding; all layers of a unit together.

    iters       steps of each unit; 0 keeps the start
    lr          first step size of the shifts, in steps of the grid; none: 1 / iters (with 1000 or more: 2 / iters for
                layers of at most 3 bits)
    minmax_lr   first step size of the range factors; none: lr
    schedule    how step sizes fall to 0: linear or cosine
    optimizer   sign (signed gradient descent) or adam (AdamW without decay)
    start       where learning starts: search (scales that minimize the error of each group, weighted by its inputs; of
                2 bits, then widened as by opt-rtn's unbiased), rtn (plain rounding), or auto: rtn on asymmetric grids
                of 2 bits but ggml's, else search
    tune_range  whether range factors are learned too; never on GGUF's K types
    scale_dtype   scales of integers are numbers of float16, in which files hold them; or bfloat16: of both, for readers
                that round them to a bfloat16 model's dtype (transformers and vLLM with compressed-tensors)
    quantized_inputs   whether a unit's inputs come from the rounded units before it; the target never does
    keep_best   whether the best of several states is kept, by the error on a fixed set of samples; else the last
    batch_size  samples of a step: twice as many take twice the time and are no better (docs/algorithms.md)
    gradient_accumulation   batches whose gradients are summed up for a step
    blocks      decoder blocks learned together, for the error behind the last of them; memory grows with it
    min_tokens  a layer that saw fewer keeps the start
    low_memory  run samples one at a time, their gradients summed up: the same steps but for float rounding. Without it
                as many are run together as it takes to be fast
    seed        of the order in which samples are drawn
    """

    name: ClassVar[str] = "signround"
    summary: ClassVar[str] = "learned rounding by signed gradient descent; the best at 2 to 4 bits, minutes per block"
    paper: ClassVar[str] = "Cheng et al. 2023, arXiv 2309.05516"

    iters: int = 200
    lr: float | None = None
    minmax_lr: float | None = None
    schedule: str = "linear"
    optimizer: str = "sign"
    start: str = "auto"
    tune_range: bool = True
    scale_dtype: str = "float16"
    quantized_inputs: bool = True
    keep_best: bool = True
    batch_size: int = 4
    gradient_accumulation: int = 1
    blocks: int = 1
    min_tokens: int = 16
    low_memory: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        lowest = {"iters": 0, "batch_size": 1, "gradient_accumulation": 1, "blocks": 1, "min_tokens": 1, "seed": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value < low:
                raise RecipeError(f"signround: {name}={value} is not possible; it is at least {low}.")
        for name in ("lr", "minmax_lr"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate <= 1:
                raise RecipeError(f"signround: {name}={rate} is not possible; it is above 0 and at most 1.")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise RecipeError(
                    f"signround: {name}={getattr(self, name)!r} is not possible; choose {' or '.join(allowed)}."
                )

    @property
    def reads_activations(self) -> bool:
        return True

    @property
    def measures_importances(self) -> bool:
        return True

    @property
    def reads_float_stream(self) -> bool:
        return True

    @property
    def blocks_at_a_time(self) -> int:
        return self.blocks

    def passes(self, samples: int, batch: int) -> float:
        a_step = min(self.batch_size, samples) * self.gradient_accumulation / samples
        return 3.0 + 3.0 * self.iters * a_step

    @property
    def copies(self) -> float:
        return 2.5 if self.optimizer == "sign" else 4.5

    def learns_on(self, batch: int, part: int) -> int:
        return 1 if self.low_memory else min(self.batch_size, part)

    def refuse(self, layer: Layer) -> str | None:
        grid = layer.scheme.weight
        blocks = grid.rule == "ggml" and grid.element.is_integer and grid.element.values is None
        if grid.block[0] != 1 or not (grid.is_plain_integer or grid.is_mx or blocks):
            return f"signround learns integers, MX floats and ggml's types of even steps, not {layer.scheme.name}"
        if blocks and self.scale_dtype != "float16":
            return f"scale_dtype={self.scale_dtype} has no meaning for {layer.scheme.name}, whose scales are ggml's"
        return misfit(layer)

    def rates(self, layer: Layer) -> tuple[float, float]:
        """The first step sizes of a layer's shifts and of its range factors; the latter is 0 where ranges stay.

        They stay on ggml's types whose scales are levels: these are too coarse for steps as small as would help, and
        moving them doubles the divergence (docs/benchmarks.md).
        """
        few = self.iters >= 1000 and layer.scheme.bits <= 3
        rate = self.lr or (2.0 if few else 1.0) / max(self.iters, 1)
        grid = layer.scheme.weight
        stays = not self.tune_range or (grid.rule == "ggml" and isinstance(grid.scale, Grid))
        return rate, 0.0 if stays else self.minmax_lr or rate

    def quantize(self, unit: Unit) -> dict[str, Rounded]:
        from roundel.algorithms.descent import learn

        return learn(unit, self)
