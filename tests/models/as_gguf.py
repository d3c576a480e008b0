"""The tensors of a GGUF file of a checkpoint, put together in memory from the functions of `roundel.formats.gguf`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from roundel.formats.gguf.architectures import architecture_of, settings_of
from roundel.formats.gguf.changes import extra_tensors, norm_offset
from roundel.formats.gguf.names import (
    expert_of,
    is_latent,
    latent_cuts,
    left_out,
    row_order,
    rows_permuted,
    tensor_name,
)

__all__ = ["FLOATS", "gguf_tensors"]

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def gguf_tensors(folder: Path) -> dict[str, Tensor]:
    """Name in a GGUF file -> float32 values, experts stacked."""
    config = json.loads((folder / "config.json").read_text())
    known, settings = architecture_of(config), settings_of(config)
    found: dict[str, Tensor] = dict(extra_tensors(settings, known))
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in _split(_stored(folder), settings, known):
        if left_out(name, settings, known):
            continue
        target = tensor_name(name, known)
        assert target is not None, name
        order = rows_permuted(name, settings, known)
        values = tensor.float()
        if order is not None:
            values = values[torch.from_numpy(row_order(*order))]
        values = values + norm_offset(name, known)
        number = expert_of(name)
        module = name.rpartition(".")[0]
        if number is None and is_latent(module):
            found[target] = values.unflatten(0, (latent_cuts(module, settings)[module].heads, -1))
        elif number is None:
            found[target] = values
        else:
            experts.setdefault(target, {})[number] = values
    return found | {name: torch.stack([parts[i] for i in range(len(parts))]) for name, parts in experts.items()}


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()


def _split(
    tensors: Iterator[tuple[str, Tensor]], settings: Mapping[str, Any], known: str
) -> Iterator[tuple[str, Tensor]]:
    """DeepSeek's kv_b_proj as two."""
    for name, tensor in tensors:
        module = name.rpartition(".")[0]
        if known != "deepseek2" or not is_latent(module) or left_out(name, settings, known):
            yield name, tensor
        else:
            for part, cut in latent_cuts(module, settings).items():
                yield f"{part}.weight", cut.take(tensor)
