"""The options that `quantize` and `plan` share, and how they become a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["recipe_from", "recipe_options"]

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--scheme", metavar="NAME", help="W4A16, MXFP4 ..., or W<bits>A16[G<group>][_ASYM]. [default: W4A16]"),
    click.option("--bits", type=int, help="Replace the scheme's bits: 2 to 8."),
    click.option("--group-size", type=int, help="Replace the scheme's group size; -1 is one scale per row."),
    click.option("--sym/--asym", default=None, help="Replace the scheme's symmetry. [default: symmetric]"),
    click.option("--algorithm", metavar="NAME", help="What chooses the codes. [default: rtn]"),
    click.option(
        "--format",
        "formats",
        metavar="NAME[,NAME]",
        help="Format to write; several are written in one pass, a folder each. [default: auto_round]",
    ),
    click.option(
        "--layer-config",
        metavar="SPEC",
        help="Per layer, '{k_proj: {bits: 8}}' as JSON, YAML or relaxed, or @FILE; keys are names, parts or regexes.",
    ),
    click.option("--ignore-layers", metavar="PATTERNS", help="Layers to keep in full precision, separated by commas."),
    click.option("--quant-lm-head", is_flag=True, default=None, help="Round the output head too."),
    click.option("--shard-size", metavar="SIZE", help="Largest output file. [default: 5GB]"),
    click.option("--strict", is_flag=True, default=None, help="A fallback is an error instead of a row of the report."),
    click.option(
        "--recipe-file",
        type=click.Path(path_type=Path),
        help="JSON or YAML recipe, such as an output's recipe.json; options given beside it win.",
    ),
    click.option("--revision", metavar="REV", help="Hub branch, tag or commit."),
    click.option("--device", default="cpu", show_default=True, help="cpu, or cuda."),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        help="Layers rounded side by side. [default: as cores and memory allow]",
    ),
)


def recipe_options(command: Command) -> Command:
    """Add the shared options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def recipe_from(options: dict[str, Any]) -> Any:
    """Options, over the recipe file's, over the defaults. Takes the recipe's options out of `options`.

    Raises RecipeError.
    """
    from roundel.recipe import Recipe, parse_layer_config

    path = options.pop("recipe_file")
    names = (
        "scheme",
        "bits",
        "group_size",
        "sym",
        "algorithm",
        "formats",
        "layer_config",
        "ignore_layers",
        "quant_lm_head",
        "shard_size",
        "strict",
    )
    given = {name: value for name in names if (value := options.pop(name)) is not None}
    if "layer_config" in given:
        given["layer_config"] = parse_layer_config(given["layer_config"])
    base = Recipe.load(path).to_dict() if path is not None else {}
    return Recipe.from_dict({**base, **given})
