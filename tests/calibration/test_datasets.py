"""Calibration data: what a wish comes to, token by token, with a tokenizer whose token n is the word "wn"."""

from __future__ import annotations

import gzip
import importlib.util
import json
import multiprocessing
import os
import random
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Regex, models, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from hub_server import HubServer, point_client_at
from roundel.calibrating import named
from roundel.calibration import Samples, calibration_tokens, datasets, origins, reading, register_dataset, rows
from roundel.calibration.hub_datasets import HUB_DATASETS, HubDataset
from roundel.calibration.reading import read_values
from roundel.calibration.rows import Chat, Ids, Text, row_of
from roundel.data.bundled import bundled_model
from roundel.errors import RecipeError, SourceError
from roundel.recipe import Recipe

BOS, BREAK, USER, ASSISTANT, SYSTEM = range(1000, 1005)
SPECIAL = {"<s>": BOS, "\n\n": BREAK, "<user>": USER, "<assistant>": ASSISTANT, "<system>": SYSTEM}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STERN = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE


def words(*tokens: int) -> str:
    return " ".join(f"w{token}" for token in tokens)


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    vocabulary = {f"w{token}": token for token in range(1000)} | SPECIAL
    raw = RawTokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(Regex(r"(?<!\n)\n(?!\n)"), "removed"),
        ]
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", model_max_length=1_000_000)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("bare"), template=None)


@pytest.fixture(scope="module")
def stern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("stern"), template=STERN)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything that is cached goes here; what is registered is forgotten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(origins, "_REGISTERED", {})
    return tmp_path / "home"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        point_client_at(server, monkeypatch, tmp_path)
        yield server


def write_lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return path


def parquet(values: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), sink)
    return bytes(sink.getvalue())


def texts(count: int, length: int, first: int = 0) -> list[str]:
    """Texts of distinct words: number i begins with w<first + i>."""
    return [words(first + i, *((first + i + step) % 1000 for step in range(1, length))) for i in range(count)]


def firsts(samples: Samples) -> list[int]:
    """The first word of every sample, behind its BOS."""
    assert (samples.tokens[:, 0] == BOS).all()
    return samples.tokens[:, 1].tolist()


# What a row becomes


