"""`roundel eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from roundel.cli.measuring import (
    measured_table,
    passage_options,
    print_notes,
    tasks_table,
    write_json,
)

__all__ = ["eval_"]


@click.command("eval", short_help="Measure a model: perplexity, divergence from its source, tasks.")
@click.argument("model")
@click.option(
    "--ppl", "text", metavar="TEXT", help="Text to predict: a file, a dataset as --dataset takes it, 'bundled'."
)
@click.option("--kl-against", "source", metavar="MODEL", help="Compare predictions on that text with this model's.")
@click.option(
    "--per-position",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write every position to a .safetensors.",
)
@click.option("--tasks", metavar="NAME[,NAME]", help="Tasks of lm-evaluation-harness; patterns with * are allowed.")
@click.option("--include-path", type=click.Path(path_type=Path), metavar="FOLDER", help="Task YAMLs of your own.")
@click.option(
    "--eval-bs", type=click.IntRange(min=1), help="Questions at once, in tasks. [default: 1; what vLLM likes]"
)
@click.option(
    "--backend",
    type=click.Choice(["hf", "vllm"]),
    default="hf",
    show_default=True,
    help="What runs tasks: transformers as `roundel generate` loads the model, or vLLM on the checkpoint as it is.",
)
@passage_options
def eval_(
    model: str,
    text: str | None,
    source: str | None,
    per_position: Path | None,
    tasks: str | None,
    include_path: Path | None,
    eval_bs: int | None,
    backend: str,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Measure MODEL, a folder or a Hub id, quantized or not.

    It is run block by block from disk, so it may be larger than memory. With --kl-against, both models see the same
    tokens, and the difference has an error of its own, smaller than theirs.

    \b
    Examples:
      roundel eval ./out --ppl mytext.txt
      roundel eval ./out --ppl wikitext:split=test --kl-against ./model --limit 40
      roundel eval ./out --ppl chats.jsonl:apply_chat_template --window 1024 --stride 512 --json numbers.json
      roundel eval ./out --tasks mytask --include-path ./tasks --limit 100 --eval-bs 8
      roundel eval ./out --tasks gsm8k --backend vllm
    """
    from roundel.cli.show import Bar, console
    from roundel.errors import RecipeError
    from roundel.evaluation.measure import measure

    if text is None and (tasks is None or per_position is not None):
        asked = "--kl-against compares predictions of a text" if source else "There is nothing to measure"
        more = "" if source else "; or name --tasks"
        raise RecipeError(f"{asked}: pass one with --ppl, such as --ppl mytext.txt or --ppl bundled{more}.")
    of_tasks = {
        "--backend": backend != "hf",
        "--include-path": include_path is not None,
        "--eval-bs": eval_bs is not None,
    }
    idle = [option for option, given in of_tasks.items() if given]
    if tasks is None and idle:
        raise RecipeError(f"{idle[0]} is for tasks: name some with --tasks, or leave it out.")
    models = [model] if source is None else [source, model]
    numbers: dict[str, object] = {}
    if text is not None:
        with Bar() as bar:
            found = measure(models, text, positions=per_position, tick=bar.tick, **options)
        print_notes(found.notes)
        console.print(measured_table(found))
        numbers["perplexity"] = found.to_dict()
        write_json(json_file, numbers)
    if tasks is not None:
        numbers["tasks"], failed = _tasks(models, tasks.split(","), include_path, eval_bs, backend, options)
        write_json(json_file, numbers)
        if failed:
            raise SystemExit(1)


def _tasks(
    models: Sequence[str],
    tasks: Sequence[str],
    include: Path | None,
    batch: int | None,
    runtime: str,
    options: dict[str, Any],
) -> tuple[list[dict[str, object]], bool]:
    """Run and print tasks, on every model; what they gave, and whether one failed."""
    from roundel.cli.show import Bar, console
    from roundel.errors import RecipeError
    from roundel.evaluation.tasks import differences, run_tasks

    runs = []
    for model in models:
        if not Path(model).is_dir():
            instead = "Name the folder of a checkpoint." if Path(model).exists() else "Fetch it with `hf download`."
            raise RecipeError(f"Tasks run on models in a folder, and {model} is none. {instead}")
    for model in models:
        with Bar() as bar:
            runs.append(
                run_tasks(
                    Path(model),
                    tasks,
                    include=include,
                    batch=batch,
                    limit=options["limit"],
                    tokenizer=options["tokenizer"],
                    runtime=runtime,
                    device=options["device"],
                    trust_remote_code=options["trust_remote_code"],
                    tick=bar.tick,
                )
            )
    moved = differences(runs[0], runs[-1]) if len(runs) > 1 else {}
    console.print(tasks_table([Path(model).resolve().name for model in models], runs, moved))
    for model, found in zip(models, runs, strict=True):
        for run in found:
            if run.failure is not None:
                console.print(f"[red]failed[/] {escape(run.task)} on {escape(model)}: {escape(run.failure)}")
    told: list[dict[str, object]] = [
        {
            "model": model,
            "tasks": [run.to_dict() for run in found],
            "differences": [
                {"task": task, "metric": metric, **mean.to_dict()} for (task, metric), mean in moved.items()
            ]
            if found is runs[-1]
            else [],
        }
        for model, found in zip(models, runs, strict=True)
    ]
    return told, any(run.failure is not None for found in runs for run in found)
