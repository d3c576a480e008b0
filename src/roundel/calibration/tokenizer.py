"""A checkpoint's tokenizer, as transformers reads it: of a folder, of a GGUF file, of a model on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from roundel.calibration.quiet import quiet
from roundel.errors import SourceError
from roundel.formats.gguf.source import tokenizer_home

__all__ = ["Tokenizer", "load_tokenizer"]

DAMAGED = (AttributeError, ImportError, KeyError, OSError, RecursionError, TypeError, ValueError)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]: ...
    def decode(self, token_ids: list[int]) -> str: ...
    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


def load_tokenizer(model: str | Path, trust_remote_code: bool = False, *, fetch: bool = False) -> Tokenizer:
    """The tokenizer of a model's folder or GGUF file.

    trust_remote_code   whether code in the folder may run
    fetch               whether `model` may be the id of a model on the Hub
    Raises SourceError when there is none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        with quiet(), tokenizer_home(model) as home:
            loaded: Tokenizer = AutoTokenizer.from_pretrained(
                home, local_files_only=not fetch, trust_remote_code=trust_remote_code
            )
    except BaseException as error:
        if type(error) is not Exception and not isinstance(error, DAMAGED):  # tokenizers' own errors have no class
            raise
        code = "" if trust_remote_code else " If it needs code of its own that you trust, pass --trust-remote-code."
        raise SourceError(
            f"{model} holds no tokenizer that can be read ({type(error).__name__}: {error}). Copy the model's "
            f"tokenizer files there.{code}"
        ) from error
    return loaded
