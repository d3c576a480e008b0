"""What passes between benchmarks/accuracy.py and a peer's program: a job goes in, a float checkpoint comes out.

A job is a JSON file with the fields of `Job`. Into its `out` goes a float32 checkpoint under the source's tensor names,
every matrix as the files that the tool itself saved decode to, and result.json: what it took and costs to store.
The programs run in the peers' environments; nothing is imported here but torch, numpy and safetensors.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

torch.set_num_threads(1)  # the jobs share the machine, and one thread makes their times comparable


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model, one scheme, one way of one tool.

    model       folder of the float checkpoint
    tokens      .jsonl file, one sample a line: {"input_ids": [...]}, all of one length
    out         folder to fill; whatever the tool leaves besides is put under out/work
    group_size  consecutive inputs of a row that share a scale
    options     what the tool is told besides, by the names that its program documents
    """

    model: str
    tokens: str
    out: str
    bits: int
    group_size: int
    symmetric: bool
    seed: int
    options: dict[str, Any]

    @classmethod
    def read(cls, path: str) -> Job:
        return cls(**json.loads(Path(path).read_text()))

    def samples(self) -> list[list[int]]:
        return [json.loads(line)["input_ids"] for line in Path(self.tokens).read_text().splitlines()]

    def work(self) -> str:
        """A folder for the tool's own files."""
        folder = Path(self.out, "work")
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)


class Timer:
    """Processor seconds of the block, all threads: a busy machine does not change them much."""

    seconds: float = 0.0

    def __enter__(self) -> Timer:
        self._started = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self._started


def finish(
    job: Job,
    tensors: Mapping[str, Tensor],
    *,
    seconds: float,
    scale_bits: int,
    zero_bits: int,
    settings: Mapping[str, Any],
    packages: tuple[str, ...],
    groups: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the float checkpoint and result.json.

    tensors     by the source's names; those left out are the source's own
    zero_bits   stored for each group; 0 where the zero point is a constant
    settings    what the tool used, as it says itself where it does
    groups      of layers whose groups are not consecutive inputs: the group of each input [in], by layer
    """
    source = {
        name: value for shard in Path(job.model).glob("*.safetensors") for name, value in load_file(shard).items()
    }
    unknown = sorted(set(tensors) - set(source))
    assert not unknown, f"{unknown[0]} is no tensor of {job.model}"
    out = Path(job.out)
    save_file(
        {n: tensors.get(n, v).to(torch.float32).contiguous() for n, v in source.items()}, out / "model.safetensors"
    )
    config = json.loads(Path(job.model, "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    if groups:
        save_file(
            {name: value.to(torch.int32).contiguous() for name, value in groups.items()}, out / "groups.safetensors"
        )
    result = {
        "seconds": round(seconds, 2),
        "bits_per_weight": job.bits + (scale_bits + zero_bits) / job.group_size,
        "settings": {name: str(value) for name, value in settings.items()},
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }
    (out / "result.json").write_text(json.dumps(result))


def decode_gptq_layout(
    folder: str, bits: int, group_size: int, zero_offset: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Matrices [out, in] and groups of inputs [in] from files in the layout of GPTQ, by tensor name and by layer.

    qweight int32 [in * bits / 32, out] and qzeros int32 [groups, out * bits / 32] hold streams of `bits` bits, the low
    ones first, along inputs and outputs. A weight is scales[group] * (code - zero[group]).
    zero_offset   1 in the first version of the layout, which stores zero - 1; 0 in the second
    Tensors that are no part of a packed layer are returned as they are.
    """
    stored = {n: value for shard in Path(folder).glob("*.safetensors") for n, value in load_file(shard).items()}
    tensors, groups = dict(stored), {}
    for layer in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        qweight, qzeros, scales = (tensors.pop(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales"))
        codes = _stream(qweight.t().contiguous(), bits)
        zeros = (_stream(qzeros.contiguous(), bits) + zero_offset) % 2**bits
        consecutive = torch.arange(codes.shape[1]) // group_size
        group = tensors.pop(f"{layer}.g_idx", consecutive).long()
        if not torch.equal(group, consecutive):
            groups[layer] = group
        tensors[f"{layer}.weight"] = scales.float().t()[:, group] * (codes - zeros.t()[:, group]).float()
    return tensors, groups


def _stream(words: Tensor, bits: int) -> Tensor:
    """Codes [rows, width * 32 / bits] of words int32 [rows, width]: a row is one stream of bits, the low ones first."""
    flat = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(flat.reshape(words.shape[0], -1, bits) @ (1 << np.arange(bits))).to(torch.int64)
