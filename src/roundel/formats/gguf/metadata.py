"""Everything a GGUF file says besides its tensors, in the order and types of llama.cpp's converter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from roundel.errors import SourceError
from roundel.formats.gguf.architectures import architecture_of, settings_of
from roundel.formats.gguf.general import general
from roundel.formats.gguf.hyperparameters import hyperparameters
from roundel.formats.gguf.special_tokens import TokenizerFiles
from roundel.formats.gguf.vocabulary import vocabulary
from roundel.io.gguf import GgufTensor, GgufValue

__all__ = ["COMPANIONS", "Metadata", "metadata", "read_companions"]

COMPANIONS = (  # files beside the weights that a GGUF file takes something from
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "README.md",
)
QUANTIZATION_VERSION = 2  # of ggml's block types


@dataclass(frozen=True)
class Metadata:
    """Values by key, in the order they are written, and notes on what had to be guessed."""

    values: Mapping[str, GgufValue]
    notes: tuple[str, ...] = ()


def metadata(
    config: Mapping[str, Any], folder: Path, file_type: int, name: str, tensors: Sequence[GgufTensor]
) -> Metadata:
    """All values of a file.

    config      config.json
    folder      where COMPANIONS lie, those that there are
    file_type   the number of the mixture: `mixtures.FILE_TYPES`
    name        of the model: its id on the Hub, or its folder's name
    tensors     of the file

    Raises SourceError for an architecture that is not known and for files that are damaged or missing.
    """
    known = architecture_of(config)
    settings = settings_of(config)
    files, generation, card = read_companions(folder)
    values = {"general.architecture": GgufValue("str", known)}
    values |= general(name, config, generation, card, tensors)
    values |= hyperparameters(settings, known, file_type)
    values["general.quantization_version"] = GgufValue("u32", QUANTIZATION_VERSION)
    found, notes = vocabulary(files, config, settings, known)
    return Metadata(values | found, notes)


def read_companions(folder: Path) -> tuple[TokenizerFiles, Mapping[str, Any], Mapping[str, Any]]:
    """The tokenizer's files, generation_config.json, and the front matter of README.md; empty where one is missing."""
    pieces, jinja, readme = (folder / name for name in ("tokenizer.model", "chat_template.jinja", "README.md"))
    template = _text(jinja) if jinja.is_file() else _object(folder / "chat_template.json").get("chat_template")
    further = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    files = TokenizerFiles(
        description=_object(folder / "tokenizer.json"),
        settings=_object(folder / "tokenizer_config.json"),
        pieces=pieces.read_bytes() if pieces.is_file() else b"",
        added=_object(folder / "added_tokens.json"),
        template=template,
        templates={path.stem: _text(path) for path in further} if jinja.is_file() else {},
    )
    return files, _object(folder / "generation_config.json"), _front_matter(_text(readme)) if readme.is_file() else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path.name} cannot be read: {error}. Fetch the file again.") from error


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{path.name} is no JSON: {error}. Fetch the file again.") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path.name} holds no JSON object. Fetch the file again.")
    return found


def _front_matter(text: str) -> Mapping[str, Any]:
    """What stands between the two lines of dashes that a model card begins with; nothing where that is no YAML."""
    lines = text.splitlines()
    if not lines or lines[0] != "---":
        return {}
    end = next((index for index, line in enumerate(lines[1:], 1) if line == "---"), len(lines))
    # "no" is Norwegian here, not false
    matter = "".join(f"{line}\n" for line in lines[1:end]).replace("- no\n", '- "no"\n').replace("\t", "  ")
    try:
        found = yaml.safe_load(matter)
    except (yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
