"""What a run that reads activations is given beside its plan: the tokens, read and cut, and where things lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from roundel.checkpoint import Checkpoint
from roundel.errors import RecipeError
from roundel.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    Dataset = str | Sequence[str | Sequence[int] | Tensor | Mapping[str, object]]

__all__ = [
    "Calibration",
    "Dataset",
    "Offload",
    "Tick",
    "calibration_of",
    "check_calibration",
    "importances_to",
    "named",
]

Tick = Callable[[str, float, str], None]
Offload = Literal["auto", "ram", "disk"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a run that reads activations is given beside its plan; nothing of it but the tokens shapes the output.

    tokens    [samples, tokens] int64
    sha256    of the tokens: part of what the plan is known by
    notes     what the user should know of them
    offload   where activations lie between blocks: "ram", "disk", or "auto", in memory while they fit in half of it
    importances_to   a file for the importances that the algorithm computes
    tick      told how far a unit is (0 to 1), and its loss as text
    """

    tokens: Tensor
    sha256: str
    notes: tuple[str, ...] = ()
    offload: Offload = "auto"
    trust_remote_code: bool = False
    importances_to: Path | None = None
    tick: Tick = field(default=lambda name, done, text: None)


def calibration_of(
    checkpoint: Checkpoint,
    recipe: Recipe,
    dataset: Dataset | None = None,
    *,
    offload: Offload = "auto",
    trust_remote_code: bool = False,
    tick: Tick | None = None,
    importances_to: Path | None = None,
) -> Calibration:
    """The tokens that a recipe's algorithm looks at, read and cut. Raises RecipeError or SourceError."""
    if offload not in get_args(Offload):
        raise RecipeError(f"offload={offload!r} is not possible: {', '.join(get_args(Offload))}.")
    from roundel.calibration.datasets import calibration_tokens

    seqlen = recipe.tokens_for(checkpoint.source.config)
    found = calibration_tokens(
        dataset if dataset is not None else recipe.dataset,
        checkpoint.source.small_folder(),
        nsamples=recipe.nsamples,
        seqlen=seqlen,
        seed=recipe.seed,
        trust_remote_code=trust_remote_code,
    )
    _check_ids(found.tokens, checkpoint)
    notes = found.notes
    if seqlen < recipe.seqlen:
        notes = (f"samples have {seqlen} tokens, not {recipe.seqlen}: the model takes no more", *notes)
    return Calibration(
        tokens=found.tokens,
        sha256=found.sha256,
        notes=notes,
        offload=offload,
        trust_remote_code=trust_remote_code,
        importances_to=importances_to,
        tick=tick or (lambda name, done, text: None),
    )


def check_calibration(recipe: Recipe, dataset: Dataset | None = None) -> None:
    """What of a recipe's dataset can be wrong before anything is fetched or tokenized. Raises RecipeError or
    SourceError.

    dataset   rows in memory, or a name that stands in for the recipe's
    """
    if recipe.reads_activations and (dataset is None or isinstance(dataset, str)):
        from roundel.calibration.datasets import check_datasets

        check_datasets(recipe.dataset, recipe.nsamples)


def named(dataset: Dataset) -> str:
    """What a recipe calls a dataset."""
    from roundel.calibration.origins import name_of_rows

    return dataset if isinstance(dataset, str) else name_of_rows(len(dataset))


def _check_ids(tokens: Tensor, checkpoint: Checkpoint) -> None:
    """Raises RecipeError for a token that the model's embedding has no row for."""
    embedding = checkpoint.family.embedding
    if embedding not in checkpoint.tensor_names:
        return  # the model is asked when its blocks are built
    highest, rows = int(tokens.max()), checkpoint.shape(embedding)[0]
    if highest >= rows:
        raise RecipeError(
            f"The dataset holds token {highest}, and {embedding} of {checkpoint.source.name} has rows for 0 to "
            f"{rows - 1}. Give text, or the ids of this model's own tokenizer."
        )


def importances_to(recipe: Recipe, path: str | Path | None) -> Path | None:
    """Where importances go. Raises RecipeError where a run computes none, or the folder is not there."""
    if path is None:
        return None
    if not recipe.chain.algorithm.measures_importances or recipe.chain.transforms:
        raise RecipeError(
            f"{recipe.algorithm} computes no importances of the model as it is, so {path} would hold none. Choose "
            "--algorithm opt-rtn --imatrix, or signround."
        )
    found = Path(path)
    if not found.resolve().parent.is_dir() or found.is_dir():
        raise RecipeError(f"{path} cannot be written: name a file in a folder that is there.")
    return found
