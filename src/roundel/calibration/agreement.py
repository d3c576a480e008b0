"""Whether a checkpoint's tensors are those of the model that its config.json describes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from roundel.calibration.architecture import empty_model, misfit
from roundel.calibration.experts import unfuse
from roundel.calibration.spelling import Spelling, spelling_of
from roundel.checkpoint import Checkpoint
from roundel.errors import PlanError, SourceError

__all__ = ["Shapes", "misfits", "misfits_of", "shapes_of"]

Shapes = Mapping[str, tuple[int, ...]]


def misfits_of(checkpoint: Checkpoint) -> tuple[SourceError, ...]:
    """One for each tensor of another shape than the model has it in; none where transformers, without code of the
    checkpoint's own, cannot build that model."""
    try:
        model = empty_model(checkpoint.source.config, None, torch.float32, trust_remote_code=False)
        spelling = spelling_of(model, checkpoint.tensor_names)
        unfuse(model, spelling.experts)
    except PlanError:
        return ()
    return tuple(misfits(shapes_of(model, spelling), checkpoint))


def shapes_of(model: nn.Module, spelling: Spelling) -> Shapes:
    """The shapes that a model, its experts unfused, has a checkpoint's tensors in, by their names there."""
    named = model.named_parameters()
    return {spelling.tensors[name]: tuple(value.shape) for name, value in named if name in spelling.tensors}


def misfits(shapes: Shapes, checkpoint: Checkpoint) -> Iterator[SourceError]:
    """One for each tensor of a checkpoint that has another shape."""
    for tensor, wanted in shapes.items():
        found = checkpoint.shape(tensor)
        if found != wanted:
            yield misfit(tensor, found, wanted)
