"""Importances that a file of llama.cpp holds, by our names of layers; and such a file of what a run has seen.

All experts of a projection are one entry of the file, and so are all heads of the parts of DeepSeek's kv_b_proj. Names
follow from the model's architecture in llama.cpp, so that only models which llama.cpp knows have such files.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roundel.errors import OutputError, PlanError, SourceError
from roundel.formats.gguf.architectures import architecture_of, settings_of
from roundel.formats.gguf.names import expert_of, is_latent, latent_cuts, tensor_name
from roundel.io.imatrix import Imatrix, Summed, lay_out_imatrix, legacy_imatrix, read_imatrix
from roundel.io.safetensors import Shard
from roundel.unit import Inputs, Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ImatrixWriter", "Importances", "open_importances"]

LEGACY = ".dat"  # the ending of files in llama.cpp's older layout


@dataclass(frozen=True)
class Importances:
    """What a file knows of a model's layers.

    names    layer -> (tensor in the file, index of the expert, experts)
    """

    file: Imatrix
    names: Mapping[str, tuple[str, int, int]]

    def of_heads(self, layer: Layer) -> tuple[Inputs, ...]:
        """What entered each head of a layer that is a part of a matrix; nothing where the file has nothing of it."""
        if layer.name not in self.names or layer.cut is None:
            return ()
        name, heads = self.names[layer.name][0], layer.cut.heads
        return tuple(_inputs(self.file.of(name, layer.shape[1], head, heads)) for head in range(heads))

    @property
    def sha256(self) -> str:
        return self.file.sha256

    def of(self, layer: Layer) -> Inputs | None:
        """What entered a layer, or None where the file has nothing of it. Raises SourceError."""
        if layer.name not in self.names:
            return None
        name, index, count = self.names[layer.name]
        return _inputs(self.file.of(name, layer.shape[1], index, count))


def _inputs(found: Summed) -> Inputs:
    import torch

    return Inputs(torch.from_numpy(found.mean_square.copy()), found.tokens)


def open_importances(path: Path, config: Mapping[str, Any], matrices: Mapping[str, tuple[int, int]]) -> Importances:
    """A file, for a model whose matrices (by module name) have these shapes.

    Raises SourceError when it cannot be read, PlanError with every matrix that it has in another size, or when it has
    none at all.
    """
    file = read_imatrix(path)
    stacks = _stacks(config, matrices)
    problems = []
    for name, members in stacks.items():
        if name in file.entries:
            problem = file.misfit(name, matrices[members[0]][1], len(members) * _heads(members[0], config))
            if problem is not None:
                problems.append(f"{problem}. Take a file that was made of this model.")
    if problems:
        raise PlanError(problems)
    known = {
        member: (name, index, len(members))
        for name, members in stacks.items()
        if name in file.entries
        for index, member in enumerate(members)
    }
    if not known:
        first = next(iter(file.entries))
        raise PlanError(f"{path.name} knows no matrix of this model; it has {first!r}. Take a file made of this model.")
    return Importances(file, known)


def _heads(module: str, config: Mapping[str, Any]) -> int:
    """Matrices that a layer is to llama.cpp: as many as it has heads, where these are stored apart."""
    if not is_latent(module) or architecture_of(config) != "deepseek2":
        return 1
    cut = latent_cuts(module, settings_of(config)).get(module)
    return 1 if cut is None else cut.heads


def _stacks(config: Mapping[str, Any], matrices: Mapping[str, object]) -> dict[str, list[str]]:
    """Tensors of llama.cpp -> the matrices they are of: one, or all experts' in order."""
    try:
        architecture = architecture_of(config)
    except SourceError as error:
        raise PlanError(f"llama.cpp's files of importances go by its names of tensors. {error}") from error
    found: dict[str, list[tuple[int, str]]] = {}
    for name in matrices:
        tensor = tensor_name(f"{name}.weight", architecture)
        if tensor is not None:
            found.setdefault(tensor, []).append((expert_of(f"{name}.weight") or 0, name))
    return {tensor: [name for _, name in sorted(members)] for tensor, members in found.items()}


class ImatrixWriter:
    """A file of importances that fills as a run goes through its units; it survives a killed run as the output does.

    While it is being filled it is FILE.partial, in llama.cpp's newer layout.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        layers: Sequence[Layer],
        *,
        dataset: str,
        samples: int,
        tokens: int,
        begun: bool,
    ) -> None:
        """begun: whether units are done already, whose importances the partial file must hold.

        Raises OutputError when the file cannot be written, PlanError for a model that llama.cpp does not know.
        """
        self.path, self.samples, self.tokens, self.dataset = path, samples, tokens, dataset
        widths = {layer.name: layer.shape[1] for layer in layers}
        stacks = _stacks(config, widths)
        self.places = {member: (name, i) for name, each in stacks.items() for i, member in enumerate(each)}
        sizes = {name: (len(members), widths[members[0]]) for name, members in stacks.items()}
        layout = lay_out_imatrix(path.name, sizes, [dataset], samples, tokens)
        partial = path.parent / f"{path.name}.partial"
        if begun and not partial.exists() and not path.exists():
            raise OutputError(f"{partial} is gone, and with it what was seen so far. Begin again with --overwrite.")
        self.complete = begun and not partial.exists()
        self.shard = None if self.complete else Shard(path.parent, layout)

    def put(self, layer: Layer, mean_square: Tensor, tokens: int) -> None:
        """What entered a layer."""
        if layer.name in self.places and self.shard is not None:
            name, index = self.places[layer.name]
            width = layer.shape[1]
            sums = (mean_square.double() * tokens).float().cpu().numpy()
            self.shard.put(f"{name}.in_sum2", sums.tobytes(), 4 * width * index)
            self.shard.put(f"{name}.counts", _one(tokens), 4 * index)

    def flush(self) -> None:
        if self.shard is not None:
            self.shard.flush()

    def close(self) -> None:
        """Let go of the partial file; it stays."""
        if self.shard is not None:
            self.shard.close()
            self.shard = None

    def finish(self) -> None:
        """Give the file its name; one that ends in .dat is written in llama.cpp's older layout before it gets it."""
        if self.shard is None:
            return
        if self.path.suffix != LEGACY:
            shard, self.shard = self.shard, None  # which closes itself
            shard.finish()
            return
        partial, finished = self.shard.partial, self.path.parent / f"{self.path.name}.legacy"
        data = legacy_imatrix(read_imatrix(partial), self.samples, self.tokens, self.dataset)
        try:
            with finished.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(finished, self.path)
            partial.unlink()
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror}. Free the disk and repeat the same command to "
                "continue."
            ) from error
        self.close()


def _one(value: float) -> bytes:
    return struct.pack("<f", value)
