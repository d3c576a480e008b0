"""Samples kept on disk, so that the same wish is tokenized once.

One safetensors file for each wish, named by the sha256 of everything the tokens depend on. It takes its name only when
it is whole, and carries the sha256 of its tokens: an entry that does not fit is as good as none.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from roundel.calibration.tokenizer import Tokenizer

__all__ = ["cache_folder", "read_samples", "sha256_of_tokens", "tokenizer_identity", "write_samples"]

_SUFFIXES = frozenset((".bpe", ".jinja", ".json", ".model", ".py", ".spm", ".tiktoken", ".txt", ".vocab"))


def cache_folder() -> Path:
    """Where samples are kept unless said otherwise: $XDG_CACHE_HOME/roundel/tokens, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "roundel" / "tokens"


def sha256_of_tokens(tokens: Tensor) -> str:
    """Of the tokens as little-endian int64, row by row."""
    return hashlib.sha256(tokens.contiguous().numpy().astype("<i8", copy=False).tobytes()).hexdigest()


def tokenizer_identity(tokenizer: Tokenizer | Path | None) -> str | None:
    """What tokens depend on beside the text: equal identities mean equal tokens; None where that cannot be known."""
    digest = hashlib.sha256()
    for library in ("transformers", "tokenizers"):
        digest.update(importlib.metadata.version(library).encode())
    if isinstance(tokenizer, Path):
        named = [path for path in tokenizer.rglob("*") if path.suffix in _SUFFIXES and path.is_file()]
        for path in sorted(named):
            if not path.name.endswith(".index.json"):
                digest.update(f"\n{path.relative_to(tokenizer).as_posix()} ".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    elif tokenizer is not None:
        from transformers import PreTrainedTokenizerFast

        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            return None
        state = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map
        digest.update(repr(state).encode())
    return digest.hexdigest()


def read_samples(path: Path, samples: int, seqlen: int) -> tuple[Tensor, tuple[str, ...]] | None:
    """Tokens [at most samples, seqlen] and notes from a cached file; None when it is missing, cut, or altered."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tokens, stated = file.get_tensor("tokens"), json.loads(file.metadata()["roundel"])
        fits = tokens.dtype == torch.int64 and tokens.ndim == 2 and tokens.shape[1] == seqlen
        if fits and 0 < len(tokens) <= samples and sha256_of_tokens(tokens) == stated["sha256"]:
            return tokens, tuple(str(note) for note in stated["notes"])
    except (OSError, SafetensorError, LookupError, TypeError, ValueError):
        pass  # as good as none: it is made again, and replaced
    return None


def write_samples(path: Path, tokens: Tensor, notes: tuple[str, ...]) -> None:
    """Keep samples, whole or not at all. Raises OSError when the disk is full or the folder may not be written."""
    from safetensors.torch import save

    stated = {"sha256": sha256_of_tokens(tokens), "notes": notes}
    data = save({"tokens": tokens}, {"roundel": json.dumps(stated)})  # one entry: several have no fixed order
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
