"""Whether a checkpoint's tensors are those of the model that its config.json describes."""

from __future__ import annotations

import torch

from roundel.calibration.architecture import empty_model, misfit
from roundel.calibration.experts import unfuse
from roundel.calibration.spelling import spelling_of
from roundel.checkpoint import Checkpoint
from roundel.errors import PlanError, SourceError

__all__ = ["misfits"]


def misfits(checkpoint: Checkpoint) -> tuple[SourceError, ...]:
    """One for each tensor of another shape than the model has it in; none where transformers, without code of the
    checkpoint's own, cannot build that model."""
    try:
        model = empty_model(checkpoint.source.config, None, torch.float32, trust_remote_code=False)
        spelling = spelling_of(model, checkpoint.tensor_names)
        unfuse(model, spelling.experts)
    except PlanError:
        return ()
    shapes = {spelling.tensors[n]: tuple(p.shape) for n, p in model.named_parameters() if n in spelling.tensors}
    found = {tensor: checkpoint.shape(tensor) for tensor in shapes}
    return tuple(misfit(tensor, found[tensor], shapes[tensor]) for tensor in shapes if found[tensor] != shapes[tensor])
