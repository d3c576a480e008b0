"""`roundel demo`, end to end on the bundled model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from roundel.checkpoint import open_checkpoint
from roundel.cli.demo import demo
from roundel.errors import RecipeError


def number(output: str, row: str) -> list[float]:
    """The numbers in a row of the table, errors left out."""
    (line,) = [line for line in output.splitlines() if row in line]
    return [float(value) for value in re.findall(r"(?<!± )(?<![\d.])-?\d+\.\d+", line.partition(row)[2])]


def test_demo(tmp_path: Path) -> None:
    out = tmp_path / "kept"
    result = CliRunner().invoke(demo, ["--scheme", "W3A16", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    before, after, difference = number(result.output, "perplexity")
    assert difference == pytest.approx(after - before, abs=0.002)
    assert 34.0 < before < after < 1.1 * before
    assert number(result.output, "weights on disk")[0] > 2 * number(result.output, "weights on disk")[1]
    assert number(result.output, "bits per quantized weight")[0] < 3.3
    assert 0.0 < number(result.output, "KL in nats, mean")[0] < 0.1
    assert "28 matrices rounded" in result.output
    assert "W3A16: It was a dark night, and" in result.output
    kept = open_checkpoint(out)
    assert len(kept.layers) == 28
    kept.close()


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(RecipeError, match="W4A17"):
        CliRunner().invoke(demo, ["--scheme", "W4A17"], catch_exceptions=False)
