"""What README.md, the documents and the help say to type is what the command line takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import roundel
from commands import command
from roundel.card import command_of
from roundel.cli.main import cli
from roundel.cli.options import recipe_from
from roundel.committer import FLUSH_BYTES
from roundel.data.bundled import bundled_model
from roundel.errors import QuantizationError
from roundel.families import known_types
from roundel.formats import reader_of
from roundel.recipe import Recipe

ROOT = Path(__file__).parents[2]
HELP = sorted((ROOT / "src" / "roundel" / "cli").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ADDED_BY_THE_READER = "--algorithm clip"  # docs/adding_an_algorithm.md


def commands() -> Iterator[tuple[str, int, str]]:
    """(file, line, command) of every command that stands on a line of its own, without what is said behind it."""
    for path in (*PAGES, *HELP):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = re.match(r" {4,}roundel (?=[a-z])(.*)", line)
            if found and ADDED_BY_THE_READER not in line:
                yield str(path.relative_to(ROOT)), number, re.split(r" {2,}", found[1])[0]


COMMANDS = list(commands())


def test_they_are_found() -> None:
    assert {"README.md", "docs/datasets.md", "docs/formats.md", "src/roundel/cli/main.py"} <= {c[0] for c in COMMANDS}


@pytest.mark.parametrize(("file", "line", "text"), COMMANDS, ids=[f"{file}:{line}" for file, line, _ in COMMANDS])
def test_every_command_is_taken(file: str, line: int, text: str) -> None:
    name, *words = shlex.split(text)
    known = cli.get_command(click.Context(cli), name)
    assert known is not None, f"{file}:{line}: there is no command {name}"
    known.make_context(name, words)


WISHES: tuple[dict[str, object], ...] = (
    {"format": "auto_gpqt"},
    {"format": "modelopt"},
    {"bits": 9},
    {"scheme": "MXFP4", "bits": 3},
    {"layer_config": {"k_proj": {"bit": 3}}},
    {"scheme": "W3A16", "format": "auto_awq,bnb", "layer_config": {"nope": "W4A16"}, "ignore_layers": ["foo"]},
    {"layer_config": {"embed": {"bits": 8}}},
    {"format": "auto_awq", "layer_config": {"k_proj": "W4A16G32"}},
    {"layer_config": {"k_proj": "MXFP4"}},
)


@pytest.mark.parametrize("wishes", WISHES, ids=str)
def test_errors_md_shows_what_is_said(wishes: dict[str, object]) -> None:
    with pytest.raises(QuantizationError) as error:
        roundel.plan(bundled_model(), **wishes)
    assert " ".join(str(error.value).split()) in page("docs/errors.md")


def test_errors_md_shows_what_is_read() -> None:
    with pytest.raises(QuantizationError) as error:
        reader_of({"quantization_config": {"quant_method": "quanto"}})
    assert str(error.value) in page("docs/errors.md")


def test_the_readme_has_the_table_that_is_printed() -> None:
    assert " ".join(command("list", "formats", "--markdown").output.split()) in page("README.md")


def test_sources_md_names_every_family() -> None:
    assert f"{', '.join(known_types())}." in page("docs/sources.md")


def test_resume_md_says_how_often_is_flushed() -> None:
    assert f"at least every {FLUSH_BYTES >> 20} MiB" in page("docs/resume.md")


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"bits": 3, "group_size": 64, "sym": False, "quant_lm_head": True, "ignore_layers": ("layers.0",)},
        {"scheme": "W4A16_MIXED", "formats": ("auto_round", "auto_gptq"), "shard_size": "1GB", "strict": True},
        {"layer_config": {"k_proj": {"bits": 8}, "layers.0": "W8A16"}},
        {
            "scheme": "FP8_STATIC",
            "formats": ("llm_compressor",),
            "kv_cache": "fp8",
            "dataset": "a b.txt",
            "nsamples": 4,
        },
        {"algorithm": "awq,gptq", "options": {"duo_scaling": False, "act_order": True, "true_sequential": False}},
        {"algorithm": "awq", "options": {"duo_scaling": "both", "n_grid": 7}, "seqlen": 64, "batch_size": 2, "seed": 1},
        {"algorithm": "opt-rtn", "options": {"imatrix": True, "unbiased": 1.0}, "activation_dtype": "bfloat16"},
        {"algorithm": "opt-rtn", "options": {"imatrix": "some where.gguf"}},
        {"algorithm": "signround", "options": {"lr": 0.005, "iters": 50}, "calibrate_all_experts": True},
    ],
    ids=str,
)
def test_the_command_on_the_card_makes_the_same_recipe(wishes: dict[str, Any]) -> None:
    recipe = Recipe(**wishes)
    name, *words = shlex.split(command_of(recipe, "MODEL", revision="main"))[1:]
    known = cli.get_command(click.Context(cli), name)
    assert known is not None
    given = known.make_context(name, words).params
    assert (given["model"], str(given["out"]), given["revision"]) == ("MODEL", "OUT", "main")
    assert recipe_from(given).to_dict() == recipe.to_dict()


def page(name: str) -> str:
    """A document, its lines joined."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_a_named_recipe_replaces_the_algorithm_of_a_file_and_its_options(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(
        '{"algorithm": "signround", "options": {"iters": 5}, "nsamples": 7, "bits": 3}'
    )
    known = cli.get_command(click.Context(cli), "plan")
    assert known is not None
    words = ["MODEL", "--recipe-file", str(tmp_path / "recipe.json"), "--recipe"]
    for name, options, samples in (("default", {}, 128), ("rtn", {}, 7), ("light", {"iters": 50, "lr": 5e-3}, 128)):
        found = recipe_from(known.make_context("plan", [*words, name]).params)
        assert (found.options, found.nsamples, found.bits) == (options, samples, 3), name
