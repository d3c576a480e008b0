"""Pico checkpoints as transformers loads them and as skeletons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import pico
from roundel.calibration.skeleton import Block, Skeleton
from roundel.checkpoint import Checkpoint, open_checkpoint

__all__ = ["TOKENS", "Case", "make_case", "tokens_of", "weights_of"]

TOKENS = 40  # more than the window, and not a multiple of anything
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {"sliding_window": 16} for name in ("gemma2", "gemma3", "gemma3_text", "mistral", "mistral3", "phi3")},
    "gpt_oss": {"sliding_window": 16, "quantization_config": None},
    "llama4": {"attention_chunk_size": 16},
    "llama4_text": {"attention_chunk_size": 16},
    "qwen3_vl_moe": {"moe_intermediate_size": 48},  # a square matrix leaves open which way round it is stored
}


@dataclass(frozen=True)
class Case:
    """A pico checkpoint, as transformers loads it and as a skeleton."""

    checkpoint: Checkpoint
    model: Any
    skeleton: Skeleton
    weights: Mapping[str, Tensor]

    @property
    def pieces(self) -> tuple[Block, ...]:
        return (*self.skeleton.blocks, self.skeleton.tail)

    def logits(self, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        numbers = self.weights if weights is None else weights
        x = self.skeleton.enter(tokens, numbers)
        for piece in self.pieces:
            x = piece.forward(x, numbers)
        return x

    def inputs(self, block: int, tokens: Tensor) -> Tensor:
        """What enters a block."""
        x = self.skeleton.enter(tokens, self.weights)
        with torch.no_grad():
            for before in self.skeleton.blocks[:block]:
                x = before.forward(x, self.weights)
        return x


def tokens_of(samples: int, seed: int = 0, length: int = TOKENS) -> Tensor:
    return torch.randint(3, 256, (samples, length), generator=torch.Generator().manual_seed(seed))


def weights_of(skeleton: Skeleton, checkpoint: Checkpoint) -> dict[str, Tensor]:
    pieces = (*skeleton.blocks, skeleton.tail)
    names = {*skeleton.entry_tensors, *(name for piece in pieces for name in piece.tensors)}
    return {name: checkpoint.tensor(name).float() for name in names}


def make_case(model_type: str, folder: Path, **overrides: Any) -> Case:
    """transformers loads it as a user would: by its folder, with the loader for its kind of model."""
    import transformers

    pico.build(model_type, folder, dtype="float32", **CONFIGS.get(model_type, {}), **overrides)
    checkpoint = open_checkpoint(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    images = type(config) in transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    loader: Any = transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM
    transformers.logging.disable_progress_bar()
    model = loader.from_pretrained(folder, dtype=torch.float32).eval()
    skeleton = Skeleton(checkpoint.source.config, checkpoint.family, checkpoint.tensor_names)
    return Case(checkpoint, model, skeleton, weights_of(skeleton, checkpoint))
