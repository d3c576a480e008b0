"""Text -> windows: in order, each token scored once, bytes counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roundel.data.bundled import bundled_model, bundled_text
from roundel.errors import RecipeError
from roundel.evaluation.text import read_passage


class Letters:
    """A tokenizer whose tokens are characters, with a BOS of 0 where special tokens are asked for."""

    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        return [0] * add_special_tokens + [ord(letter) for letter in text]

    def apply_chat_template(self, conversation: object, *, tokenize: bool, add_generation_prompt: bool) -> str:
        raise AssertionError


def file(tmp_path: Path, name: str, content: str) -> str:
    (tmp_path / name).write_text(content, encoding="utf-8")
    return str(tmp_path / name)


def letters(passage_windows: object) -> list[str]:
    return ["".join(chr(token) for token in window) for window in passage_windows.tolist()]


def test_windows_follow_each_other_behind_a_bos(tmp_path: Path) -> None:
    found = read_passage(file(tmp_path, "t.txt", "abcdefgh"), Letters(), window=4)
    assert letters(found.windows) == ["\0abc", "\0def"]
    assert found.first == (1, 1)
    assert found.scored == 6


def test_a_stride_scores_what_is_new(tmp_path: Path) -> None:
    found = read_passage(file(tmp_path, "t.txt", "abcdefgh"), Letters(), window=5, stride=2)
    assert letters(found.windows) == ["\0abcd", "\0cdef", "\0efgh"]
    assert found.first == (1, 3, 3)
    assert found.scored == 8


def test_rows_are_joined_in_their_order(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "three"))
    found = read_passage(file(tmp_path, "t.jsonl", rows), Letters(), window=16)
    assert letters(found.windows) == ["\0one\n\ntwo\n\nthree"]


def test_bytes_are_those_of_the_text(tmp_path: Path) -> None:
    found = read_passage(file(tmp_path, "t.txt", "äbcd"), Letters(), window=3)
    assert found.bytes_per_token == 5 / 4
    ids = file(tmp_path, "t.jsonl", json.dumps({"input_ids": list(range(9))}))
    assert read_passage(ids, None, window=3).bytes_per_token is None


def test_limits(tmp_path: Path) -> None:
    one, two = file(tmp_path, "a.txt", "abcdefgh" * 4), file(tmp_path, "b.txt", "ABCDEFGH" * 4)
    assert len(read_passage(f"{one},{two}", Letters(), window=5, limit=3).windows) == 3
    assert letters(read_passage(f"{one}:num=1,{two}:num=2", Letters(), window=5).windows) == [
        "\0abcd",
        "\0ABCD",
        "\0EFGH",
    ]
    with pytest.raises(RecipeError, match="leaves no window"):
        read_passage(one, Letters(), window=5, limit=0)


def test_the_bundled_text_is_the_one_for_evaluation() -> None:
    found = read_passage("bundled", bundled_model(), window=256)
    text = bundled_text("evaluation").read_text(encoding="utf-8")
    assert len(found.windows) == 100
    assert found.bytes_per_token == pytest.approx(len(text.encode()) / 25_608, rel=1e-3)


def test_wishes_that_mean_nothing(tmp_path: Path) -> None:
    name = file(tmp_path, "t.jsonl", json.dumps({"text": "abcdefgh"}))
    with pytest.raises(RecipeError, match=r"rows are joined.*Drop concat=false"):
        read_passage(f"{name}:concat=false", Letters(), window=4)
    with pytest.raises(RecipeError, match="predicts nothing"):
        read_passage(name, Letters(), window=1)
    with pytest.raises(RecipeError, match=r"has 10 tokens, a window 63\. Use a longer text"):
        read_passage(name, Letters(), window=64)
