"""Patterns that configs bring along: those in use are tried, those that may take forever are refused."""

from __future__ import annotations

import pytest

from roundel.errors import SourceError
from roundel.formats.patterns import begins, occurs

MODULE = "model.layers.11.mlp.experts.3.down_proj"


def test_patterns_in_use() -> None:
    assert begins(r".*(mlp|self_attn)\.experts\.\d+\.(gate|up|down)_proj$", MODULE)
    assert begins(r"model\.layers\.(?:[0-9]|1[0-9])\..*", MODULE) and not begins("mlp", MODULE)
    assert occurs(r"^model\.layers\.11\.mlp", MODULE) and occurs(r".*down_proj.*", MODULE) and not occurs("up", MODULE)
    assert not occurs("(", MODULE) and not occurs("a{99999999999999999999}", "a")


@pytest.mark.parametrize("pattern", [r"(\w+\.?)+!", "((([a-z_.]+)+)+)+$", "(a*)*b", ".*" * 9 + "x", "(x|(y{2,})z){3,}"])
def test_what_may_take_forever_is_refused(pattern: str) -> None:
    with pytest.raises(SourceError, match="may take forever"):
        occurs(pattern, MODULE)
