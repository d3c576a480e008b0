"""SentencePiece tokenizers made from the tokens and scores of a GGUF file, against the algorithm itself."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import tokenizers

from roundel.errors import SourceError
from roundel.formats.gguf.tokenizer import tokenizer_files
from roundel.io.gguf import GgufValue


def pieces() -> dict[str, GgufValue]:
    """Letters, some of their pairs and longer pieces with scores of their own, the bytes, and special tokens."""
    chance = random.Random(0)
    letters = [*"▁abcdefgh"]
    longer = ["".join(pair) for pair in itertools.product(letters, letters) if chance.random() < 0.5]
    longer += ["".join(chance.choices(letters, k=3)) for _ in range(60)] + ["▁abc", "defg", "▁▁▁▁"]
    plain = [*letters, *dict.fromkeys(each for each in longer if each not in letters)]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *plain, "<turn>"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(plain), 4]
    scores = [0.0] * 259 + [-float(i) for i in chance.sample(range(1000), len(plain))] + [-1000.0]
    return {
        "tokenizer.ggml.model": GgufValue("str", "llama"),
        "tokenizer.ggml.tokens": GgufValue("str", tuple(texts)),
        "tokenizer.ggml.scores": GgufValue("f32", np.array(scores, "<f4")),
        "tokenizer.ggml.token_type": GgufValue("i32", np.array(kinds, "<i4")),
        "tokenizer.ggml.bos_token_id": GgufValue("u32", 1),
        "tokenizer.ggml.eos_token_id": GgufValue("u32", 2),
    }


def slowly(text: str, metadata: dict[str, GgufValue]) -> list[int]:
    """The two neighbours that make the token of the best score become it, as long as there are such."""
    texts: Any = metadata["tokenizer.ggml.tokens"].value
    scores: Any = metadata["tokenizer.ggml.scores"].value
    numbers = {each: number for number, each in enumerate(texts)}
    parts = [*("▁" + text.replace(" ", "▁"))]
    while True:
        pairs = [
            (-scores[numbers[a + b]], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in numbers
        ]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found = []
    for part in parts:
        found += [numbers[part]] if part in numbers else [3 + byte for byte in part.encode()]
    return found


def test_texts_become_the_same_tokens() -> None:
    metadata, chance = pieces(), random.Random(1)
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_files(metadata)["tokenizer.json"])
    for _ in range(300):
        text = "".join(chance.choices("abcdefgh  é", k=chance.randrange(1, 25)))
        ids = tokenizer.encode(text).ids
        assert ids[0] == 1 and ids[1:] == slowly(text, metadata), text
        assert tokenizer.decode(ids) == text
    special = tokenizer.encode("ab<turn>cd").ids
    texts: Any = metadata["tokenizer.ggml.tokens"].value
    assert len(texts) - 1 in special


def test_without_a_space_before_the_text() -> None:
    metadata = {**pieces(), "tokenizer.ggml.add_space_prefix": GgufValue("bool", False)}
    metadata["tokenizer.ggml.add_bos_token"] = GgufValue("bool", False)
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_files(metadata)["tokenizer.json"])
    plain = tokenizers.Tokenizer.from_str(tokenizer_files(pieces())["tokenizer.json"])
    assert tokenizer.decode(tokenizer.encode(" ab c").ids) == " ab c"
    assert tokenizer.encode(" ab c").ids == plain.encode("ab c").ids[1:]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": None}, "of the kind ''; read are 'llama' and 'gpt2'"),
        ({"model": GgufValue("str", "bert")}, "of the kind 'bert'"),
        ({"tokens": None}, "holds no tokens"),
        ({"tokens": GgufValue("str", ("a\udcff",))}, "tokens that are no UTF-8"),
        ({"scores": GgufValue("f32", np.zeros(3, "<f4"))}, "scores that are not one number for each token"),
        ({"token_type": GgufValue("str", "x")}, "token_type that are not one number for each token"),
    ],
)
def test_what_is_no_tokenizer_is_refused(change: dict[str, GgufValue | None], why: str) -> None:
    metadata = pieces() | {f"tokenizer.ggml.{key}": value for key, value in change.items() if value is not None}
    for key, value in change.items():
        if value is None:
            metadata.pop(f"tokenizer.ggml.{key}")
    with pytest.raises(SourceError, match=why):
        tokenizer_files(metadata)
