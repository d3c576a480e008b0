"""The keys under `tokenizer.`: tokens, their scores and types, merges, special tokens, the chat template.

Two kinds of tokenizer: byte-level ("gpt2", from tokenizer.json) and SentencePiece ("llama", from tokenizer.model; or
from a tokenizer.json that was made of one). Source: llama.cpp, conversion/base.py (the `_set_vocab_*` functions) and
conversion/llama.py, gemma.py, phi.py. Not covered: WordPiece, Unigram and tiktoken files.

Where only tokenizer.json is there of a SentencePiece tokenizer, llama.cpp's converter gives all tokens one score, by
which its runtime cannot merge them in order; here the merges' order is the score, as in tokenizer.model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from roundel.errors import SourceError
from roundel.formats.gguf.architectures import architecture
from roundel.formats.gguf.pre_tokenizers import PROBE, pre_tokenizer_of
from roundel.formats.gguf.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_pieces
from roundel.formats.gguf.special_tokens import TokenizerFiles, special_tokens
from roundel.io.gguf import GgufValue

__all__ = ["vocabulary"]

_ADDED_SCORE, _EMPTY_SCORE = -1000.0, -10000.0  # llama.cpp's
_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)
_CODE_LLAMA = {"prefix_token_id": 32007, "suffix_token_id": 32008, "middle_token_id": 32009, "eot_token_id": 32010}
_CODE_GEMMA = {
    "prefix_token_id": 67,
    "suffix_token_id": 69,
    "middle_token_id": 68,
    "fim_sep_token_id": 70,
    "eot_token_id": 107,
}


@dataclass
class _Token:
    text: str
    score: float
    type: int


def vocabulary(
    files: TokenizerFiles, config: Mapping[str, Any], settings: Mapping[str, Any], architecture_name: str
) -> tuple[dict[str, GgufValue], tuple[str, ...]]:
    """Values by full key, and notes on what had to be guessed.

    config     config.json
    settings   `architectures.settings_of` of it

    Raises SourceError where the files of the tokenizer are missing or contradict config.json.
    """
    style = architecture(architecture_name).vocabulary
    before = files.settings.get("add_prefix_space") if style == "llama" else None
    values: dict[str, GgufValue] = {}
    notes: tuple[str, ...] = ()
    if isinstance(before, bool):
        values["tokenizer.ggml.add_space_prefix"] = GgufValue("bool", before)
    bytes_only = style == "bytes" or (style == "phi3" and files.settings.get("tokenizer_class") == "GPT2Tokenizer")
    if files.pieces and not bytes_only:
        values |= _pieces(_from_model(files, settings, everywhere=style == "phi3"), files, config)
    elif not bytes_only and _was_pieces(files.description):
        values |= _pieces(_from_description(files, settings), files, config)
    else:
        found, notes = _byte_level(files, config, settings)
        values |= found
    piecewise = values["tokenizer.ggml.model"].value == "llama"
    if architecture_name == "gemma":
        values |= {f"tokenizer.ggml.{key}": GgufValue("u32", number) for key, number in _CODE_GEMMA.items()}
    if architecture_name.startswith("gemma") and piecewise:
        values["tokenizer.ggml.add_space_prefix"] = GgufValue("bool", False)
    if style == "llama" and settings.get("vocab_size") == 32016:
        values |= {f"tokenizer.ggml.{key}": GgufValue("u32", number) for key, number in _CODE_LLAMA.items()}
    if style == "llama" and settings.get("vocab_size") == 49152:  # Granite's small models
        values["tokenizer.ggml.add_bos_token"] = GgufValue("bool", False)
    return values, notes


def _byte_level(
    files: TokenizerFiles, config: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[dict[str, GgufValue], tuple[str, ...]]:
    import tokenizers

    if not files.description:
        raise SourceError(
            "tokenizer.json is missing, from which a GGUF file takes the tokens. Fetch it, or load the tokenizer with "
            "transformers and save it anew."
        )
    model = files.description.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise SourceError(f"tokenizer.json is of the kind {kind}; GGUF files are written of BPE tokenizers only.")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(json.dumps(files.description).encode())
    except ValueError as error:  # from_str would raise nothing more telling than Exception
        raise SourceError(f"tokenizer.json cannot be read: {error}") from error
    tokens = _tokens(tokenizer, settings)
    name, note = pre_tokenizer_of(tokenizer.encode(PROBE).ids, files.description)
    values = {
        "tokenizer.ggml.model": GgufValue("str", "gpt2"),
        "tokenizer.ggml.pre": GgufValue("str", name),
        "tokenizer.ggml.tokens": GgufValue("str", tuple(token.text for token in tokens)),
        "tokenizer.ggml.token_type": GgufValue("i32", np.array([token.type for token in tokens], "<i4")),
    }
    return values | special_tokens(files, config, merges=True), (note,) if note else ()


def _tokens(tokenizer: Any, settings: Mapping[str, Any]) -> list[_Token]:
    by_number = {number: text for text, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    count = settings.get("vocab_size")
    count = len(by_number) if count is None else int(count)
    _check_count(max(by_number, default=-1) + 1, count)
    added = tokenizer.get_added_tokens_decoder()
    tokens = []
    for number in range(count):
        text, kind = by_number.get(number), NORMAL
        if text is None:
            text, kind = f"[PAD{number}]", UNUSED
        elif number in added:
            if not added[number].normalized:  # llama.cpp looks for the text as the normalizer leaves it
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
            kind = CONTROL if added[number].special or _LOOKS_SPECIAL.fullmatch(text) else USER_DEFINED
            text = text if kind == CONTROL else text.replace(_SPACE, " ")
        tokens.append(_Token(text, 0.0, kind))
    return tokens


def _check_count(needed: int, count: int) -> None:
    if needed > count:
        raise SourceError(
            f"The tokenizer has ids up to {needed - 1} and config.json a vocab_size of {count}. The files are of "
            "different models."
        )


def _was_pieces(description: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json was made of a SentencePiece model."""
    model = description.get("model")
    return isinstance(model, dict) and model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def _from_model(files: TokenizerFiles, settings: Mapping[str, Any], *, everywhere: bool) -> list[_Token]:
    """Tokens of tokenizer.model, and of the files beside it those added later.

    everywhere   whether tokenizer.json's added tokens count too, which they do for Phi-3
    """
    pieces = read_pieces(files.pieces)
    given = settings.get("vocab_size")
    count = len(pieces) if given is None else int(given)
    tokens = [_Token(f"[PAD{number}]", _EMPTY_SCORE, UNUSED) for number in range(count)]
    for number, piece in enumerate(pieces[:count]):
        kind = piece.type if piece.type in (UNKNOWN, CONTROL, UNUSED, BYTE) else NORMAL
        tokens[number] = _Token(piece.text, piece.score, kind)
    for text, number in files.added.items():
        if isinstance(number, int) and 0 <= number < count:
            tokens[number] = _Token(text, _ADDED_SCORE, USER_DEFINED)
    decoder = files.settings.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        _place(tokens, int(number), token, plain=everywhere)
    listed = files.description.get("added_tokens") if everywhere else None
    for token in listed if isinstance(listed, list) else ():
        _place(tokens, int(token["id"]), token, plain=True)
    return tokens


