"""What `eval`, `compare` and `demo` share: options, the bar, and how models' numbers stand in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from roundel.cli.blockwise import BLOCKWISE

if TYPE_CHECKING:
    from rich.table import Table

    from roundel.evaluation.means import Mean
    from roundel.evaluation.measure import Evaluation, Measured
    from roundel.evaluation.tasks import TaskRun

__all__ = [
    "compared_table",
    "measured_table",
    "passage_options",
    "print_notes",
    "tasks_table",
    "write_file",
    "write_json",
]

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--window", type=int, metavar="TOKENS", help="[default: 2048, or what the models take]"),
    click.option("--stride", type=int, metavar="TOKENS", help="How far apart windows begin. [default: no overlap]"),
    click.option("--limit", type=int, metavar="N", help="Windows at most; with --tasks, questions of each task."),
    click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), help="A folder; else the model's own."),
    click.option("--device", default="cpu", show_default=True, help="Where models are run: cpu, cuda, cuda:1."),
    click.option(
        "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the numbers to this file."
    ),
    *BLOCKWISE,
)


def passage_options(command: Command) -> Command:
    """Add the options of a command that measures models on a text."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def measured_table(found: Evaluation) -> Table:
    """A column for each model; where there are two, one for their difference."""
    from rich.markup import escape
    from rich.table import Table

    from roundel.card import size

    pair = len(found.models) == 2
    made = Table(title=_title(found), title_justify="left")
    made.add_column("", no_wrap=True)
    for model in found.models:
        made.add_column(escape(model.name), justify="right")
    if pair:
        made.add_column("difference", justify="right")

    def row(name: str, say: Callable[[Measured], str], last: str = "") -> None:
        cells = [say(model) for model in found.models]
        if any(cells):
            made.add_row(name, *cells, *([last] if pair else []))

    far = found.models[-1].distance if pair else None
    row("weights on disk", lambda m: size(m.nbytes))
    row("bits per quantized weight", lambda m: "" if m.bits_per_weight is None else f"{m.bits_per_weight:.3f}")
    row("perplexity", lambda m: said(m.perplexity, 3), "" if far is None else said(far.perplexity, 3, signed=True))
    if not pair:
        row("its difference", lambda m: "" if m.distance is None else said(m.distance.perplexity, 3, signed=True))
    row("bits per byte", lambda m: "" if m.bits_per_byte is None else said(m.bits_per_byte, 4))
    row("KL in nats, mean", lambda m: "" if m.distance is None else said(m.distance.kl_mean, 4))
    row("KL in nats, 99.9th percentile", lambda m: "" if m.distance is None else said(m.distance.kl_p999, 3))
    row("same likeliest token, %", lambda m: "" if m.distance is None else said(m.distance.agreement.times(100), 2))
    row("tokens/s, measuring", lambda m: f"{m.tokens_per_second:,.0f}")
    row("peak memory", lambda m: "" if m.peak_memory is None else size(m.peak_memory))
    return made


def said(mean: Mean, digits: int, *, signed: bool = False) -> str:
    """38.982 ± 0.041"""
    value = f"{mean.value:{'+' if signed else ''},.{digits}f}"
    return value if mean.error is None else f"{value} ± {mean.error:,.{digits}f}"


def print_notes(notes: Sequence[str]) -> None:
    """A line for each."""
    from rich.markup import escape

    from roundel.cli.show import console

    for note in notes:
        console.print(f"[yellow]note[/] {escape(note)}")


def compared_table(found: Evaluation) -> Table:
    """A row for each model."""
    from rich.markup import escape
    from rich.table import Table

    from roundel.card import size

    made = Table(title=_title(found), title_justify="left")
    made.add_column("", no_wrap=True)
    for head in (
        "size",
        "bits",
        "perplexity",
        "difference",
        "KL, mean",
        "KL, 99.9 %",
        "same top, %",
        "tok/s",
        "memory",
    ):
        made.add_column(head, justify="right")
    for model in found.models:
        far = model.distance
        made.add_row(
            escape(model.name),
            size(model.nbytes),
            "" if model.bits_per_weight is None else f"{model.bits_per_weight:.3f}",
            said(model.perplexity, 3),
            "" if far is None else said(far.perplexity, 3, signed=True),
            "" if far is None else said(far.kl_mean, 4),
            "" if far is None else said(far.kl_p999, 3),
            "" if far is None else said(far.agreement.times(100), 2),
            f"{model.tokens_per_second:,.0f}",
            "" if model.peak_memory is None else size(model.peak_memory),
        )
    return made


def tasks_table(
    models: Sequence[str], runs: Sequence[Sequence[TaskRun]], moved: Mapping[tuple[str, str], Mean]
) -> Table:
    """A row for each task and metric."""
    from rich.markup import escape
    from rich.table import Table

    made = Table("task", "metric")
    for name in (*models, *(["difference"] if moved else [])):
        made.add_column(escape(name), justify="right")
    cells = [{(task, s.metric): s for run in found for task, of in run.scores.items() for s in of} for found in runs]
    for key in dict.fromkeys(key for found in cells for key in found):
        told = [said(found[key].result, 4) if key in found else "failed" for found in cells]
        change = [said(moved[key], 4, signed=True) if key in moved else ""] if moved else []
        made.add_row(*map(escape, key), *told, *change)
    return made


def _title(found: Evaluation) -> str:
    from rich.markup import escape

    return escape(f"{found.scored:,} tokens of {found.dataset} in {found.windows:,} windows of {found.length:,}")


def write_json(path: Path | None, found: Mapping[str, object]) -> None:
    """Raises OutputError when the file cannot be written."""
    import json

    if path is not None:
        write_file(path, json.dumps(found, indent=1) + "\n")


def write_file(path: Path, text: str) -> None:
    """Raises OutputError when the file cannot be written."""
    from roundel.errors import OutputError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error}). Choose another place.") from error
