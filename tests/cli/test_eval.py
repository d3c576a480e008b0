"""`roundel eval` and `roundel compare`, as a user calls them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from commands import command
from roundel.api import quantize
from roundel.data.bundled import bundled_model
from roundel.evaluation.comparison_page import pareto

PASSAGE = ("--ppl", "bundled", "--window", "64", "--limit", "6")


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded")
    for bits in (4, 2):
        quantize(bundled_model(), folder / f"w{bits}", bits=bits, group_size=64)
    return folder


def test_eval_one_model(tmp_path: Path) -> None:
    done = command("eval", bundled_model(), *PASSAGE, "--json", tmp_path / "n" / "numbers.json")
    assert done.code == 0, done.error
    assert "378 tokens of bundled in 6 windows of 64" in done.output
    (model,) = json.loads((tmp_path / "n" / "numbers.json").read_text())["perplexity"]["models"]
    assert f"{model['perplexity']['value']:.3f} ± {model['perplexity']['standard_error']:.3f}" in done.output
    assert 1.0 < model["bits_per_byte"]["value"] < 3.0
    assert model["kl_mean"] is None


def test_eval_beside_the_source(rounded: Path, tmp_path: Path) -> None:
    files = ("--json", tmp_path / "n.json", "--per-position", tmp_path / "p.safetensors")
    done = command("eval", rounded / "w4", *PASSAGE, "--kl-against", bundled_model(), *files)
    assert done.code == 0, done.error
    before, after = json.loads((tmp_path / "n.json").read_text())["perplexity"]["models"]
    assert (before["name"], after["name"]) == ("tinybook", "w4")
    difference = after["perplexity_difference"]
    assert difference["value"] == pytest.approx(after["perplexity"]["value"] - before["perplexity"]["value"])
    assert difference["standard_error"] < after["perplexity"]["standard_error"] / 3
    assert f"{difference['value']:+.3f}" in done.output
    assert (tmp_path / "p.safetensors").exists()


def test_compare(rounded: Path, tmp_path: Path) -> None:
    files = ("--json", tmp_path / "n.json", "--html", tmp_path / "c.html")
    done = command("compare", rounded / "w4", rounded / "w2", "--source", bundled_model(), *PASSAGE, *files)
    assert done.code == 0, done.error
    source, fine, coarse = json.loads((tmp_path / "n.json").read_text())["models"]
    assert source["bytes"] > fine["bytes"] > coarse["bytes"]
    assert fine["bits_per_weight"] > coarse["bits_per_weight"] > 2
    assert 0 < fine["kl_mean"]["value"] < coarse["kl_mean"]["value"]
    page = (tmp_path / "c.html").read_text()
    assert page.count("<svg") == 4
    assert "<circle" in page
    assert f"{coarse['perplexity']['value']:.3f}" in page
    HTMLParser().feed(page)


def test_the_best_are_those_that_no_other_beats() -> None:
    models = [("a", 4.0, 1.0), ("b", 2.0, 2.0), ("c", 3.0, 3.0), ("d", 1.0, 4.0), ("e", 4.0, 1.5)]
    assert pareto(models) == ["a", "b", "d"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("eval", "MODEL"), 2, "There is nothing to measure: pass one with --ppl"),
        (("eval", "MODEL", "--kl-against", "MODEL"), 2, "--kl-against compares predictions of a text"),
        (("eval", "MODEL", "--ppl", "nofile.txt"), 5, "there is no such file"),
        (("eval", "MODEL", "--ppl", "bundled", "--window", "600"), 2, "tinybook takes 512 tokens, not 600"),
        (("eval", "MODEL", "--ppl", "bundled", "--device", "gpu"), 2, "Unknown device 'gpu'"),
        (("eval", "MODEL", "--ppl", "bundled", "--backend", "vllm"), 2, "--backend is for tasks"),
        (("eval", "MODEL", "--ppl", "bundled", "--eval-bs", "2"), 2, "--eval-bs is for tasks"),
        (("eval", "MODEL", "--ppl", "bundled", "--include-path", "."), 2, "--include-path is for tasks"),
        (("eval", "MODEL", "--ppl", "bundled", "--json", "."), 2, "is a directory"),
        (("eval", "MODEL", "--ppl", "bundled", "--per-position", "."), 2, "is a directory"),
        (("compare", "MODEL", "MODEL", "--ppl", "bundled", "--html", "."), 2, "is a directory"),
        (("eval", "nowhere/at/all", "--ppl", "bundled"), 5, "nowhere/at/all"),
        (("compare", "MODEL", "--ppl", "bundled"), 2, "There is nothing to compare with"),
        (("compare", "MODEL", "--ppl", "bundled", "--source", "MODEL/"), 2, "There is nothing to compare with"),
        (("eval", "MODEL/config.json", "--tasks", "own"), 2, "is none. Name the folder of a checkpoint."),
        (("eval", "org/model", "--tasks", "own"), 2, "is none. Fetch it with `hf download`."),
    ],
)
def test_what_makes_no_sense(arguments: tuple[str, ...], code: int, says: str) -> None:
    done = command(*(part.replace("MODEL", str(bundled_model())) for part in arguments))
    assert done.code == code
    assert says in done.error
