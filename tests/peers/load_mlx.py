"""Load MLX checkpoints with mlx-lm and save what the models say: `load_checkpoint.py`, where there is no torch.

Usage: python load_mlx.py JOBS.json

Jobs and results are those of `load_checkpoint.py`. Of a job, `loader` is "mlx", and `dtype` is what all floats are cast
to after loading, or "stored" for computing with what the file holds.
"""

import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

TOKENS = 8


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load one checkpoint, write its logits, and tell about it."""
    model, _ = load_model(Path(job["folder"]))
    if job["dtype"] != "stored":
        model.set_dtype(getattr(mx, job["dtype"]))
    modules = kinds(model)
    np.save(job["logits"], np.array(logits_of(model, job["prompt"])))
    tokens = list(job["prompt"])
    for _ in range(TOKENS):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return {"modules": modules, "dtype": job["dtype"], "tokens": tokens[-TOKENS:]}


def kinds(model: Any) -> Counter[str]:
    leaves = tree_flatten(model.leaf_modules(), is_leaf=lambda module: hasattr(module, "parameters"))
    return Counter(type(module).__name__ for _, module in leaves)


def logits_of(model: Any, tokens: list[int]) -> mx.array:
    return model(mx.array([tokens]))[0].astype(mx.float32)


def main(jobs: str) -> None:
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for job in json.loads(Path(jobs).read_text()):
        try:
            result = {"ok": True} | run(job)
        except Exception as error:
            traceback.print_exc()
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": job["name"]} | result), file=lines, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
