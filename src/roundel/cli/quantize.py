"""`roundel quantize`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from roundel.cli.options import recipe_from, recipe_options
from roundel.memory import peak_memory

__all__ = ["LayersBar", "default_folder", "quantize"]


@click.command(short_help="Round a model's weights and write a checkpoint.")
@click.argument("model")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@recipe_options
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in OUT.")
@click.option(
    "--save-imatrix",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Keep the importances that opt-rtn --imatrix or signround computes, as llama.cpp reads them; FILE.dat is its "
    "older layout.",
)
def quantize(
    model: str,
    out: Path | None,
    overwrite: bool,
    offload: Any,
    trust_remote_code: bool,
    save_imatrix: Path | None,
    revision: str | None,
    device: str,
    workers: int | None,
    **options: Any,
) -> None:
    """Round the weights of MODEL and write a checkpoint to OUT.

    MODEL is a folder with config.json and *.safetensors, or a Hub id such as Qwen/Qwen3-8B. OUT is ./NAME-SCHEME when
    it is left out. A killed run continues when the same command is repeated, and ends with the same bytes.

    \b
    Examples:
      roundel quantize ./Llama-3.1-8B
      roundel quantize ./model ./out --bits 3 --group-size 64 --asym
      roundel quantize ./model ./out --format auto_gptq,auto_awq
      roundel quantize ./model ./out --layer-config '{k_proj: {bits: 8}, layers.0: W8A16}'
      roundel quantize ./model ./out --recipe-file other/recipe.json
      roundel quantize ./model ./out --algorithm gptq --dataset mytext.txt --nsamples 128
      roundel quantize ./model ./out --algorithm awq,signround --iters 200 --bits 3
      roundel quantize ./model ./out --recipe light --dataset bundled
      roundel quantize ./model ./out --format gguf:q4_k_m --algorithm opt-rtn --imatrix imatrix.gguf
    """
    from rich.markup import escape

    from roundel.api import (
        check_device,
        downloads,
        quantize_checkpoint,
        remove_downloads,
    )
    from roundel.calibrating import calibration_of, importances_to
    from roundel.checkpoint import open_checkpoint
    from roundel.cli.show import console, print_report
    from roundel.output import check_place, is_complete
    from roundel.pipeline import default_workers
    from roundel.planning import build_plan

    check_device(device)
    recipe = recipe_from(options)
    target = importances_to(recipe, save_imatrix)
    folder = out if out is not None else default_folder(model, recipe.label)
    check_place(folder)
    work = downloads(folder)
    checkpoint = open_checkpoint(model, revision, work)
    try:
        plan = build_plan(checkpoint, recipe)
        calibration, bar = None, LayersBar(sum(layer.parameters for layer in plan.layers), len(plan.layers))
        if recipe.reads_activations:
            calibration = calibration_of(
                checkpoint,
                recipe,
                offload=offload,
                trust_remote_code=trust_remote_code,
                tick=bar.tick,
                importances_to=target,
            )
            bar.tokens = calibration.tokens.numel()
            plan = build_plan(checkpoint, recipe, None, (calibration.sha256, calibration.notes))
        if not is_complete(folder, plan):
            console.print(f"{escape(plan.source_name)} to {recipe.label}: {plan.extent}, into {escape(str(folder))}")
        count = workers or default_workers(plan, device)
        with bar:
            report = quantize_checkpoint(
                checkpoint,
                folder,
                recipe,
                device=device,
                workers=count,
                overwrite=overwrite,
                progress=bar.advance,
                planned=plan,
                calibration=calibration,
            )
    finally:
        checkpoint.close()
    remove_downloads(work)
    print_report(report)


def default_folder(model: str, scheme: str) -> Path:
    """./NAME-SCHEME for a folder or a Hub id."""
    name = Path(model).resolve().name if Path(model).exists() else model.rpartition("/")[2]
    return Path(f"{name}-{scheme.upper()}")


class LayersBar:
    """A bar over weights, with the time left, the most memory that was held, and the layer or block at hand.

    tokens   of calibration data; each goes through every block
    """

    def __init__(self, weights: int, layers: int) -> None:
        from rich.progress import TextColumn, TimeElapsedColumn

        from roundel.cli.show import console, progress

        counted = TextColumn("{task.fields[layers]}/" + str(layers) + " layers")
        held = TextColumn("{task.fields[memory]}")
        self._progress = progress(console, before=(counted, TimeElapsedColumn()), after=(held,))
        self._task = self._progress.add_task("", total=weights, layers=0, memory="")
        self._layers, self._done, self._largest = 0, 0, 0
        self.tokens, self._since = 0, time.perf_counter()

    def __enter__(self) -> LayersBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, work: Any, row: Any) -> None:
        """A piece of work is done."""
        self._layers += len(work.rounded)
        size = sum(layer.parameters for layer in work.rounded)
        self._done += size
        self._largest = max(self._largest, size)
        now, text = time.perf_counter(), work.name
        if work.kind == "unit":
            text += f" {self.tokens / (now - self._since):,.0f} tokens/s"
        self._since = now
        self._show(self._done, text)

    def tick(self, name: str, done: float, text: str) -> None:
        """A decoder block is done in part. Blocks are about alike, so the part is one of the largest seen."""
        self._show(self._done + done * self._largest, f"{name} {text}")

    def _show(self, done: float, text: str) -> None:
        from roundel.card import size

        held = size(peak_memory())
        self._progress.update(self._task, completed=done, description=text, layers=self._layers, memory=held)
