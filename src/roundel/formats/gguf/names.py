"""Tensor names in GGUF files: what a tensor of a Hugging Face checkpoint is called there, and back.

All experts of a layer are one tensor [experts, out, in]; every other tensor is one tensor. Source: llama.cpp,
gguf-py/gguf/constants.py (TENSOR_NAMES) and tensor_mapping.py; for the order of rows, conversion/llama.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from roundel.errors import SourceError
from roundel.formats.gguf.architectures import architecture
from roundel.unit import Cut

__all__ = [
    "expert_of",
    "hf_name",
    "is_latent",
    "latent_cuts",
    "left_out",
    "row_order",
    "rows_permuted",
    "tensor_name",
    "text_name",
]

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
_GGUF_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(?P<before>.+\.experts)\.(?P<expert>\d+)\.(?P<after>.+)")
_TOWERS = re.compile(
    r"(^|[._])(visual|vision|audio|projector|multi_modal|mm)[._]|vision_tower|embed_vision|embed_audio"
)
_LATENT, _LATENT_PARTS = "kv_b_proj", ("k_b_proj", "v_b_proj")


def tensor_name(hf_name: str, architecture_name: str) -> str | None:
    """What a tensor is called: for an expert's tensor, the stacked one it is part of (`expert_of` says which part).

    None where the architecture has no such tensor: `left_out` tells whether that is meant.
    """
    name = text_name(hf_name)
    module, _, ending = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{ending}"
    matched = _BLOCK.fullmatch(name)
    if not matched:
        return None
    number, inside = matched.groups()
    known = architecture(architecture_name)
    if inside in known.special:
        return f"blk.{number}.{known.special[inside]}"
    expert = _EXPERT.fullmatch(inside)
    module, _, ending = (f"{expert['before']}.{expert['after']}" if expert else inside).rpartition(".")
    if ending not in ("weight", "bias") or module not in known.block:
        return None
    return f"blk.{number}.{known.block[module]}.{ending}"


def expert_of(hf_name: str) -> int | None:
    """Which part of a stacked tensor this is: the number of the expert, None for a tensor of its own."""
    matched = _EXPERT.fullmatch(hf_name)
    return int(matched["expert"]) if matched else None


def hf_name(gguf_name: str, architecture_name: str, expert: int | None = None) -> str | None:
    """The inverse of `tensor_name`; of a stacked tensor, the name of one expert's part."""
    known = architecture(architecture_name)
    matched = _GGUF_BLOCK.fullmatch(gguf_name)
    if not matched:
        name, _, ending = gguf_name.rpartition(".")
        return next((f"{theirs}.{ending}" for theirs, ours in _TOP.items() if ours == name), None)
    number, inside = matched.groups()
    block = f"model.layers.{number}"
    for theirs, ours in known.special.items():
        if ours == inside:
            return f"{block}.{theirs}"
    name, _, ending = inside.rpartition(".")
    for theirs, ours in known.block.items():
        if ours == name:
            before, experts, after = theirs.partition(".experts.")
            if experts:
                theirs = f"{before}.experts.{expert}.{after}"
            return f"{block}.{theirs}.{ending}" if not experts or expert is not None else None
    return None


def left_out(hf_name: str, settings: Mapping[str, Any], architecture_name: str) -> str | None:
    """Why llama.cpp's file of a text model has no such tensor on purpose; None where it should have one."""
    known = architecture(architecture_name)
    name = text_name(hf_name)
    if name.endswith((".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")):
        return "computed when the model is loaded"
    if not name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")) and _TOWERS.search(
        hf_name
    ):
        return "not part of the language model"
    if name == "lm_head.weight":
        tied = known.headless or (known.name == "deepseek2" and bool(settings.get("tie_word_embeddings")))
        return "the embedding is the output head" if tied else None
    matched = _BLOCK.fullmatch(name)
    if matched and known.name == "deepseek2" and int(matched[1]) >= int(settings["num_hidden_layers"]):
        return "predicts further tokens, which llama.cpp does not run"
    return None


def rows_permuted(hf_name: str, settings: Mapping[str, Any], architecture_name: str) -> tuple[int, int] | None:
    """(heads, rows of a head) of a q_proj or k_proj, weight or bias, whose rows go by `row_order`; None for others."""
    if not architecture(architecture_name).rotated:
        return None
    module = hf_name.rpartition(".")[0]
    heads = int(settings["num_attention_heads"])
    if module.endswith(".k_proj"):
        given = settings.get("num_key_value_heads")
        heads = heads if given is None else int(given)
    elif not module.endswith(".q_proj"):
        return None
    size = settings.get("head_dim")
    if size is None:
        size = int(settings["hidden_size"]) // int(settings["num_attention_heads"])
    return heads, int(size)


def row_order(heads: int, size: int) -> np.ndarray:
    """Row i of the stored matrix is row `row_order[i]` of the checkpoint's.

    Rotary embedding turns pairs of rows of a head: transformers pairs i with i + size / 2, llama.cpp 2 i with 2 i + 1.
    """
    rows: np.ndarray = np.arange(heads * size).reshape(heads, 2, size // 2).swapaxes(1, 2).ravel()
    return rows


def is_latent(module: str) -> bool:
    """Whether this may be DeepSeek's kv_b_proj, or one of its two parts."""
    return module.rpartition(".")[2] in (_LATENT, *_LATENT_PARTS)


def latent_cuts(module: str, settings: Mapping[str, Any]) -> dict[str, Cut]:
    """The matrices in which DeepSeek's kv_b_proj [heads * (nope + value), rank] is stored, by module name: of each head
    the rows of keys, turned (k_b_proj [heads * rank, nope]), and those of values (v_b_proj [heads * value, rank]).

    llama.cpp multiplies queries by the one, and what attention makes of latent vectors by the other. Source: its
    conversion/deepseek.py. module: of the whole (`is_latent`), or of one of the two. Raises SourceError for sizes that
    are none.
    """
    heads, nope, value = (_size(settings, key) for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    before = module.rpartition(".")[0]
    whole = f"{before}.{_LATENT}"
    keys = Cut(of=whole, heads=heads, start=0, stop=nope, turned=True)
    values = Cut(of=whole, heads=heads, start=nope, stop=nope + value)
    return {f"{before}.{part}": cut for part, cut in zip(_LATENT_PARTS, (keys, values), strict=True)}


def _size(settings: Mapping[str, Any], key: str) -> int:
    value = settings.get(key)
    if type(value) is not int or value < 1:
        raise SourceError(f"config.json gives {value!r} as {key}, where a number of rows is needed. Fetch it again.")
    return value


def text_name(hf_name: str) -> str:
    """The name without the wrapper of a multimodal model."""
    return hf_name.replace("language_model.", "")
