"""Every family's spaces hold on its pico checkpoint, run through transformers' own blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.pico import PICO_TYPES, build
from roundel.calibration.activations import BlockActivations, Frontier
from roundel.calibration.skeleton import Skeleton
from roundel.checkpoint import Checkpoint
from roundel.families.spaces import spaces_of
from roundel.io.source import open_source
from roundel.scheme import Scheme
from roundel.transforms.proof import prove
from roundel.unit import Unit

# GPT-2 has no spaces; the others' blocks are those of a type that is there.
SAME = {"mistral", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llama4", "glm4_moe_lite"}
TYPES = tuple(t for t in PICO_TYPES if t not in SAME | {"gpt2"})


def units(folder: Path) -> list[Unit]:
    """The decoder blocks of a checkpoint as units, 2 samples of 24 tokens in front of each."""
    checkpoint = Checkpoint(open_source(str(folder)))
    scheme = Scheme.parse("W4A16G32")
    layers = {m.name: m.layer(scheme) for m in checkpoint.matrices.values() if m.reason is None}
    names = [f"{m.name}.weight" for m in checkpoint.matrices.values()]
    names += [m.bias[0] for m in checkpoint.matrices.values() if m.bias] + checkpoint.loose
    skeleton = Skeleton(checkpoint.source.config, checkpoint.family, names)
    tokens = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    states = skeleton.enter(tokens, {n: checkpoint.tensor(n).float() for n in skeleton.entry_tensors})
    found = []
    for block in skeleton.blocks:
        frontier = Frontier(folder / block.name, (2, 24, states.shape[-1]), torch.float32, in_memory=True)
        frontier.write(range(2), states)
        weights = {n: _float(checkpoint.tensor(n)) for n in names if n.startswith(block.name + ".")}
        activations = BlockActivations(
            block=block,
            own=weights,
            layers=tuple(n for n in layers if n.startswith(block.name + ".")),
            streams={"quantized": frontier, "float": frontier},
            samples=2,
            tokens=24,
            batch=2,
            part=2,
            device="cpu",
            every_expert=False,
            ticker=lambda done, text: None,
        )
        found.append(
            Unit(
                name=block.name,
                layers=tuple(layers[n] for n in activations.layers),
                weights=weights,
                spaces=spaces_of(
                    checkpoint.family,
                    block.name,
                    {n: tuple(w.shape) for n, w in weights.items()},
                    checkpoint.source.config,
                ),
                activations=activations,
            )
        )
        with torch.no_grad():
            states = block.forward(states, weights)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", TYPES)
def test_every_space_holds(model_type: str, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"quantization_config": None} if model_type == "gpt_oss" else {}
    found = units(build(model_type, tmp_path, dtype="float32", **overrides))
    assert len(found) == 2
    for unit in found:
        proven, notes = prove(unit)
        assert {name: note for name, note in notes.items() if not note.startswith("skipped: nothing that reads")} == {}
        assert len(proven.spaces) >= 2


def _float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
