"""Which tokens begin, end and separate a text, whether they are added by themselves, and the chat template.

Read from tokenizer.json, tokenizer_config.json, config.json and the chat template's own file. Source of the reading:
llama.cpp, gguf-py/gguf/vocab.py (`SpecialVocab`); its order of keys is kept.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from roundel.io.gguf import GgufValue

__all__ = ["TokenizerFiles", "special_tokens"]

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_KEYS = {  # role -> what the key of its id is called
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
}
_ADDED = ("bos", "eos", "sep")
_IN_NAMES = frozenset(string.ascii_letters + string.digits)


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What lies beside a checkpoint about its tokenizer; empty where a file is missing.

    description    tokenizer.json
    settings       tokenizer_config.json
    pieces         the bytes of tokenizer.model
    added          added_tokens.json
    template       chat_template.jinja, or what chat_template.json holds
    templates      name -> text of further templates (additional_chat_templates/*.jinja)
    """

    description: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    pieces: bytes = b""
    added: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
    templates: Mapping[str, str] = field(default_factory=dict)


def special_tokens(
    files: TokenizerFiles, config: Mapping[str, Any], *, merges: bool, count: int | None = None
) -> dict[str, GgufValue]:
    """Values by full key.

    merges   whether the merges of a byte-level tokenizer belong to them
    count    tokens of the file: an id beyond is left out
    """
    found: dict[str, GgufValue] = {}
    texts = _merges(files.description) if merges else ()
    if texts:
        found["tokenizer.ggml.merges"] = GgufValue("str", texts)
    ids, added = _roles(files, config)
    for role, number in ids.items():
        if role in _KEYS and (count is None or number < count):
            found[f"tokenizer.ggml.{_KEYS[role]}"] = GgufValue("u32", number)
    for role in added:
        if role in _ADDED:
            found[f"tokenizer.ggml.add_{role}_token"] = GgufValue("bool", added[role])
    if files.settings:
        found |= _templates(files)
    for key, value in _normalizer(files.description.get("normalizer")):
        found[f"tokenizer.ggml.normalizer.{key}"] = GgufValue("bool", value)
    return found


def _merges(description: Mapping[str, Any]) -> tuple[str, ...]:
    """As "left right"; a space inside a part is spelled as byte-level tokenizers spell it."""
    model = description.get("model")
    given = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(given, list):
        return ()
    return tuple(
        each if isinstance(each, str) else " ".join(part.replace(" ", "Ġ") for part in each)
        for each in given
        if isinstance(each, str) or (isinstance(each, list) and all(isinstance(part, str) for part in each))
    )


def _roles(files: TokenizerFiles, config: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, bool]]:
    """The id of each role, and whether it is put around a text."""
    settings = dict(files.settings)
    roles, added = _from_processor(files.description, settings)
    ids: dict[str, int] = {}
    listed = files.description.get("added_tokens")
    numbers: dict[str, Any] = {}
    for token in listed if isinstance(listed, list) else ():
        numbers.setdefault(token.get("content"), token.get("id"))
    if settings:
        for role in roles:
            wish = settings.get(f"add_{role}_token")
            if isinstance(wish, bool):
                added.setdefault(role, wish)
            text = _content(settings.get(f"{role}_token"))
            if text is not None:
                _note(ids, role, numbers.get(text))
    text_config = config.get("text_config")
    for role in roles:
        number = config.get(f"{role}_token_id")
        if number is None and isinstance(text_config, dict):
            number = text_config.get(f"{role}_token_id")
        _note(ids, role, number)
    return ids, added


def _note(ids: dict[str, int], role: str, number: object) -> None:
    if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
        ids.setdefault(role, number)


