"""How fast one thread rounds to GGUF block types, beside ggml's own quantizer on the same weights in the same run.

    python benchmarks/gguf.py [TYPE ...]

Weights are normal float32, [512, 4096], importances spread over some orders of magnitude; what is timed is all from
floats to the bytes of the file. Seconds are the thread's own, the best of several; ggml (xllamacpp, `make peers`) runs
as a program in its environment between ours. The bytes of both are compared.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from roundel.formats.gguf.block_types import BLOCK_TYPES

HERE = Path(__file__).parent
PEER = Path(os.environ.get("ROUNDEL_PEERS", HERE.parent / ".peers")) / "gguf" / "bin" / "python"
SHAPE = (512, 4096)
ROUNDS = 3


def matrices() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    weight = (0.02 * generator.standard_normal(SHAPE)).astype(np.float32)
    importance = np.exp(1.5 * generator.standard_normal(SHAPE[1])).astype(np.float32)
    return {"weight": weight, "importance": importance}


def ours(name: str, given: dict[str, np.ndarray]) -> tuple[list[float], list[np.ndarray]]:
    """Seconds and bytes, plain and with importance."""
    kind, weight = BLOCK_TYPES[name], torch.from_numpy(given["weight"])
    seconds, packed = [], []
    for importance in (None, torch.from_numpy(given["importance"])):
        found = kind.round_and_pack(weight, importance)  # compiled here
        times = []
        for _ in range(ROUNDS):
            start = time.thread_time()
            kind.round_and_pack(weight, importance)
            times.append(time.thread_time() - start)
        seconds.append(min(times))
        packed.append(found.numpy())
    return seconds, packed


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    given = matrices()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(source, **given)
        print("          plain: ours   ggml  ratio    with importance: ours   ggml  ratio    same bytes")
        for name in names:
            first, packed = ours(name, given)
            subprocess.run([PEER, HERE / "peers" / "ggml_rounding.py", source, target, name], check=True)
            again, _ = ours(name, given)
            with np.load(target) as theirs:
                peer = theirs["seconds"]
                same = [bool((packed[i] == theirs[key]).all()) for i, key in enumerate(("plain", "known"))]
            speed = [given["weight"].size / min(a, b) / 1e6 for a, b in zip(first, again, strict=True)]
            peers = [given["weight"].size / each / 1e6 for each in peer]
            plain, known = (f"{a:6.0f} {b:6.1f} {a / b:6.1f}" for a, b in zip(speed, peers, strict=True))
            print(f"{name:8}       {plain}                    {known}    {same}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(BLOCK_TYPES))
