"""Models side by side as an HTML page: what each costs against how good it is, and the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from roundel import __version__
from roundel.card import size
from roundel.evaluation.means import Mean
from roundel.evaluation.measure import Evaluation, Measured
from roundel.page import document
from roundel.page.svg import bars, scatter, short

__all__ = ["comparison_page", "pareto"]

HEADS = (  # and whether a column holds numbers
    ("model", False), ("MB on disk", True), ("bits per quantized weight", True), ("perplexity", True),
    ("difference", True), ("bits per byte", True), ("KL, mean", True), ("KL, 99.9th percentile", True),
    ("same likeliest token, %", True), ("tokens/s", True), ("peak memory, MB", True),
)  # fmt: skip


def comparison_page(found: Evaluation) -> str:
    """The page. The first model is the one that others are compared with."""
    title = f"{len(found.models)} models on {found.dataset}"
    first = found.models[0].name
    return document(
        title,
        "".join(
            (
                f"<h1>{escape(title)}</h1>\n<p class=sub>{found.scored:,} tokens in {found.windows:,} windows of "
                f"{found.length:,}, measured by roundel {escape(__version__)}. Differences and divergences are from "
                f"{escape(first)}; errors are standard errors.</p>\n",
                _notes(found.notes),
                _size_against_quality(found),
                _table(found),
                _costs(found.models),
            )
        ),
    )


def pareto(models: Sequence[tuple[str, float, float]]) -> list[str]:
    """Of (name, cost, loss), the names that no other is at least as good as in both and better in one."""
    return [
        name
        for name, cost, loss in models
        if not any(c <= cost and q <= loss and (c, q) != (cost, loss) for _, c, q in models)
    ]


def _size_against_quality(found: Evaluation) -> str:
    points = [(model.name, float(model.nbytes), model.perplexity.value) for model in found.models]
    why = "Lower and further left is better; the line joins models that no other beats in both."
    made = f"<h2>Size and perplexity</h2>\n<p class=why>{why}</p>\n"
    made += scatter("", points, (lambda nbytes: size(int(nbytes)), short), pareto(points))
    far = [(m.name, float(m.nbytes), m.distance.kl_mean.value) for m in found.models if m.distance is not None]
    if far:
        made += f"<h2>Size and divergence</h2>\n<p class=why>Mean KL divergence in nats. {why}</p>\n"
        made += scatter("", far, (lambda nbytes: size(int(nbytes)), short), pareto(far))
    return made


def _table(found: Evaluation) -> str:
    head = "".join(f"<th{' class=n' if is_number else ''}>{name}" for name, is_number in HEADS)
    lines = "".join(_line(model) for model in found.models)
    return (
        f'<h2>Numbers</h2>\n<div class="wide"><table class="rows"><thead><tr>{head}</thead><tbody>\n{lines}</tbody>'
        "</table></div>\n"
    )


def _line(model: Measured) -> str:
    far = model.distance
    cells = (
        f"{model.nbytes / 1e6:.1f}",
        "" if model.bits_per_weight is None else f"{model.bits_per_weight:.3f}",
        _said(model.perplexity, 3),
        "" if far is None else _said(far.perplexity, 3),
        "" if model.bits_per_byte is None else _said(model.bits_per_byte, 4),
        "" if far is None else _said(far.kl_mean, 5),
        "" if far is None else _said(far.kl_p999, 3),
        "" if far is None else _said(far.agreement.times(100), 2),
        f"{model.tokens_per_second:.0f}",
        "" if model.peak_memory is None else f"{model.peak_memory / 1e6:.0f}",
    )
    return f"<tr><td>{escape(model.name)}" + "".join(f"<td class=n>{text}" for text in cells) + "\n"


def _said(mean: Mean, digits: int) -> str:
    return f"{mean.value:.{digits}f}" + ("" if mean.error is None else f" ± {mean.error:.{digits}f}")


def _costs(models: Sequence[Measured]) -> str:
    speeds = [(model.name, model.tokens_per_second) for model in models]
    made = "<h2>Speed</h2>\n<p class=why>Tokens a second of this evaluation, block by block from disk.</p>\n"
    made += bars("", speeds, short)
    if any(model.peak_memory is not None for model in models):
        why = "The most that the process held while a model's blocks ran; states of other models are not counted."
        memory = [(model.name, None if model.peak_memory is None else float(model.peak_memory)) for model in models]
        made += f"<h2>Memory</h2>\n<p class=why>{why}</p>\n{bars('', memory, lambda nbytes: size(int(nbytes)))}"
    return made


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}\n" for note in notes)
    return f'<section class="notes"><h2>To know</h2><ul>\n{items}</ul></section>\n' if notes else ""
