"""Which of llama.cpp's ways to split text into words a byte-level tokenizer has.

llama.cpp knows them by name. Its converter finds the name by the tokens of one text that every splitting takes apart
differently: sha256 of their ids, of which the first 16 digits stand here (llama.cpp, convert_hf_to_gguf_update.py and
conversion/base.py, `get_vocab_base_pre`). A vocabulary of its own gives other ids; then the pattern that tokenizer.json
splits by tells, if it is one of those below.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["PATTERNS", "PROBE", "pre_tokenizer_of"]

PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------"
    "======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M "
    "not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
FALLBACK = "gpt-2"
KNOWN: dict[str, str] = {
    "a.x-4.0": "b0a6b1c0bd5998eb",
    "codeshell": "7b3e7548e4308f52",
    "dbrx": "a8594e3edff7c29c",
    "deepseek-coder": "347715f544604f91",
    "deepseek-llm": "049ecf7629871e30",
    "deepseek-r1-qwen": "b3f499bb4255f8ca",
    "deepseek-v3": "877081d19cf6996e",
    "exaone": "4e2b24cc4770243d",
    "exaone4": "2085e1638f6c377a",
    "f2llmv2": "862f827721df9560",
    "falcon3": "9d032fcbd5501f4a",
    "gemma4": "846deafc5b0fa786",
    "gigachat": "ad851be1dba641f2",
    "gpt-2": "0fe1cf6eda062318 3ce83efda5659b07",
    "gpt-4o": "ccc2ef013c104be7",
    "hunyuan-dense": "bba3b3366b646dbd",
    "jais-2": "bc5108ee1eb6a3d6",
    "joyai-llm": "b4b8ca1f9769494f",
    "kanana2": "e4d54df1ebc1f2b9",
    "kimi-k2": "81212dc7cdb7e0c1",
    "kormo": "4a2e2abae11ca2b8",
    "lfm2": "9e454714343b69b9 169bf0296a13c4d9",
    "llama-bpe": "0ef9807a4087ebef",
    "llama4": "d353350c764d8c3b",
    "megrez": "d4c8f286ea6b520b",
    "mellum": "a1e163ecab2e718a",
    "mellum2": "9dcf830ee9990cdb",
    "midm-2.0": "f6791d196f87ce6b",
    "minerva-7b": "1431a23e583c9743",
    "minicpm5": "36f3066e97b7f399",
    "olmo": "b6dc8df998e1cfbd",
    "phi-2": "fcace8b9cac38ce8",
    "pixtral": "0e9433cbbb161f89",
    "poro-chat": "c7ea5862a53e4272",
    "qwen2": "d4540891389ea895 e636dc30a262dcc0",
    "qwen35": "1444df51289cfa80 d30d75d9059f1aa2",
    "refact": "6221ad2852e85ce9",
    "seed-coder": "d5f1dd6f980fec56",
    "smaug-bpe": "c136ed14d01c2745",
    "smollm": "855059429035d75a",
    "solar-open": "16389f0a1f51ee53",
    "starcoder": "35d91631860c815f",
    "superbpe": "7dec86086fcc38b6",
    "talkie": "f728162c1315c26e",
    "tekken": "63b97e4253352e6f",
    "trillion": "1994ffd01900cfb3",
    "ufakzeka": "653660222fb704f6",
    "viking": "7fc505bd3104ca10",
    "youtu": "9d70134b369a70e5",
}  # fmt: skip
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS: dict[str, str] = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}
_BY_DIGEST = {digest: name for name, digests in KNOWN.items() for digest in digests.split()}


def pre_tokenizer_of(ids: Sequence[int], description: Mapping[str, Any]) -> tuple[str, str | None]:
    """The name, and a note where it is a guess.

    ids           tokens of PROBE, with the special tokens that the tokenizer puts around a text
    description   what tokenizer.json says
    """
    digest = hashlib.sha256(str(list(ids)).encode()).hexdigest()
    found = _BY_DIGEST.get(digest[:16]) or _by_pattern(description)
    if found is not None:
        return found, None
    return FALLBACK, (
        f"llama.cpp has no name for how this tokenizer splits text (its sign would be {digest}); the file says "
        f"{FALLBACK!r}, and text may be split into other tokens than by the original tokenizer."
    )


def _by_pattern(description: Mapping[str, Any]) -> str | None:
    steps = description.get("pre_tokenizer") or {}
    listed = steps.get("pretokenizers", [steps]) if isinstance(steps, dict) else []
    steps = [step for step in listed if isinstance(step, dict)]
    kinds = [step.get("type") for step in steps]
    if description.get("normalizer") is None and kinds == ["ByteLevel"] and not steps[0].get("add_prefix_space"):
        return "gpt-2" if steps[0].get("use_regex", True) else None
    if kinds == ["Split", "ByteLevel"] and steps[0].get("behavior") == "Isolated":
        pattern = steps[0].get("pattern")
        return PATTERNS.get(pattern.get("Regex", "")) if isinstance(pattern, dict) else None
    return None
