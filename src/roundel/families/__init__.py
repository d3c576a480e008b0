"""One file for each family of models, named as config.json's `model_type` names it."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Mapping

from roundel.families import generic
from roundel.families.family import Family, FusedExperts, Keep

__all__ = [
    "Family",
    "FusedExperts",
    "Keep",
    "attention_of",
    "family_of",
    "kept_reason",
    "known_types",
    "misfit",
    "text_config",
]

_NOT_FAMILIES = {"family", "generic", "spaces", "stacked"}
_KEYS = re.compile(r"(.+)\.(?:k_proj|qkv_proj|query_key_value|Wqkv|c_attn)(?:\.weight)?")
_INDEX = re.compile(r"\.\d+\b")


def family_of(config: Mapping[str, object]) -> Family:
    """The family of a model's config: the file called like its `model_type`, else the generic guess."""
    for candidate in (config, text_config(config)):
        name = re.sub(r"\W", "_", str(candidate.get("model_type", "")))
        if name in known_types():
            family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
            return family
    return generic.FAMILY


def known_types() -> tuple[str, ...]:
    """The model types that have a file here."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_FAMILIES))


def text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The language model's part of a config: `text_config` of a multimodal model, else the config itself."""
    for key in ("text_config", "llm_config", "language_config"):
        inner = config.get(key)
        if isinstance(inner, Mapping):
            return inner
    return config


def attention_of(name: str) -> str | None:
    """The attention module that makes keys and values with this layer or tensor; None for any other."""
    found = _KEYS.fullmatch(name)
    return found[1] if found else None


def kept_reason(module: str, config: Mapping[str, object], family: Family) -> str | None:
    """Why the 2-D weight of `module` stays as it is, or None for a linear layer.

    Asked in this order: is it stored the other way round, does it stand in a block that the config does not count (a
    multi-token-prediction layer), does the family keep it, do the general rules keep it, is it the output head.
    """
    if family.transposed is not None and re.search(family.transposed, module):
        return generic.CONV1D
    if _beyond_last_block(module, config, family):
        return generic.MTP
    return _rule_reason(_INDEX.sub(".0", module), family)


def misfit(rule: FusedExperts, shape: tuple[int, ...], config: Mapping[str, object]) -> str | None:
    """Why a fused weight [experts, a, b] cannot lie as the rule says, or None.

    Of an expert's two axes one is hidden_size wide: the in axis of what reads the hidden state, the out axis of what
    writes it. A tensor in which it is the other one was stored the other way round, and would be cut across its rows.
    """
    hidden = text_config(config).get("hidden_size")
    if rule.part != "weight" or len(shape) != 3 or shape[1] == shape[2]:
        return None
    writes = rule.projections[-1] in ("down_proj", "w2")
    expected, other = (1, 2) if writes != rule.transposed else (2, 1)
    if shape[expected] == hidden or shape[other] != hidden:
        return None
    order = "[experts, in, out]" if rule.transposed else "[experts, out, in]"
    return f"axis {expected} of {list(shape)} is not hidden_size ({hidden}): it is not stored {order}"


@functools.lru_cache(maxsize=4096)
def _rule_reason(module: str, family: Family) -> str | None:
    """What the rules say. No rule names a certain block or expert, so those of a kind are asked about once."""
    for rule in (*family.kept, *generic.KEPT):
        if re.search(rule.pattern, module):
            return rule.reason
    return generic.HEAD if module == family.head else None


def _beyond_last_block(module: str, config: Mapping[str, object], family: Family) -> bool:
    """Whether the module lies in `blocks.N` with N at least num_hidden_layers, as DeepSeek-V3 and GLM-4.5 store MTP."""
    count = text_config(config).get("num_hidden_layers", config.get("num_hidden_layers"))
    if not isinstance(count, int):
        return False
    matches = (re.match(rf"{re.escape(blocks)}\.(\d+)\.", module) for blocks in family.blocks)
    return any(int(match[1]) >= count for match in matches if match)
