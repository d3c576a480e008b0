"""Names: which tensor of the written checkpoint is which parameter of the model class.

transformers renames at loading, and fuses the experts of a block into 3-D parameters. Its own table of renamings is
asked here; experts keep the checkpoint's names, for `experts.unfuse` puts a matrix for each projection in their place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["ROLES", "Spelling", "spelling_of"]

ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)\.(?P<part>weight|bias)")


@dataclass(frozen=True)
class Spelling:
    """Both names of every tensor that the model class has a place for.

    tensors   parameter or stored buffer of the model, experts unfused -> tensor of the checkpoint
    experts   module of fused experts -> {"gate" | "up" | "down": what the checkpoint calls that projection}
    """

    tensors: Mapping[str, str]
    experts: Mapping[str, Mapping[str, str]]


def spelling_of(model: nn.Module, tensors: Iterable[str]) -> Spelling:
    """Match the checkpoint's tensors with a model on the meta device. A tensor that has no place in it is left out."""
    known = set(model.state_dict())
    rename = _renaming(model, known)
    found: dict[str, str] = {}
    experts: dict[str, dict[str, str]] = {}
    modules: dict[str, str] = {}  # the checkpoint's name of an experts module -> the model's
    for tensor in tensors:
        match = _EXPERT.fullmatch(tensor)
        if match is not None and match["projection"] in ROLES:
            stored = match["experts"]
            if stored not in modules:
                modules[stored] = rename(f"{stored}.down_proj").removesuffix(".down_proj")
            module = modules[stored]
            if f"{module}.down_proj" in known:
                experts.setdefault(module, {})[ROLES[match["projection"]]] = match["projection"]
                found[f"{module}.{match['expert']}.{match['projection']}.{match['part']}"] = tensor
                continue
        name = rename(tensor)
        if name in known:
            found[name] = tensor
    return Spelling(found, experts)


def _renaming(model: nn.Module, known: set[str]) -> Callable[[str], str]:
    """A tensor's name as the model has it; the empty string for one that is computed into others at loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms: list[Any] = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix = str(model.base_model_prefix)
    present = dict.fromkeys(known, True)

    def rename(tensor: str) -> str:
        name: str = rename_source_key(tensor, renamings, [], prefix, present)[0]
        is_experts = tensor.endswith(".experts.down_proj")
        if is_experts or rename_source_key(tensor, renamings, converters, prefix, present)[1] is None:
            return name
        return ""

    return rename
