"""A tokenizer's files made from a GGUF file's metadata: the inverse of `vocabulary` and `special_tokens`.

Of SentencePiece tokenizers ("llama") the merges follow from the tokens' scores: the better a token's score, the earlier
two neighbours become it. Of byte-level ones ("gpt2") the merges stand in the file, and how a text is split into words
is known by a name; those of SPLITS are known here (llama.cpp, src/llama-vocab.cpp). Not read: WordPiece, Unigram.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from roundel.errors import SourceError
from roundel.formats.gguf.pre_tokenizers import PATTERNS
from roundel.formats.gguf.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from roundel.io.gguf import GgufValue

__all__ = ["SPLITS", "tokenizer_files"]

_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _ENDING = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_BEHIND = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r"!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~"
# Cased letters that DeepSeek's first tokenizer does not take for such: Georgian, small Armenian, mathematical ones ...
_NO_LETTERS = (
    "\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c88\u2d00-\u2d2d\ua790-\ua7fa\uab30-\uab68"
    "\U00010570-\U000105bc\U00016e40-\U00016e7f\U0001d400-\U0001d7cb\U0001df00-\U0001df1e"
)
SPLITS: dict[str, tuple[str, ...]] = {  # one after the other; none: as GPT-2 does
    **{name: (pattern,) for pattern, name in PATTERNS.items()},
    "gpt-2": (),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[[\p{{Lu}}\p{{Ll}}\p{{Lt}}]&&[^{_NO_LETTERS}]]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}+",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        rf"[{_PUNCTUATION}][A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "gpt-4o": (rf"{_BEFORE}{_UPPER}*{_LOWER}+{_ENDING}|{_BEFORE}{_UPPER}+{_LOWER}*{_ENDING}|\p{{N}}{{1,3}}{_BEHIND}",),
    "tekken": (rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}{_BEHIND}",),
}
_ALSO = {"deepseek-r1-qwen": "qwen2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "default": "gpt-2"}
_WHOLE_WORDS = ("llama-bpe", "tekken")  # a word that is a token is not built by merges; a text begins with BOS
_COMPOSED = ("qwen2",)  # texts are brought to Unicode's form NFC
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
_ENDS = ("eos", "eot", "eom")
_SPACE = "▁"
_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class _Tokens:
    texts: tuple[str, ...]
    types: Sequence[int]
    scores: Sequence[float]


def tokenizer_files(metadata: Mapping[str, GgufValue]) -> dict[str, str]:
    """Name -> text: tokenizer.json, tokenizer_config.json, generation_config.json, and a chat template.

    Raises SourceError where the metadata hold no tokenizer, or one that is not read.
    """
    kind, tokens = _text(metadata, "model"), _tokens(metadata)
    if kind == "llama":
        parts = _of_pieces(metadata, tokens)
    elif kind == "gpt2":
        parts = _byte_level(metadata, tokens)
    else:
        raise _refused(f"a tokenizer of the kind {kind!r}; read are 'llama' and 'gpt2'")
    ids = {role: number for role, key in _ROLES.items() if (number := _id(metadata, key, tokens)) is not None}
    before = parts.pop("begins")
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(n, t, k) for n, (t, k) in enumerate(zip(tokens.texts, tokens.types, strict=True))
                         if k in (CONTROL, USER_DEFINED, UNKNOWN)],
        "post_processor": _processor(metadata, tokens, ids, before=before),
        **parts,
    }  # fmt: skip
    settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {f"{role}_token": tokens.texts[number] for role, number in ids.items()}
    template = metadata.get(_TEMPLATE)
    if template is not None and isinstance(template.value, str):
        settings["chat_template"] = template.value
    ends = sorted({number for role in _ENDS if (number := _id(metadata, role, tokens)) is not None})
    generation = {"bos_token_id": ids.get("bos"), "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    return {
        "tokenizer.json": json.dumps(description, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False),
        "generation_config.json": json.dumps({k: v for k, v in generation.items() if v is not None}, indent=2),
    }


def _of_pieces(metadata: Mapping[str, GgufValue], tokens: _Tokens) -> dict[str, Any]:
    prefix = _flag(metadata, "add_space_prefix", default=True)
    steps: list[dict[str, object]] = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    back: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}
    ]  # fmt: skip
    if prefix:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next((text for text, kind in zip(tokens.texts, tokens.types, strict=True) if kind == UNKNOWN), None)
    has_bytes = BYTE in tokens.types
    return {
        "begins": True,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _model(tokens, _merges_by_score(tokens), unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes),
    }


def _byte_level(metadata: Mapping[str, GgufValue], tokens: _Tokens) -> dict[str, Any]:
    named = _text(metadata, "pre")
    name = _ALSO.get(named, named)
    if name not in SPLITS:
        raise _refused(f"a tokenizer that splits words as {named!r} does; known are {', '.join((*SPLITS, *_ALSO))}")
    listed = metadata.get("tokenizer.ggml.merges")
    merges = listed.value if listed is not None else ()
    if not isinstance(merges, tuple) or any(merge.count(" ") != 1 for merge in merges):
        raise _refused("merges that are no pairs")
    bytes_: dict[str, object] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    splitting: dict[str, object] = bytes_
    if SPLITS[name]:
        steps: list[dict[str, object]] = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in SPLITS[name]
        ]
        splitting = {"type": "Sequence", "pretokenizers": [*steps, {**bytes_, "use_regex": False}]}
    known = set(tokens.texts)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    sound = [[left, right] for left, right in pairs if {left, right, left + right} <= known]
    return {
        "begins": name in _WHOLE_WORDS,
        "normalizer": {"type": "NFC"} if name in _COMPOSED else None,
        "pre_tokenizer": splitting,
        "decoder": bytes_,
        "model": _model(tokens, sound, ignore_merges=name in _WHOLE_WORDS),
    }


def _model(tokens: _Tokens, merges: list[list[str]], **options: object) -> dict[str, object]:
    vocabulary: dict[str, int] = {}
    for number, text in enumerate(tokens.texts):
        vocabulary.setdefault(text, number)
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **plain, **flags, **options, "vocab": vocabulary, "merges": merges}


def _merges_by_score(tokens: _Tokens) -> list[list[str]]:
    """Every way to put a token together from two, the best token first."""
    known = set(tokens.texts)
    kinds = np.asarray(tokens.types)
    numbers = np.flatnonzero(kinds == NORMAL)
    scores = np.asarray(tokens.scores, np.float32)[numbers]
    merges = []
    for number in numbers[np.argsort(-scores, kind="stable")]:
        text = tokens.texts[number]
        for at in range(1, len(text)):
            if text[:at] in known and text[at:] in known:
                merges.append([text[:at], text[at:]])
    return merges


def _added(number: int, text: str, kind: int) -> dict[str, object]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **plain, "special": kind != USER_DEFINED}


def _processor(
    metadata: Mapping[str, GgufValue], tokens: _Tokens, ids: Mapping[str, int], *, before: bool
) -> dict[str, object] | None:
    """What puts BOS and EOS around a text."""
    first = "bos" in ids and _flag(metadata, "add_bos_token", default=before)
    last = "eos" in ids and _flag(metadata, "add_eos_token", default=False)
    if not first and not last:
        return None

    def special(role: str, kind: int) -> list[dict[str, object]]:
        return [{"SpecialToken": {"id": tokens.texts[ids[role]], "type_id": kind}}]

    def around(name: str, kind: int) -> list[dict[str, object]]:
        text: dict[str, object] = {"Sequence": {"id": name, "type_id": kind}}
        return [*(special("bos", kind) if first else []), text, *(special("eos", kind) if last else [])]

    used = [role for role, wanted in (("bos", first), ("eos", last)) if wanted]
    texts = {tokens.texts[ids[role]]: ids[role] for role in used}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in texts.items()},
    }


def _tokens(metadata: Mapping[str, GgufValue]) -> _Tokens:
    texts = metadata.get("tokenizer.ggml.tokens")
    if texts is None or not isinstance(texts.value, tuple) or not texts.value:
        raise _refused("no tokens")
    try:
        "".join(texts.value).encode()
    except UnicodeEncodeError as error:
        raise _refused("tokens that are no UTF-8") from error
    count = len(texts.value)
    kinds, scores = (
        _numbers(metadata, key, count, default) for key, default in (("token_type", NORMAL), ("scores", 0))
    )
    return _Tokens(texts.value, [int(kind) for kind in kinds], scores)


def _numbers(metadata: Mapping[str, GgufValue], key: str, count: int, default: int) -> list[float]:
    found = metadata.get(f"tokenizer.ggml.{key}")
    if found is None:
        return [default] * count
    if not isinstance(found.value, np.ndarray) or len(found.value) != count or not np.isfinite(found.value).all():
        raise _refused(f"{key} that are not one number for each token")
    values: list[float] = found.value.tolist()
    return values


def _id(metadata: Mapping[str, GgufValue], role: str, tokens: _Tokens) -> int | None:
    found = metadata.get(f"tokenizer.ggml.{role}_token_id")
    value = found.value if found is not None else None
    return value if type(value) is int and 0 <= value < len(tokens.texts) else None


def _text(metadata: Mapping[str, GgufValue], key: str) -> str:
    found = metadata.get(f"tokenizer.ggml.{key}")
    return found.value if found is not None and isinstance(found.value, str) else ""


def _flag(metadata: Mapping[str, GgufValue], key: str, *, default: bool) -> bool:
    found = metadata.get(f"tokenizer.ggml.{key}")
    return found.value if found is not None and isinstance(found.value, bool) else default


def _refused(what: str) -> SourceError:
    return SourceError(f"The GGUF file holds {what}. Put the original model's tokenizer.json beside it.")