def _place(tokens: list[_Token], number: int, token: Mapping[str, Any], *, plain: bool) -> None:
    """plain: neither told from its looks whether it is special, nor its spaces respelled."""
    if not 0 <= number < len(tokens):
        return
    text = str(token["content"])
    special = bool(token.get("special")) or (not plain and _LOOKS_SPECIAL.fullmatch(text) is not None)
    text = text if special or plain else text.replace(_SPACE, " ")
    tokens[number] = _Token(text, _ADDED_SCORE, CONTROL if special else USER_DEFINED)


def _from_description(files: TokenizerFiles, settings: Mapping[str, Any]) -> list[_Token]:
    """Tokens of a tokenizer.json that was made of a SentencePiece model."""
    model = files.description["model"]
    vocabulary, merges = model["vocab"], model["merges"]
    listed = files.description.get("added_tokens")
    added = {int(token["id"]): token for token in (listed if isinstance(listed, list) else ())}
    count = max([*vocabulary.values(), *added], default=-1) + 1
    given = settings.get("vocab_size")
    _check_count(count, count if given is None else int(given))
    count = count if given is None else int(given)
    tokens = [_Token(f"[PAD{number}]", _EMPTY_SCORE, UNUSED) for number in range(count)]
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        parts = merge if isinstance(merge, list) else merge.split(" ")
        rank.setdefault("".join(parts), index)
    unknown = model.get("unk_token")
    for text, number in vocabulary.items():
        kind = BYTE if _BYTE_TOKEN.fullmatch(text) else UNKNOWN if text == unknown else NORMAL
        score = -float(rank.get(text, len(merges))) if kind == NORMAL else 0.0
        tokens[number] = _Token(text, score, kind)
    for number, token in added.items():
        if tokens[number].type != UNKNOWN:
            _place(tokens, number, token, plain=False)
    return tokens


def _pieces(tokens: list[_Token], files: TokenizerFiles, config: Mapping[str, Any]) -> dict[str, GgufValue]:
    return {
        "tokenizer.ggml.model": GgufValue("str", "llama"),
        "tokenizer.ggml.pre": GgufValue("str", "default"),
        "tokenizer.ggml.tokens": GgufValue("str", tuple(token.text for token in tokens)),
        "tokenizer.ggml.scores": GgufValue("f32", np.array([token.score for token in tokens], "<f4")),
        "tokenizer.ggml.token_type": GgufValue("i32", np.array([token.type for token in tokens], "<i4")),
        **special_tokens(files, config, merges=False, count=len(tokens)),
    }
