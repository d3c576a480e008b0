"""The keys under `general.`: what a model is called, made of, derived from and allowed, and how it is best sampled.

Read from the name of the model, config.json, generation_config.json and the front matter of its README.md. Source of
the keys and of the reading of names: llama.cpp, gguf-py/gguf/metadata.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roundel.io.gguf import GgufTensor, GgufValue

__all__ = ["ModelName", "general", "read_name", "size_label"]

_SAMPLING = (
    ("sequence", "str", ("sequence",)),
    ("top_k", "i32", ("top_k",)),
    ("top_p", "f32", ("top_p",)),
    ("min_p", "f32", ("min_p",)),
    ("xtc_probability", "f32", ("xtc_probability",)),
    ("xtc_threshold", "f32", ("xtc_threshold",)),
    ("temp", "f32", ("temperature",)),
    ("penalty_last_n", "i32", ("penalty_last_n",)),
    ("penalty_repeat", "f32", ("penalty_repeat", "repetition_penalty")),
    ("mirostat", "i32", ("mirostat",)),
    ("mirostat_tau", "f32", ("mirostat_tau",)),
    ("mirostat_eta", "f32", ("mirostat_eta",)),
)
_CARD = (  # key -> front matter that says it
    ("name", ("name", "model_name")),
    ("author", ("author", "model_author", "model_creator")),
    ("version", ("version", "model_version")),
    ("organization", ("organization", "model_organization")),
    ("finetune", ("finetune", "model_finetune")),
    ("basename", ("basename", "model_basename", "model_type")),
    ("description", ("description", "model_description")),
    ("quantized_by", ()),
    ("size_label", ("size_label", "model_size_label")),
    ("license", ("license",)),
    ("license.name", ("license_name",)),
    ("license.link", ("license_link",)),
    ("source.url", ("url", "model_url")),
    ("source.doi", ("doi", "model_doi")),
    ("source.uuid", ("uuid", "model_uuid")),
    ("source.repo_url", ("repo_url", "model_repo_url")),
)
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"))
_VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
_TYPE = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
_SIZE = re.compile(r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)", re.IGNORECASE)
_FINETUNE = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ModelName:
    """What a name such as "Qwen/Qwen2.5-7B-Instruct" says. Parts that it does not say are None."""

    full: str
    organization: str | None = None
    basename: str | None = None
    finetune: str | None = None
    version: str | None = None
    size_label: str | None = None


def general(
    name: str,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    card: Mapping[str, Any],
    tensors: Sequence[GgufTensor],
) -> dict[str, GgufValue]:
    """Values by full key, in llama.cpp's order.

    name         of the model: its id on the Hub, or its folder's name
    config       config.json
    generation   generation_config.json
    card         the front matter of README.md
    tensors      of the file, for the number of parameters
    """
    found = {"general.type": GgufValue("str", "model")}
    for key, kind, names in _SAMPLING:
        value = next((generation[each] for each in names if each in generation), None)
        if _fits(kind, value):
            found[f"general.sampling.{key}"] = GgufValue(kind, value)  # type: ignore[arg-type]
    parameters, per_expert_size = _counted(tensors)
    said = dict(_from_card(card))
    path = config.get("_name_or_path")
    for each in (path if isinstance(path, str) and path.count("/") <= 1 else None, name):
        if each:
            for key, value in _from_name(read_name(each, parameters)):
                said.setdefault(key, value)
    said.setdefault("name", name)
    said.setdefault("size_label", per_expert_size)
    for key, _ in _CARD:
        if key in said:
            found[f"general.{key}"] = GgufValue("str", said[key])
    found |= _origins("base_model", ("base_model", "base_models", "base_model_sources"), card, parameters)
    found |= _origins("dataset", ("datasets", "dataset", "dataset_sources"), card, parameters)
    for key, names in (("tags", ("tags", "pipeline_tag")), ("languages", ("languages", "language"))):
        texts = tuple(text for each in names for text in _texts(card.get(each)))
        if texts:
            found[f"general.{key}"] = GgufValue("str", texts)
    return found


def read_name(name: str, parameters: int = 0) -> ModelName:
    """Takes a name apart.

    parameters   of the model; a size in the name that is far from it is none (it is a context length, say)
    """
    if " " in name:
        return ModelName(full=name)
    organization, slash, full = name.partition("/")
    if not slash:
        organization, full = "", name
    parts = [part for part in full.split("-") if part]
    kinds = []
    for index, part in enumerate(parts):
        parts[index], kind = _kind_of(part, index, parameters)
        kinds.append({kind} if kind else set())
    sizes = [index for index, kind in enumerate(kinds) if "size" in kind]
    if any(character.isdecimal() for index in sizes for character in parts[index]):
        for index in sizes:  # "small" says nothing beside a number
            if parts[index].isalpha():
                kinds[index].clear()
    at_start = True
    for part, kind in zip(parts, kinds, strict=True):
        if at_start and ((not kind and part[0].isalpha()) or "version" in kind):
            kind.add("base")
        else:
            at_start = False
            if not kind:
                kind.add("finetune")
    for kind in reversed(kinds):  # a version that ends the base name is not part of it
        if "base" not in kind or len(kind) == 1:
            break
        kind.remove("base")
    joined = {
        wanted: "-".join(dict.fromkeys(chosen) if wanted == "size" else chosen) or None
        for wanted in ("base", "size", "finetune", "version")
        for chosen in (
            [
                part
                for part, kind in zip(parts, kinds, strict=True)
                if wanted in kind and not (wanted == "version" and "base" in kind)
            ],
        )
    }
    telling = any(joined[each] for each in ("size", "finetune", "version"))
    return ModelName(
        full=full,
        organization=organization if organization and not organization.startswith(".") else None,
        basename=joined["base"] if telling else None,
        finetune=joined["finetune"],
        version=joined["version"],
        size_label=joined["size"],
    )


def size_label(parameters: int) -> str:
    """ "7B", "1.5B": two digits at least."""
    unit, suffix = next(((unit, suffix) for unit, suffix in _SUFFIXES if parameters > unit), (1e3, "K"))
    scaled = parameters / unit
    decimals = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{decimals}f}{suffix}"


def _kind_of(part: str, index: int, parameters: int) -> tuple[str, str | None]:
    """A part of a name, normalized, and what it says."""
    if _VERSION.fullmatch(part):
        return part, "version"
    if _TYPE.fullmatch(part):
        return part.upper(), "type"
    if index and _SIZE.fullmatch(part):
        part = part.replace("_", ".")
        if part[-1].isdecimal():  # "7b1" is 7.1b
            part = f"{part[:-2]}.{part[-1]}{part[-2]}"
        if len(part) > 1 and part[-2].isdecimal() and part[-1] in "kmbt":
            part = part[:-1] + part[-1].upper()
        number = re.fullmatch(r"\d+(\.\d+)?", part[:-1])
        said = float(part[:-1]) * 1000 ** " KMBT".find(part[-1]) if number else None
        if parameters and said is not None and abs(said - parameters) > 7 * parameters // 8:
            return part[:-1] + part[-1].lower(), "finetune"
        return part, "size"
    return part, "finetune" if index and _FINETUNE.fullmatch(part) else None


def _title(text: str) -> str:
    words = text.strip().replace("-", " ").split()
    return " ".join(w.title() if w.islower() and not re.match(r"(v\d+(?:\.\d+)*|\d.*)$", w) else w for w in words)


def _from_name(name: ModelName) -> Iterator[tuple[str, str]]:
    yield "name", _title(name.full)
    for key, value in (
        ("organization", None if name.organization is None else _title(name.organization)),
        ("basename", name.basename),
        ("finetune", name.finetune),
        ("version", name.version),
        ("size_label", name.size_label),
    ):
        if value is not None:
            yield key, value


def _from_card(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, names in _CARD:
        value = next((card[each] for each in names if card.get(each) is not None), None)
        if value is not None:
            yield key, ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _origins(key: str, names: Sequence[str], card: Mapping[str, Any], parameters: int) -> dict[str, GgufValue]:
    """What the model was made from: models or data."""
    texts = _texts(next((card[each] for each in names if each in card), None))
    if not texts:
        return {}
    found = {f"general.{key}.count": GgufValue("u32", len(texts))}
    for number, text in enumerate(texts):
        address = text if text.startswith(("http://", "https://", "ssh://")) else None
        hub = re.fullmatch(r"https?://huggingface.co/([^/]+/[^/]+)", text) if address else None
        said: dict[str, str] = {}
        if not address or hub:
            name = read_name(hub[1] if hub else text, parameters)
            parts = dict(_from_name(name))
            said = {each: parts[each] for each in ("name", "version", "organization") if each in parts}
            if not address and name.organization is not None:
                address = f"https://huggingface.co/{name.organization}/{name.full}"
        if address:
            said["repo_url"] = address
        found |= {f"general.{key}.{number}.{each}": GgufValue("str", value) for each, value in said.items()}
    return found


def _counted(tensors: Sequence[GgufTensor]) -> tuple[int, str]:
    """Parameters in all, and the label of the size: of a mixture of experts "8x7B", with one expert counted."""
    total, shared, of_one, counts = 0, 0, 0, []
    for tensor in tensors:
        size = math.prod(tensor.shape)
        total += size
        if "_exps." in tensor.name and len(tensor.shape) >= 3:
            experts = tensor.shape[-3]
            of_one += size // experts
            counts.append(experts)
        else:
            shared += size
    if counts:
        return total, f"{sum(counts) // len(counts)}x{size_label(shared + of_one)}"
    return total, size_label(total)


def _texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(each for each in value if isinstance(each, str)) if isinstance(value, list) else ()


def _fits(kind: str, value: object) -> bool:
    if kind == "str":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return kind == "f32" or (value == int(value) and abs(value) < 1 << 31)
