"""Which tensors of a model a GGUF file holds, under the names of a Hugging Face checkpoint, and how they lie there.

The inverse of `names` and `changes`: each expert of a stacked tensor is a tensor of its own, the rows of Llama's q_proj
and k_proj are to be put back in order, and what was added to norms is to be taken off. The two parts of DeepSeek's
kv_b_proj stay two matrices here, all heads in one; `Checkpoint.wholes` joins them. Tensors that only carry rotary
frequencies are no part of a checkpoint; `configuration` reads them. Not read: types that need a codebook, and NVFP4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from roundel.errors import SourceError
from roundel.formats.gguf.architectures import ARCHITECTURES
from roundel.formats.gguf.changes import norm_offset
from roundel.formats.gguf.names import hf_name, is_latent, row_order, rows_permuted
from roundel.io.gguf import GGML_TYPES, GgufHeader, GgufTensor
from roundel.io.safetensors import Place
from roundel.scheme import BLOCK_GRIDS
from roundel.tensor import FLOAT_DTYPES, TensorSpec

__all__ = ["Held", "architecture_in", "held_tensors"]

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_ROTARY = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_ONE_ROW = "shared_expert_gate.weight"  # a vector in some files, a matrix of one row in the model


@dataclass(frozen=True)
class Held:
    """A tensor of the model: the file's tensor that it is or is part of, its type, where it lies, and how it differs.

    place   under the model's name; blocks as uint8 [out, bytes of a row]
    heads   (heads, rows of one) where rows stand in llama.cpp's order
    added   what was added to every value
    """

    tensor: str
    kind: str
    place: Place
    heads: tuple[int, int] | None = None
    added: float = 0.0

    @property
    def is_changed(self) -> bool:
        return self.heads is not None or self.added != 0

    def restored(self, stored: np.ndarray) -> np.ndarray:
        """Bytes of whole heads [rows, bytes of a row], as they lie -> as the model has them."""
        if self.heads is not None:
            stored = stored[np.argsort(row_order(len(stored) // self.heads[1], self.heads[1]))]
        if self.added:
            values = np.ascontiguousarray(stored).view("<f4")
            stored = (values - np.float32(self.added)).view(np.uint8)
        return stored


def architecture_in(header: GgufHeader) -> str:
    """llama.cpp's name of what a file holds. Raises SourceError for one that is not read."""
    value = header.metadata.get("general.architecture")
    found = value.value if value is not None else None
    known = [each.name for each in ARCHITECTURES]
    if found not in known:
        raise SourceError(
            f"The GGUF file holds a model of the architecture {found!r}; read are {', '.join(known)}. Start from the "
            "original model."
        )
    return str(found)


def held_tensors(header: GgufHeader, settings: Mapping[str, Any]) -> dict[str, Held]:
    """All tensors of the model by their names in a checkpoint, in the order of the file.

    settings   `architectures.settings_of` of its config
    Raises SourceError for tensors that the architecture has not, or of a type or shape that is not read.
    """
    architecture = architecture_in(header)
    found: dict[str, Held] = {}
    for name, tensor in header.tensors.items():
        if _ROTARY.fullmatch(name):
            continue
        _check_block(name, settings)
        if 0 in tensor.shape:
            raise SourceError(f"{name} is {list(tensor.shape)}, a tensor without numbers. Fetch the GGUF file again.")
        for target, held in _parts(tensor, header.places[name], architecture, settings):
            if target in found:
                raise SourceError(f"The GGUF file holds {target} twice, once as {name}. Fetch it again.")
            found[target] = _changed(target, held, settings, architecture)
    return found


def _check_block(name: str, settings: Mapping[str, Any]) -> None:
    matched = _BLOCK.match(name)
    if matched and (len(matched[1]) > 9 or int(matched[1]) >= int(settings["num_hidden_layers"])):
        raise SourceError(
            f"The GGUF file holds {name}, and its model has {settings['num_hidden_layers']} blocks. Fetch it again."
        )


def _parts(
    tensor: GgufTensor, place: Place, architecture: str, settings: Mapping[str, Any]
) -> Iterator[tuple[str, Held]]:
    """A tensor, or the experts in it, by name."""
    if tensor.type not in BLOCK_GRIDS and tensor.type not in FLOAT_DTYPES:
        raise SourceError(
            f"{tensor.name} is of the type {tensor.type}; read are F32, F16, BF16, F64, {', '.join(BLOCK_GRIDS)}. "
            "Start from the original model, or from a file of another type."
        )
    whole = hf_name(tensor.name, architecture)
    if whole is not None and whole.endswith((".weight", ".bias", ".sinks", ".e_score_correction_bias")):
        spec = replace(place.spec, name=whole)
        if whole.endswith(_ONE_ROW) and len(spec.shape) == 1:
            spec = replace(spec, shape=(1, *spec.shape))
        if is_latent(whole.removesuffix(".weight")) and len(spec.shape) == 3:
            if spec.shape[0] != settings["num_attention_heads"]:
                raise SourceError(f"{tensor.name} is {list(spec.shape)}, not of the model's heads. Fetch it again.")
            spec = replace(spec, shape=(spec.shape[0] * spec.shape[1], spec.shape[2]))
        yield whole, Held(tensor.name, tensor.type, replace(place, spec=spec))
        return
    stacked = hf_name(tensor.name, architecture, 0) is not None and tensor.name.endswith((".weight", ".bias"))
    if not stacked or whole is not None or not tensor.shape:
        raise SourceError(
            f"The GGUF file holds {tensor.name} {list(tensor.shape)}, which is not known of the architecture "
            f"{architecture}. Start from the original model."
        )
    shape, experts = place.spec.shape, next((settings[key] for key in _EXPERTS if key in settings), 0)
    if shape[0] != experts:
        raise SourceError(f"{tensor.name} holds {shape[0]} experts, and the model has {experts}. Fetch it again.")
    nbytes = (place.end - place.begin) // shape[0]
    for expert in range(shape[0]):
        name = hf_name(tensor.name, architecture, expert)
        assert name is not None, tensor.name
        begin = place.begin + expert * nbytes
        yield (
            name,
            Held(tensor.name, tensor.type, Place(TensorSpec(name, place.spec.dtype, shape[1:]), begin, begin + nbytes)),
        )


def _changed(name: str, held: Held, settings: Mapping[str, Any], architecture: str) -> Held:
    heads, added, spec = rows_permuted(name, settings, architecture), norm_offset(name, architecture), held.place.spec
    if heads is not None and (not spec.shape or spec.shape[0] != heads[0] * heads[1] or heads[1] % 2):
        raise SourceError(
            f"{name} is {list(spec.shape)}, and the model has {heads[0]} heads of {heads[1]}. Fetch it again."
        )
    if added and held.kind != "F32":
        raise SourceError(
            f"{name} is of the type {held.kind}, and {GGML_TYPES['F32'].name} was expected. Fetch it again."
        )
    return replace(held, heads=heads, added=added)
