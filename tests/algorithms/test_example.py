"""The algorithm that docs/adding_an_algorithm.md shows, put through what every algorithm owes, and through the loop."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import roundel
from algorithms import test_every_algorithm as owed
from models.pico import build
from roundel.algorithms import ALGORITHMS
from roundel.chain import known_options
from roundel.verification import verify

PAGE = Path(__file__).parents[2] / "docs" / "adding_an_algorithm.md"


@pytest.fixture(autouse=True)
def clip(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (text,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    code = text[text.index("@dataclass") :]
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    module = ModuleType("clip_of_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(text, str(PAGE), "exec"), vars(module))
    monkeypatch.setitem(ALGORITHMS, "clip", vars(module)["Clip"]())
    known_options.cache_clear()
    yield
    known_options.cache_clear()


@pytest.mark.parametrize("shape", owed.SHAPES)
@pytest.mark.parametrize("scheme", owed.SCHEMES)
def test_it_stays_on_the_grid(scheme: str, shape: str) -> None:
    owed.test_it_stays_on_the_grid_and_never_loses_to_plain_rounding("clip", scheme, shape)


def test_it_owes_the_rest_too() -> None:
    owed.test_it_does_the_same_twice_and_leaves_its_unit_alone("clip")
    owed.test_rows_of_zeros_and_zero_points_that_formats_cannot_store("clip")
    owed.test_its_fields_are_what_a_command_line_can_give("clip")
    owed.test_values_without_sense_are_refused("clip")


def test_it_runs_in_the_loop(tmp_path: Path) -> None:
    model = build("qwen3_moe", tmp_path / "model")
    rows = torch.randint(0, 60, (4, 32), generator=torch.Generator().manual_seed(0)).tolist()
    wish = {"scheme": "W4A16G32", "nsamples": 4, "seqlen": 32, "dataset": rows}
    report = roundel.quantize(model, tmp_path / "out", algorithm="clip", smallest=0.6, **wish)
    assert verify(tmp_path / "out").problems == () and report.plan.recipe.options == {"smallest": 0.6}
