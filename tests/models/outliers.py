"""The same function with outliers: some channels of a Llama's checkpoint made many times larger than the others.

In every block, some channels of the two norms, of the values and of up_proj are multiplied by a factor, and the columns
that read them divided by it. The factor is a power of two, so every number stays exact in its dtype and the model
computes what it did, to the last bit of its sums. Plain rounding suffers: a column that was divided lies far below its
group's range.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["inject"]


def inject(source: Path, folder: Path, *, factor: int = 32, share: float = 1 / 32, seed: int = 0) -> Path:
    """Write `folder`, a checkpoint that computes what `source` does: in Llama's layout, dense, one file.

    factor   a power of two
    share    of the channels of each space that get it, at least one; heads of values that are read together count once
    """
    assert math.log2(factor).is_integer()
    config = json.loads((source / "config.json").read_text())
    repeat = config["num_attention_heads"] // config["num_key_value_heads"]
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    blocks = sorted({m[0] for name in tensors if (m := re.match(r"model\.layers\.\d+", name))})
    for block in blocks:
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        head = tensors[f"{attention}.o_proj.weight"].shape[1] // config["num_attention_heads"]
        for writer, readers, times in (
            (f"{block}.input_layernorm", [f"{attention}.{n}_proj" for n in "qkv"], 1),
            (f"{attention}.v_proj", [f"{attention}.o_proj"], repeat),
            (f"{block}.post_attention_layernorm", [f"{mlp}.gate_proj", f"{mlp}.up_proj"], 1),
            (f"{mlp}.up_proj", [f"{mlp}.down_proj"], 1),
        ):
            size = tensors[f"{writer}.weight"].shape[0]
            larger = torch.ones(size)
            larger[torch.randperm(size, generator=generator)[: max(1, round(share * size))]] = factor
            for part in ("weight", "bias"):
                if f"{writer}.{part}" in tensors:
                    _multiply(tensors, f"{writer}.{part}", larger, axis=0)
            columns = larger.view(-1, head).repeat_interleave(times, 0).flatten() if times > 1 else larger
            for reader in readers:
                _multiply(tensors, f"{reader}.weight", 1 / columns, axis=1)
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _multiply(tensors: dict[str, Tensor], name: str, factor: Tensor, axis: int) -> None:
    old = tensors[name]
    new = old.float() * (factor if axis else factor.view(-1, *(1 for _ in old.shape[1:])))
    tensors[name] = new.to(old.dtype)
    assert torch.equal(tensors[name].float(), new), f"{name} is not exact after scaling"
