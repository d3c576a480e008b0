"""What every position came to, as a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from roundel.errors import OutputError
from roundel.evaluation.judging import Verdict
from roundel.evaluation.text import Passage

__all__ = ["write_positions"]


def write_positions(path: Path, passage: Passage, verdicts: Sequence[Sequence[Verdict]], names: Sequence[str]) -> None:
    """Write `tokens` [windows, length] and for each model `<number>.surprise`, `.divergence`, both float32, and `.top`.

    The value at a token says what was predicted there, of this very token; where nothing was, NaN, or -1 for `top`.
    The file's metadata names the models, in order, as JSON. Raises OutputError when it cannot be written.
    """
    from safetensors.torch import save

    shape = passage.windows.shape
    tensors = {"tokens": passage.windows}
    for number in range(len(names)):
        surprise, divergence = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        top = torch.full(shape, -1, dtype=torch.int64)
        for window, (first, found) in enumerate(zip(passage.first, verdicts, strict=True)):
            surprise[window, first:] = found[number].surprise.float()
            divergence[window, first:] = found[number].divergence
            top[window, first:] = found[number].top
        tensors |= {f"{number}.surprise": surprise, f"{number}.divergence": divergence, f"{number}.top": top}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save(tensors, {"models": json.dumps(list(names))}))
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error}). Choose another place.") from error