def test_a_row_gives_its_first_tokens_as_the_tokenizer_would_cut_them(model: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    held = texts(6, 40)
    found = calibration_tokens(held, model, nsamples=6, seqlen=16)
    assert found.tokens.dtype == torch.int64 and found.notes == ()
    assert found.tokens.tolist() == tokenizer(held, truncation=True, max_length=16)["input_ids"]


def test_every_form_of_a_row(model: Path) -> None:
    ids = list(range(20))
    held = [
        ids,
        tuple(ids),
        torch.arange(20),
        torch.arange(20)[None],
        torch.arange(20, dtype=torch.int32).numpy(),
        {"input_ids": ids},
        {"input_ids": torch.arange(20)},
    ]
    assert calibration_tokens(held, None, nsamples=7, seqlen=8).tokens.tolist() == [list(range(8))] * 7
    assert calibration_tokens(torch.arange(40).view(2, 20), None, nsamples=2, seqlen=20).tokens[1, 0] == 20
    plain = [words(*ids), {"text": words(*ids)}, {"text": words(*ids), "meta": 3}, {"prompt": words(*ids)}]
    assert calibration_tokens(plain, model, nsamples=4, seqlen=8).tokens.tolist() == [[BOS, *range(7)]] * 4
    turns = [{"role": "user", "content": words(*ids)}, {"role": "assistant", "content": "w5"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": words(*ids)}]}, turns[1]]
    shared = [{"from": "human", "value": words(*ids)}, {"from": "gpt", "value": "w5"}]
    chats = [{"messages": turns}, {"messages": parts}, {"conversations": shared}]
    assert calibration_tokens(chats, model, nsamples=3, seqlen=23).tokens.tolist() == [[USER, *ids, ASSISTANT, 5]] * 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"body": 1, "title": "x"}, r"row 1 .* has no text: it holds 'body', 'title'"),
        ({}, "it holds nothing"),
        ([1, -100, 3], "holds the token -100"),
        ([[1, 2], [3]], "is .*A row is a text"),
        ([1.5, 2.5], "A row is a text"),
        (3, "row 1 .* is 3"),
        (b"bytes", "A row is a text"),
        ({"messages": [{"content": "no role"}]}, "has a turn that is not one"),
        ({"messages": "hello"}, "has a turn that is not one"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has a turn that is not text"),
    ],
)
def test_a_row_that_cannot_be_read_is_an_error_and_not_left_out(model: Path, value: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        calibration_tokens([[1, 2, 3], value], model, nsamples=1, seqlen=2)


def test_a_turn_that_only_calls_a_tool_is_empty() -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": []}
    assert row_of({"messages": [turn]}, "row") == Chat((("assistant", ""),))
    assert row_of(Text("x"), "row") == Text("x") and row_of([], "row") == Ids(())


def test_padding_is_dropped(model: Path) -> None:
    padded = [*range(6), *[7] * 10]
    held = [padded, padded[::-1], [*range(8), *[9] * 8], list(range(16))]
    found = calibration_tokens(held, None, nsamples=4, seqlen=16)
    assert found.tokens.tolist() == [held[2], held[3]]
    assert "2 samples dropped, more than half of which is one token" in found.notes[1]


# Lists


def test_rows_in_memory_are_never_dropped_in_silence(model: Path) -> None:
    found = calibration_tokens([*texts(3, 40), *texts(2, 5), "w1"], model, nsamples=6, seqlen=16)
    assert firsts(found) == [0, 1, 2]  # in their order
    assert found.notes == (
        "3 calibration samples of 16 tokens, not the 6 asked for.",
        "your rows: gave 3 of 6 samples; 6 rows read; 3 shorter than 16 tokens (2 to 6) dropped.",
    )
    enough = calibration_tokens([*texts(2, 5), *texts(3, 40)], model, nsamples=3, seqlen=16)
    assert enough.notes == ("your rows: 5 rows read; 2 shorter than 16 tokens (6 to 6) dropped.",)


def test_nothing_left_is_an_error_with_the_lengths(model: Path) -> None:
    with pytest.raises(RecipeError, match=r"not one .* 2,048 tokens.*2 shorter than 2,048 tokens \(6 to 10\).*:concat"):
        calibration_tokens([*texts(1, 5), *texts(1, 9)], model)
    with pytest.raises(RecipeError, match="datasets are named in one string, with commas"):
        calibration_tokens(["NeelNanda/pile-10k", "mine.jsonl"], model)
    with pytest.raises(RecipeError, match="0 rows read"):
        calibration_tokens([], model)
    with pytest.raises(RecipeError, match="make no samples"):
        calibration_tokens([[1]], None, nsamples=0)


def test_token_ids_need_no_tokenizer_and_texts_do(tmp_path: Path) -> None:
    assert len(calibration_tokens([[1, 2, 3, 4]], tmp_path / "absent", nsamples=1, seqlen=4).tokens) == 1
    with pytest.raises(RecipeError, match="holds text, and there is no tokenizer"):
        calibration_tokens(["w1 w2"], None, nsamples=1, seqlen=2)
    with pytest.raises(SourceError, match="holds no tokenizer that can be read"):
        calibration_tokens(["w1 w2"], tmp_path, nsamples=1, seqlen=2)


def test_a_tokenizer_may_be_given_itself(model: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    held = texts(3, 40)
    assert calibration_tokens(held, tokenizer, nsamples=3, seqlen=8).tokens.equal(
        calibration_tokens(held, str(model), nsamples=3, seqlen=8).tokens
    )


# Joined rows


def test_joined_rows_lose_no_token_however_many_there_are(model: Path) -> None:
    """auto-round counts a BOS for every text it joins, so that its samples lack more and more tokens."""
    chance = random.Random(1)
    held = [words(*(chance.randrange(1000) for _ in range(chance.randrange(1, 9)))) for _ in range(500)]
    register_dataset("mine", lambda: held)
    found = calibration_tokens("mine:concat", model, nsamples=1000, seqlen=16)
    stream = [int(word[1:]) if word[0] == "w" else BREAK for text in held for word in [*text.split(), "\n\n"]]
    expected = [[BOS, *stream[start : start + 15]] for start in range(0, len(stream) - 14, 15)]
    assert found.tokens.tolist() == expected
    assert f"{len(stream) % 15} tokens at the end fill no sample" in found.notes[1]


def test_joined_token_ids_have_nothing_added() -> None:
    register_dataset("mine", lambda: ([3 * n, 3 * n + 1, 3 * n + 2] for n in range(100)))
    found = calibration_tokens("mine:concat", None, nsamples=10, seqlen=10)
    assert found.tokens.flatten().tolist() == list(range(100))


def test_joined_conversations_keep_their_own_special_tokens(model: Path) -> None:
    register_dataset("mine", lambda: [{"messages": [{"role": "user", "content": f"w{n}"}]} for n in range(10)])
    found = calibration_tokens("mine:concat", model, nsamples=10, seqlen=3)
    assert found.tokens.tolist() == [[USER, n, ASSISTANT] for n in range(10)]


# Files


def test_every_kind_of_file_holds_the_same_rows(model: Path, tmp_path: Path) -> None:
    held = texts(12, 20)
    values = [{"text": text} for text in held]
    lines = write_lines(tmp_path / "a.jsonl", values).read_bytes()
    (tmp_path / "b.json").write_text(json.dumps(values))
    (tmp_path / "c.json").write_text(json.dumps({"version": 1, "data": values}))
    (tmp_path / "d.json").write_bytes(lines)  # a row on each line, as many .json files are
    (tmp_path / "e.json").write_text(json.dumps(held))
    (tmp_path / "f.jsonl").write_text("\n\n".join(json.dumps(text) for text in held))
    (tmp_path / "g.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.CompressedOutputStream(str(tmp_path / "i.jsonl.zst"), "zstd") as file:
        file.write(lines)
    (tmp_path / "j.parquet").write_bytes(parquet([{"meta": 1, **value} for value in values]))
    (tmp_path / "k.parquet").write_bytes(parquet([{"body": text} for text in held]))
    (tmp_path / "l.csv").write_text("id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(held)))
    found = {
        path.name: calibration_tokens(str(path), model, nsamples=8, seqlen=10) for path in sorted(tmp_path.glob("?.*"))
    }
    assert len(found) == 12 and len({samples.sha256 for samples in found.values()}) == 1, found
    assert all(samples.notes == () for samples in found.values())
    assert len(set(firsts(found["a.jsonl"]))) == 8


def test_files_of_token_ids_and_conversations(model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": words(*range(9))}]
    for name, values in (("ids", [{"input_ids": list(range(9))}]), ("chat", [{"messages": turns}])):
        (tmp_path / f"{name}.parquet").write_bytes(parquet(values))
        write_lines(tmp_path / f"{name}.jsonl", values)
    for kind in ("parquet", "jsonl"):
        ids = calibration_tokens(str(tmp_path / f"ids.{kind}"), model, nsamples=1, seqlen=9)
        chat = calibration_tokens(str(tmp_path / f"chat.{kind}"), model, nsamples=1, seqlen=9)
        assert ids.tokens.tolist() == [list(range(9))] and chat.tokens.tolist() == [[USER, *range(8)]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is no JSON"),
        ("a.json", b'[{"text": "x"},\n', "cannot be read"),
        ("a.json", b"", "cannot be read"),
        ("a.jsonl", b'{"text": "\xff"}\n', "cannot be read"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "cannot be read"),
        ("a.jsonl.gz", b"plain", "cannot be read"),
        ("a.jsonl.zst", b"plain", "cannot be read"),
        ("a.parquet", b"PAR1 and no more", "cannot be read"),
        ("b.jsonl", None, "there is no such file"),
    ],
)
def test_broken_files_are_named(model: Path, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        calibration_tokens(str(tmp_path / name), model, seqlen=4)
    assert name in str(caught.value)


def test_files_of_other_kinds_and_columns(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "b.parquet").write_bytes(parquet([{"body": "x", "title": "y"}]))
    with pytest.raises(RecipeError, match="a kind that is not read"):
        calibration_tokens(str(tmp_path / "a.bin"), model)
    with pytest.raises(RecipeError, match="is a folder"):
        calibration_tokens(str(tmp_path), model)
    with pytest.raises(RecipeError, match=r"has the columns body, title\. It needs one of text"):
        calibration_tokens(str(tmp_path / "b.parquet"), model)


def test_a_text_file_is_one_text_cut_into_samples(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without :concat, and whatever the size of the pieces it is read in."""
    lines = [words(*range(start, start + 7)) for start in range(0, 994, 7)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    whole = calibration_tokens(str(tmp_path / "a.txt"), model, nsamples=66, seqlen=16)
    assert sorted(firsts(whole)) == list(range(0, 990, 15)) != firsts(whole)
    assert all(row == [BOS, *range(row[1], row[1] + 15)] for row in whole.tokens.tolist())
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", 50)
    assert len(list(read_values(tmp_path / "a.txt"))) > 20
    pieces = calibration_tokens(str(tmp_path / "a.txt"), model, nsamples=66, seqlen=16, cache=tmp_path / "other")
    assert pieces.sha256 == whole.sha256
    with pytest.raises(RecipeError, match="is one text, cut into samples: concat=False"):
        calibration_tokens(f"{tmp_path / 'a.txt'}:concat=False", model)
    with pytest.raises(RecipeError, match="is one text, cut into samples: apply_chat_template"):
        calibration_tokens(f"{tmp_path / 'a.txt'}:apply_chat_template", model)


def test_a_text_file_that_is_too_long_is_read_to_a_point(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts(50, 10)))
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(datasets, "POOL", 500)
    found = calibration_tokens(str(tmp_path / "a.txt"), model, nsamples=8, seqlen=8)
    assert len(found.tokens) == 8
    assert found.notes == (f"Only the first 585 characters of {tmp_path / 'a.txt'} were read.",)


def test_bundled_text_calibrates_the_bundled_model() -> None:
    found = calibration_tokens("bundled", bundled_model(), nsamples=128, seqlen=2048)
    assert found.tokens.shape == (29, 2048)
    assert found.notes[0] == "29 calibration samples of 2,048 tokens, not the 128 asked for."
    assert found.notes[1].startswith("bundled: gave 29 of 128 samples; the text read; ")


# Order, shares, and the seed


def test_the_seed_draws_the_rows(model: Path, tmp_path: Path) -> None:
    name = str(write_lines(tmp_path / "a.jsonl", texts(300, 12)))
    found = [calibration_tokens(name, model, nsamples=20, seqlen=8, seed=seed) for seed in (1, 2)]
    again = calibration_tokens(name, model, nsamples=20, seqlen=8, seed=1, cache=tmp_path / "other")
    assert again.sha256 == found[0].sha256 != found[1].sha256
    assert len(set(firsts(again))) == 20 and max(firsts(again)) > 200
    # The same bytes on every machine and in every release, for they are part of a run's fingerprint.
    assert firsts(again)[:4] == [89, 135, 200, 97]


def test_rows_are_shuffled_in_pools_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "POOL", 100)
    read = []

    def source() -> Iterator[Text]:
        for n in range(10**6):
            read.append(n)
            yield Text(f"{n:010}")

    found = rows.shuffled(source(), "42")
    first = [int(next(found).text) for _ in range(10)]
    assert sorted(first) == list(range(10)) != first and len(read) == 10
    assert sorted(int(next(found).text) for _ in range(10)) == list(range(10, 20))


def test_several_datasets_share_the_samples_evenly(model: Path, tmp_path: Path) -> None:
    a, b, c = (
        write_lines(tmp_path / f"{name}.jsonl", texts(count, 12, first))
        for name, count, first in (("a", 50, 0), ("b", 50, 100), ("c", 4, 200))
    )

    def counts(wish: str, nsamples: int) -> tuple[list[int], tuple[str, ...]]:
        found = calibration_tokens(wish, model, nsamples=nsamples, seqlen=8)
        held = [first // 100 for first in firsts(found)]
        assert held != sorted(held)  # mixed
        return [held.count(which) for which in range(3)], found.notes

    assert counts(f"{a},{b}", 9) == ([5, 4, 0], ())
    shares, notes = counts(f"{a},{b},{c}", 30)
    assert shares == [13, 13, 4]  # what c lacks, the others give
    assert notes == (f"{c}: gave 4 of 10 samples; 4 rows read.",)
    assert counts(f"{a}:num=3,{b}", 20) == ([3, 17, 0], ())
    assert counts(f"{a}:num=3,{b},{c}", 20)[0] == [3, 13, 4]
    shares, notes = counts(f"{a}:num=3,{b}:num=5", 20)
    assert shares == [3, 5, 0] and notes == ("8 calibration samples of 8 tokens, not the 20 asked for.",)
    with pytest.raises(RecipeError, match="ask for 23 samples, nsamples is 20"):
        calibration_tokens(f"{a}:num=20,{b}:num=3", model, nsamples=20)
    with pytest.raises(RecipeError, match="none is left for"):
        calibration_tokens(f"{a}:num=20,{b}", model, nsamples=20)


def test_own_datasets_are_read_in_order_and_only_as_far_as_needed(model: Path) -> None:
    read = []

    def endless() -> Iterator[dict[str, str]]:
        n = 0
        while True:
            read.append(n)
            yield {"text": words(*range(n, n + 9))}
            n += 1

    register_dataset("mine", endless)
    assert firsts(calibration_tokens("mine", model, nsamples=5, seqlen=8)) == list(range(5)) == read
    assert firsts(calibration_tokens("mine:num=2", model, nsamples=5, seqlen=8)) == [0, 1]
    for name, message in (("pile-10k", "comes with roundel"), ("BUNDLED", "comes with roundel"), ("a:b", "cannot be")):
        with pytest.raises(RecipeError, match=message):
            register_dataset(name, endless)
    with pytest.raises(RecipeError, match=r"There is no dataset 'mime'. Did you mean 'mine'\?"):
        calibration_tokens("mime", model)
    with pytest.raises(RecipeError, match="mine has no splits"):
        calibration_tokens("mine:split=train", model)


def test_rows_from_memory_are_asked_for_again(model: Path) -> None:
    with pytest.raises(RecipeError, match="passed from memory to the run that wrote this recipe"):
        calibration_tokens(named([[1, 2, 3]]), model)


def test_nothing_is_forked(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto-round prepares its data in a forked process, in which threads of the parent are gone."""

    def refuse(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(os, "fork", refuse)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    name = write_lines(tmp_path / "a.jsonl", texts(5, 12))
    assert len(calibration_tokens(str(name), model, nsamples=5, seqlen=8).tokens) == 5


# Conversations


def test_chat_template_of_texts(model: Path) -> None:
    register_dataset("mine", lambda: texts(2, 12))
    found = calibration_tokens("mine:apply_chat_template", model, nsamples=2, seqlen=14)
    assert found.tokens.tolist() == [[USER, *range(n, n + 12), ASSISTANT] for n in range(2)]
    assert (calibration_tokens("mine:apply_chat_template=false", model, nsamples=2, seqlen=9).tokens[:, 0] == BOS).all()


def test_a_system_prompt_belongs_to_its_own_dataset(model: Path) -> None:
    """In auto-round it stays for all datasets that follow."""
    turns = [{"role": "system", "content": "w9"}, {"role": "user", "content": words(*range(20))}]
    for name in ("one", "two"):
        register_dataset(name, lambda: [{"messages": turns}])
    found = calibration_tokens('one:num=1:system_prompt="w1, w2: w3",two:num=1', model, nsamples=2, seqlen=8)
    assert sorted(found.tokens.tolist()) == [
        [SYSTEM, 0, 0, 3, USER, 0, 1, 2],  # "w1," and "w2:" are words of their own, unknown ones
        [SYSTEM, 9, USER, 0, 1, 2, 3, 4],
    ]


def test_templates_that_are_missing_or_refuse(model: Path, bare: Path, stern: Path) -> None:
    turns = [{"role": "user", "content": words(*range(12))}]
    register_dataset("good", lambda: [{"messages": turns}])
    register_dataset(
        "mixed", lambda: [{"messages": [{"role": "system", "content": "w1"}, *turns]}, {"messages": turns}]
    )
    plain = calibration_tokens("good", bare, nsamples=1, seqlen=8)
    assert plain.tokens.tolist() == [[BOS, *range(7)]]
    assert "1 conversation taken as plain text, because the tokenizer has no chat template" in plain.notes[0]
    asked = calibration_tokens("good:apply_chat_template=False", model, nsamples=1, seqlen=8)
    assert asked.tokens.equal(plain.tokens) and asked.notes == ()
    with pytest.raises(RecipeError, match=r"tokenizer has none\. Drop apply_chat_template"):
        calibration_tokens("good:apply_chat_template", bare)
    with pytest.raises(RecipeError, match=r"takes no system prompt \(System role not supported"):
        calibration_tokens('good:system_prompt="w1"', stern)
    some = calibration_tokens("mixed", stern, nsamples=1, seqlen=8)
    assert some.tokens.tolist() == [[USER, *range(7)]]
    assert "1 row dropped that the chat template does not take (System role not supported)" in some.notes[0]
    with pytest.raises(RecipeError, match="1 row dropped that the chat template does not take"):
        register_dataset("empty", lambda: [{"messages": []}])
        calibration_tokens("empty", stern)


# The Hub


@pytest.fixture
def pile(hub: HubServer) -> str:
    """Two files of 30 texts each; 10 of each are long enough."""
    held = [texts(30, 12, first) for first in (0, 100)]
    files = {
        f"data/train-0000{n}-of-00002-abc.parquet": parquet(
            [{"text": text if i < 10 else "w1", "meta": {"set": "x"}} for i, text in enumerate(part)]
        )
        for n, part in enumerate(held)
    }
    return hub.add("datasets/NeelNanda/pile-10k", {"README.md": b"", **files})


def test_only_the_files_that_are_needed_are_fetched(hub: HubServer, pile: str, model: Path, tmp_path: Path) -> None:
    found = calibration_tokens("NeelNanda/pile-10k", model, nsamples=8, seqlen=8)
    assert len(set(firsts(found))) == 8 and max(firsts(found)) < 10 and found.notes == ()
    assert hub.sent("00000-of-00002-abc.parquet") > 0 == hub.sent("00001-of-00002-abc.parquet")
    more = calibration_tokens("pile-10k", model, nsamples=16, seqlen=8)
    assert sum(first >= 100 for first in firsts(more)) == 6
    short = calibration_tokens("Pile-10K", model, nsamples=32, seqlen=8)
    assert short.notes == (
        "20 calibration samples of 8 tokens, not the 32 asked for.",
        "NeelNanda/pile-10k: gave 20 of 32 samples; 60 rows read; 40 shorter than 8 tokens (2 to 2) dropped.",
    )


def test_offline_the_default_says_what_to_pass(
    hub: HubServer, pile: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = "NeelNanda/pile-10k cannot be fetched: offline.*does not hold it.*--dataset bundled.*texts.jsonl"
    with pytest.raises(SourceError, match=remedy):
        calibration_tokens(Recipe.dataset, model, offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match=remedy):
        calibration_tokens(Recipe.dataset, model)
    assert hub.requests == []


def test_offline_what_was_fetched_is_used(hub: HubServer, pile: str, model: Path, tmp_path: Path) -> None:
    online = calibration_tokens("pile-10k", model, nsamples=8, seqlen=8)
    asked = len(hub.requests)
    offline = calibration_tokens("pile-10k", model, nsamples=8, seqlen=8, offline=True)
    assert offline.sha256 == online.sha256
    # The second file is not there: what this gives must not be taken for the whole dataset's later.
    assert len(calibration_tokens("pile-10k", model, nsamples=16, seqlen=8, offline=True).tokens) == 10
    assert len(hub.requests) == asked
    assert len(calibration_tokens("pile-10k", model, nsamples=16, seqlen=8).tokens) == 16


def test_without_a_connection_the_cached_revision_is_used_and_noted(
    hub: HubServer, pile: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = calibration_tokens("pile-10k", model, nsamples=8, seqlen=8)
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    cut_off = calibration_tokens("pile-10k", model, nsamples=8, seqlen=8)
    assert cut_off.sha256 == online.sha256
    assert "is out of reach" in cut_off.notes[0] and pile in cut_off.notes[0]
    with pytest.raises(SourceError, match=r"ultrachat_200k cannot be fetched: no connection to .*--dataset bundled"):
        calibration_tokens("ultrachat_200k", model)


def test_a_hub_that_refuses(hub: HubServer, pile: str, model: Path) -> None:
    with pytest.raises(SourceError, match=r"mbpp cannot be fetched: the Hub answers 401.*--dataset bundled"):
        calibration_tokens("mbpp", model)
    hub.gated.add("datasets/NeelNanda/pile-10k")
    with pytest.raises(SourceError, match=r"pile-10k cannot be fetched: the Hub answers 401.*hf auth login"):
        calibration_tokens("pile-10k", model)
    with pytest.raises(RecipeError, match=r"pile-10k has no split 'trian'. Did you mean 'train'\?"):
        calibration_tokens("pile-10k:split=trian", model)


def test_a_dataset_that_changed_its_layout(hub: HubServer, model: Path) -> None:
    hub.add("datasets/NeelNanda/pile-10k", {"new/train.parquet": b""})
    with pytest.raises(SourceError, match=r"has no file data/train-\*.parquet; it holds new/train.parquet"):
        calibration_tokens("pile-10k", model)
    hub.add("datasets/NeelNanda/pile-10k", {"data/train-0.parquet": parquet([{"text": 3}])})
    with pytest.raises(SourceError, match=r"lacks a text under text; it has text"):
        calibration_tokens("pile-10k", model)
    hub.add("datasets/codeparrot/github-code-clean", {"data/train-0.parquet": parquet([{"code": "w1"}])})
    with pytest.raises(SourceError, match=r"lacks a text under code or license; it has code"):
        calibration_tokens("github-code-clean", model)


def repository(dataset: HubDataset) -> dict[str, bytes]:
    """A repository in the dataset's layout, of texts that begin with a number for each of its splits."""
    files = {}
    for number, pattern in enumerate(dataset.splits.values()):
        held = []
        for text in texts(20, 30, 100 * number):
            cells = dict.fromkeys(dataset.columns, text)
            if dataset.shape == "messages":
                turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
                cells = {dataset.columns[0]: turns}  # type: ignore[dict-item]
            held.append(cells | {column: allowed[0] for column, allowed in dataset.only.items()})
            held += [{**cells, column: "gpl"} for column in dataset.only]
        name = pattern.replace("*", "00000-of-00001")
        lines = "".join(f"{json.dumps(row)}\n" for row in held).encode()
        if name.endswith(".parquet"):
            files[name] = parquet(held)
        elif name.endswith(".csv"):
            rows = "".join(f'{n},"{row[dataset.columns[0]]}"\n' for n, row in enumerate(held))
            files[name] = f"id,{dataset.columns[0]}\n{rows}".encode()
        else:
            files[name] = pyarrow.compress(lines, "zstd", asbytes=True) if name.endswith(".zst") else lines
    return files


@pytest.mark.parametrize("dataset", HUB_DATASETS, ids=lambda dataset: dataset.repo)
def test_every_known_dataset(hub: HubServer, model: Path, dataset: HubDataset) -> None:
    hub.add(f"datasets/{dataset.repo}", repository(dataset))
    found = calibration_tokens(dataset.repo, model, nsamples=6, seqlen=16)
    assert found.tokens.shape == (6, 16) and found.notes == ()
    if dataset.shape == "text":
        assert (found.tokens[:, 0] == BOS).all()
    else:
        assert USER in found.tokens and BOS not in found.tokens
    for alias in dataset.aliases:
        assert calibration_tokens(alias, model, nsamples=6, seqlen=16).sha256 == found.sha256
    split = list(dataset.splits)[-1]
    asked = calibration_tokens(f"{dataset.repo}:split={split}", model, nsamples=6, seqlen=16)
    assert (asked.sha256 == found.sha256) == (dataset.default == (split,))


def test_ultrachat_goes_through_the_chat_template(hub: HubServer, model: Path) -> None:
    """auto-round sets the wish for it to False, whatever was asked and whatever the tokenizer."""
    dataset = next(d for d in HUB_DATASETS if d.repo == "HuggingFaceH4/ultrachat_200k")
    hub.add(f"datasets/{dataset.repo}", repository(dataset))
    for wish in ("ultrachat_200k", "ultrachat_200k:apply_chat_template"):
        found = calibration_tokens(wish, model, nsamples=6, seqlen=62)
        for row in found.tokens.tolist():
            first = row[1]
            text = list(range(first, first + 30))
            assert row == [USER, *text, ASSISTANT, *text]


def test_splits_are_read_in_turns(hub: HubServer, model: Path) -> None:
    dataset = next(d for d in HUB_DATASETS if d.repo == "HuggingFaceH4/ultrachat_200k")
    hub.add(f"datasets/{dataset.repo}", repository(dataset))
    found = calibration_tokens("ultrachat_200k:split=train_gen+test_gen", model, nsamples=12, seqlen=16)
    held = [first // 100 for first in found.tokens[:, 1].tolist()]
    assert held == [2, 3] * 6


def test_parquet_without_pyarrow(hub: HubServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet([{"text": "w1"}]))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name))
    for name in ("pile-10k", str(tmp_path / "a.parquet")):
        with pytest.raises(
            RecipeError, match=r"takes pyarrow, which is not installed. Run `pip install 'roundel\[data\]'`"
        ):
            calibration_tokens(name, model)
    assert hub.requests == []


# The grammar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pile-10k", [("pile-10k", {})]),
        (
            "a:num=3:split=x+y:concat, b:concat=False",
            [("a", {"num": 3, "split": ("x", "y"), "concat": True}), ("b", {"concat": False})],
        ),
        ("a:concat=TRUE:apply_chat_template=false", [("a", {"concat": True, "chat": False})]),
        ('a:system_prompt="x, y: z"', [("a", {"system_prompt": "x, y: z", "chat": True})]),
        (r'a:system_prompt="say \"no\""', [("a", {"system_prompt": 'say "no"', "chat": True})]),
        ("a:system_prompt=Be brief.", [("a", {"system_prompt": "Be brief.", "chat": True})]),
        ("/data/10:30/x.jsonl:num=2", [("/data/10:30/x.jsonl", {"num": 2})]),
        (r"C:\data\x.jsonl:concat", [(r"C:\data\x.jsonl", {"concat": True})]),
        ('"/data/a,b:c.txt":num=2,b', [("/data/a,b:c.txt", {"num": 2}), ("b", {})]),
    ],
)
def test_grammar(text: str, expected: list[tuple[str, dict[str, object]]]) -> None:
    from roundel.calibration.grammar import Entry, parse_datasets

    assert parse_datasets(text) == tuple(Entry(name=name, **fields) for name, fields in expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no name"),
        ("a,,b", "has no name"),
        (":num=3", "has no name"),
        ("a:nums=3", r"option 'nums=3'. Did you mean 'num'\? Options are num, split"),
        ("a:train", "option 'train'"),
        ("a:num=0", "num=0 is no number of samples"),
        ("a:num=x", "num=x is no number"),
        ("a:num", "num= is no number"),
        ("a:num=1:num=2", "num is given twice"),
        ("a:split=", "names no split"),
        ("a:split=x+", "names no split"),
        ("a:concat=maybe", "concat=maybe is neither true nor false"),
        ("a:system_prompt", "system_prompt has no text"),
        ('a:system_prompt="x:apply_chat_template=False', "a quote is not closed"),
        ('a:system_prompt="x":apply_chat_template=False', "needs the chat template"),
        ("a:num=2:x/y.jsonl", "option 'x/y.jsonl'"),
    ],
)
def test_grammar_refuses(text: str, message: str) -> None:
    from roundel.calibration.grammar import parse_datasets

    with pytest.raises(RecipeError, match=message):
        parse_datasets(text)


def test_unknown_names_name_the_nearest(model: Path) -> None:
    with pytest.raises(RecipeError, match=r"no dataset 'pile10k'. Did you mean 'pile-10k'\?.*register_dataset"):
        calibration_tokens("pile10k", model)


# The cache


@pytest.fixture
def wish(tmp_path: Path, model: Path) -> Callable[..., Samples]:
    name = str(write_lines(tmp_path / "a.jsonl", texts(9, 12)))

    def asked(dataset: str | list[str] = name, **options: Any) -> Samples:
        return calibration_tokens(dataset, model, **{"nsamples": 10, "seqlen": 8, **options})

    return asked


def cached(home: Path) -> list[Path]:
    return sorted((home / "roundel" / "tokens").iterdir())


def test_the_same_wish_is_tokenized_once(
    wish: Callable[..., Samples], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = wish()
    (entry,) = cached(home)
    monkeypatch.setattr(datasets, "load_tokenizer", lambda *_: pytest.fail("tokenized again"))
    again = wish()
    assert again.tokens.equal(first.tokens) and (again.sha256, again.notes) == (first.sha256, first.notes)
    assert len(again.notes) == 2 and cached(home) == [entry]


def test_what_tokens_depend_on_is_part_of_the_key(
    wish: Callable[..., Samples], home: Path, tmp_path: Path, model: Path
) -> None:
    wish()
    for number, options in enumerate(({"seed": 1}, {"nsamples": 9}, {"seqlen": 7}), 2):
        wish(**options)
        assert len(cached(home)) == number
    wish(f"{tmp_path / 'a.jsonl'}:concat")
    write_lines(tmp_path / "a.jsonl", texts(9, 12, 50))
    assert min(firsts(wish())) == 50 and len(cached(home)) == 6
    other = write_tokenizer(tmp_path / "other", STERN)
    calibration_tokens(str(tmp_path / "a.jsonl"), other, nsamples=10, seqlen=8)
    assert len(cached(home)) == 7
    wish(texts(3, 12))
    wish(texts(3, 12, 1))
    assert len(cached(home)) == 9
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert wish(str(tmp_path / "b.jsonl")).sha256 and len(cached(home)) == 9  # a file's name is not its content


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_entry_is_made_again(wish: Callable[..., Samples], home: Path, how: str) -> None:
    first = wish()
    (entry,) = cached(home)
    data = entry.read_bytes()
    flipped = bytearray(data)
    flipped[-3] ^= 1
    entry.write_bytes({"cut": data[:-8], "flipped": bytes(flipped), "empty": b"", "foreign": b"{}" * 99}[how])
    assert wish().tokens.equal(first.tokens)
    assert entry.read_bytes() == data and cached(home) == [entry]


def test_a_cache_that_cannot_be_written_is_noted(wish: Callable[..., Samples], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    found = wish(cache=tmp_path / "file" / "tokens")
    assert len(found.tokens) == 9 and "could not be cached" in found.notes[-1]


def test_own_datasets_are_cached_under_their_version(home: Path) -> None:
    register_dataset("mine", lambda: [[1, 2, 3]])
    calibration_tokens("mine", None, nsamples=1, seqlen=3)
    assert not (home / "roundel").exists()
    for version, first in (("1", 1), ("1", 7), ("2", 7)):
        register_dataset("mine", lambda first=first: [[first, 2, 3]], version=version)  # type: ignore[misc]
        found = calibration_tokens("mine", None, nsamples=1, seqlen=3)
        assert found.tokens[0, 0] == (1 if version == "1" else 7)
    assert len(cached(home)) == 2


def test_the_remedy_is_one_that_helps(model: Path, tmp_path: Path) -> None:
    """Joining mends neither an empty file nor one text that is too short."""
    for name, content, said in (
        ("empty.txt", "", "empty.txt: the text is empty. Pass texts that hold something."),
        ("empty.jsonl", "", "empty.jsonl: 0 rows read. Pass texts that hold something."),
        ("short.txt", "a b", "at the end fill no sample. Use a smaller seqlen, or a longer text."),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(RecipeError, match=re.escape(said)):
            calibration_tokens(str(tmp_path / name), model, nsamples=1, seqlen=64)
