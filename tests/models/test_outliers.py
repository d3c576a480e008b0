"""The checkpoint with outliers computes what the one without does, and rounds worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.outliers import inject
from models.pico import build
from roundel.calibration.skeleton import Skeleton
from roundel.families import family_of
from roundel.ops.encode import encode
from roundel.scheme import Scheme


def logits(folder: Path, rounded: bool = False) -> torch.Tensor:
    tensors = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    if rounded:
        grid = Scheme.parse("W4A16G32").weight
        tensors |= {n: encode(t, grid).decode() for n, t in tensors.items() if "_proj.weight" in n}
    config = json.loads((folder / "config.json").read_text())
    skeleton = Skeleton(config, family_of(config), tensors)
    tokens = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = skeleton.enter(tokens, tensors)
        for block in skeleton.blocks:
            x = block.forward(x, tensors)
        return skeleton.tail.forward(x, tensors)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_same_function_other_weights(model_type: str, tmp_path: Path) -> None:
    plain = build(model_type, tmp_path / "plain")
    outliers = inject(plain, tmp_path / "outliers", factor=64)
    exact, found = logits(plain), logits(outliers)
    assert float((found - exact).norm() / exact.norm()) < 1e-5
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, outliers))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.o_proj.weight"} <= changed
    assert not any("embed" in name or "lm_head" in name for name in changed)
    lost = float((logits(outliers, rounded=True) - exact).norm()) / float((logits(plain, rounded=True) - exact).norm())
    assert lost > 1.3
    again = inject(plain, tmp_path / "again", factor=64)
    assert (again / "model.safetensors").read_bytes() == (outliers / "model.safetensors").read_bytes()
