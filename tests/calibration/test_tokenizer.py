"""Tokenizers: read where there is one, a clear error for whatever else lies there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from roundel.calibration.tokenizer import load_tokenizer
from roundel.data.bundled import bundled_model
from roundel.errors import SourceError

WHOLE = json.loads((bundled_model() / "tokenizer.json").read_text())


def test_a_folder_s_tokenizer() -> None:
    text = "It was a dark night."
    tokenizer = load_tokenizer(bundled_model())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_folder_that_is_not_there_is_no_model_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no tokenizer that can be read"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "not JSON"),
        ("tokenizer.json", "null"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", json.dumps({key: value for key, value in WHOLE.items() if key != "model"})),
        ("tokenizer.json", json.dumps({**WHOLE, "model": 1})),
        ("tokenizer_config.json", "not JSON"),
        ("tokenizer_config.json", "null"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"bos_token": 3}'),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, text: str) -> None:
    folder = shutil.copytree(bundled_model(), tmp_path / "model")
    (folder / file).write_text(text)
    with pytest.raises(SourceError, match=r"model holds no tokenizer that can be read .* Copy the model's"):
        load_tokenizer(folder)
