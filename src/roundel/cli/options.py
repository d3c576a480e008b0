"""The options that `quantize` and `plan` share, and how they become a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from roundel.algorithms import SignRound
from roundel.chain import Option, known_options
from roundel.cli.blockwise import BLOCKWISE
from roundel.errors import RecipeError, nearest
from roundel.recipe import RECIPES, TOGETHER, Recipe, parse_layer_config

__all__ = ["recipe_from", "recipe_options"]

_PREFIX = "step_"  # of the parameter names of hyperparameters
Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--scheme", metavar="NAME", help=f"W4A16, MXFP4 ..., or W<bits>A16[G<group>][_ASYM]. [default: {Recipe.scheme}]"
    ),
    click.option("--bits", type=int, help="Replace the scheme's bits: 2 to 8."),
    click.option("--group-size", type=int, help="Replace the scheme's group size; -1 is one scale per row."),
    click.option("--sym/--asym", default=None, help="Replace the scheme's symmetry. [default: symmetric]"),
    click.option(
        "--algorithm",
        metavar="NAME[,NAME]",
        help=f"What chooses the codes, transforms before it: gptq, awq,signround ... [default: {Recipe.algorithm}]",
    ),
    click.option(
        "--recipe",
        metavar="NAME",
        help="A named recipe: default, best and light are signround's; opt-rtn, rtn. Options given beside it win.",
    ),
    click.option(
        "--dataset",
        metavar="SPEC",
        help="Calibration text, where the algorithm reads data: files, Hub names, or 'bundled'; NAME:num=64,NAME ... "
        f"[default: {Recipe.dataset}]",
    ),
    click.option("--nsamples", type=int, help=f"Calibration samples. [default: {Recipe.nsamples}]"),
    click.option("--seqlen", type=int, help=f"Tokens of a sample. [default: {Recipe.seqlen}, or what the model takes]"),
    click.option(
        "--batch-size",
        type=int,
        help=f"Samples run together, and taken for a step of learning. [default: {TOGETHER}; for signround's steps "
        f"{SignRound.batch_size}]",
    ),
    click.option("--seed", type=int, help=f"Of the samples' order and of all that is drawn. [default: {Recipe.seed}]"),
    click.option(
        "--activation-dtype",
        metavar="DTYPE",
        help=f"Of activations between blocks. [default: {Recipe.activation_dtype}]",
    ),
    click.option(
        "--calibrate-all-experts",
        is_flag=True,
        default=None,
        help="Every expert sees every token for its statistics; outputs do not change.",
    ),
    click.option(
        "--format",
        "formats",
        metavar="NAME[,NAME]",
        help=f"Format to write; several are written in one pass, a folder each. [default: {Recipe.formats[0]}]",
    ),
    click.option(
        "--layer-config",
        metavar="SPEC",
        help="Per layer, '{k_proj: {bits: 8}}' as JSON, YAML or relaxed, or @FILE; keys are names, parts or regexes.",
    ),
    click.option("--ignore-layers", metavar="PATTERNS", help="Layers to keep in full precision, separated by commas."),
    click.option("--quant-lm-head", is_flag=True, default=None, help="Round the output head too."),
    click.option(
        "--kv-cache",
        metavar="fp8",
        help="Store scales, measured on calibration text, with which runtimes keep keys and values in FP8.",
    ),
    click.option("--shard-size", metavar="SIZE", help=f"Largest output file. [default: {Recipe.shard_size}]"),
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
    *BLOCKWISE,
)


def recipe_options(command: Command) -> Command:
    """Add the shared options to a command, and one for each hyperparameter of the algorithms."""
    for option in reversed((*_OPTIONS, *_hyperparameters())):
        command = option(command)
    return command


def _hyperparameters() -> list[Callable[[Command], Command]]:
    made: list[Callable[[Command], Command]] = []
    for name, option in known_options().items():
        if name in ("seed", "batch_size"):
            continue  # the recipe's own
        flag = name.replace("_", "-")
        says = "; ".join(
            f"{'/'.join(owners)}: {text} [default: {default}]" for (default, text), owners in _told(option).items()
        )
        if option.kinds == {"bool", "str"}:  # a switch that may name something: a file, where it is off by default
            names_file = any(default is False for default, _ in option.owners.values())
            metavar = "[FILE]" if names_file else "[BOOL|STR]"
            shape: dict[str, Any] = {"metavar": metavar, "is_flag": False, "flag_value": "true"}
        else:
            shape = {"metavar": None if option.kinds == {"bool"} else "|".join(sorted(option.kinds)).upper()}
        declared = f"--{flag}/--no-{flag}" if option.kinds == {"bool"} else f"--{flag}"
        made.append(click.option(declared, _PREFIX + name, default=None, help=says, **shape))
    return made


def _told(option: Option) -> dict[tuple[object, str], list[str]]:
    """(default, description) -> the algorithms that say so."""
    found: dict[tuple[object, str], list[str]] = {}
    for owner, said in option.owners.items():
        found.setdefault(said, []).append(owner)
    return found


def recipe_from(options: dict[str, Any]) -> Recipe:
    """Options, over the recipe file's, over the defaults. Takes the recipe's options out of `options`.

    Raises RecipeError.
    """
    named = options.pop("recipe")
    if named is not None and named not in RECIPES:
        raise RecipeError(f"Unknown recipe {named!r}.{nearest(named, RECIPES)} Known are {', '.join(RECIPES)}.")
    path = options.pop("recipe_file")
    asked = [field.name for field in fields(Recipe) if field.name in options]
    given = {name: value for name in asked if (value := options.pop(name)) is not None}
    if "layer_config" in given:
        given["layer_config"] = parse_layer_config(given["layer_config"])
    base = Recipe.load(path).to_dict() if path is not None else {}
    if named is not None:
        base.pop("options", None)  # those of the file's algorithm
        base |= RECIPES[named]
    if "algorithm" in given and given["algorithm"] != base.get("algorithm"):
        base.pop("options", None)  # those of another algorithm
    hyper = {key.removeprefix(_PREFIX): options.pop(key) for key in list(options) if key.startswith(_PREFIX)}
    hyper = {key: value for key, value in hyper.items() if value is not None}
    if hyper:
        before = base.get("options", {})
        given["options"] = {**(before if isinstance(before, dict) else {}), **hyper}
    return Recipe.from_dict({**base, **given})