def _content(token: object) -> str | None:
    """A token of tokenizer_config.json is its text or an object that has it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _from_processor(
    description: Mapping[str, Any], settings: dict[str, Any]
) -> tuple[tuple[str, ...], dict[str, bool]]:
    """What the post-processor of tokenizer.json tells: the roles there are, and which are put around a text.

    It may name a token of which tokenizer_config.json says nothing; then `settings` gets it.
    """
    roles, added = _ROLES, dict[str, bool]()
    if not description:
        return roles, added
    for role, other in (("bos", "cls"), ("eos", "sep")):
        if not settings.get(f"{role}_token") and settings.get(f"{other}_token") and settings:
            settings[f"{role}_token"] = settings[f"{other}_token"]
    processor = description.get("post_processor")
    for each in _steps(processor, "processors"):
        if each.get("type") == "ByteLevel":
            added.setdefault("bos", False)
            added.setdefault("eos", False)
        elif each.get("type") == "TemplateProcessing":
            single, pair = _template(each.get("single")), _template(each.get("pair"))
            first = single[0] if len(single) > 1 else None
            last = single[-1] if len(single) > 1 else None
            if first and first[0] == "token":
                _begins(first[1], settings, added)
            if last and last[0] == "token":
                roles = _ends(last[1], settings, added, roles)
            _separates(pair, first, last, settings, added)
    return roles, added


def _steps(step: object, inside: str) -> list[dict[str, Any]]:
    if not isinstance(step, dict):
        return []
    listed = step.get(inside, [step])
    return [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []


def _template(parts: object) -> list[tuple[str, str]]:
    """("token", its text) or ("text", which) of each part."""
    found = []
    for part in parts if isinstance(parts, list) else ():
        for kind, name in (("SpecialToken", "token"), ("Sequence", "text")):
            if isinstance(part, dict) and isinstance(part.get(kind), dict):
                found.append((name, str(part[kind].get("id"))))
    return found


def _begins(token: str, settings: dict[str, Any], added: dict[str, bool]) -> None:
    named = [settings.get("bos_token"), settings.get("cls_token")]
    if settings and token not in named:
        for role, text in zip(("bos", "cls"), named, strict=True):
            if not text:
                settings[f"{role}_token"] = token
    added["bos"] = not settings or token in (settings.get("bos_token"), settings.get("cls_token"))


def _ends(token: str, settings: dict[str, Any], added: dict[str, bool], roles: tuple[str, ...]) -> tuple[str, ...]:
    """A token other than the named EOS ends texts: it becomes EOS, and the named one the end of a turn."""
    named = settings.get("eos_token")
    if settings and token != named:
        free = next((role for role in ("eot", "eom") if role not in roles), None)
        if free is not None:
            roles = (*roles, free)
            settings[f"{free}_token"] = named
        settings["eos_token"] = token
    added["eos"] = True
    return roles


def _separates(
    pair: Sequence[tuple[str, str]],
    first: tuple[str, str] | None,
    last: tuple[str, str] | None,
    settings: dict[str, Any],
    added: dict[str, bool],
) -> None:
    """Whether EOS or a separator stands between the two texts of a pair."""
    before = first if first and first[0] == "token" else None
    after = last if last and last[0] == "token" else None
    inside = list(pair)
    if before and inside and inside[0] == before:
        inside = inside[1:]
    if after and inside and inside[-1] == after:
        inside = inside[:-1]
    if len(inside) < 3 or inside[0] != ("text", "A") or inside[-1] != ("text", "B"):
        return
    separator, end = settings.get("sep_token"), settings.get("eos_token")
    between = inside[1:-1]
    found = between[0][0] == "token" and between[0][1] in (separator, end) and after is None
    if len(between) == 2 and between[1][0] == "token" and between[1][1] in (separator, end):
        found = True
    added["sep"] = found
    if found and not separator and settings:
        settings["sep_token"] = end


def _templates(files: TokenizerFiles) -> dict[str, GgufValue]:
    given: Any = files.template
    if given is not None and files.templates:
        given = [{"name": "default", "template": given}]
        given += [{"name": name, "template": text} for name, text in files.templates.items()]
    given = files.settings.get("chat_template", given)
    if isinstance(given, str):
        return {"tokenizer.chat_template": GgufValue("str", given)}
    found: dict[str, GgufValue] = {}
    names: list[str] = []
    default = None
    for each in given if isinstance(given, list) else ():
        name, text = each.get("name", ""), each.get("template")
        name = "".join(c if c in _IN_NAMES else "_" for c in name)
        if name == "default" and text is not None:
            default = text
        elif name and text is not None:
            names.append(name)
            found[f"tokenizer.chat_template.{name}"] = GgufValue("str", text)
    if names:
        found["tokenizer.chat_templates"] = GgufValue("str", tuple(names))
    if default is not None:
        found["tokenizer.chat_template"] = GgufValue("str", default)
    return found


def _normalizer(step: object) -> Iterator[tuple[str, bool]]:
    for each in _steps(step, "normalizers"):
        kind = each.get("type")
        if kind == "Lowercase":
            yield "lowercase", True
        elif kind == "StripAccents":
            yield "strip_accents", True
