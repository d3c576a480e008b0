"""Our block types against ggml's own quantizer: the same bytes, with and without importance, and the same numbers read.

ggml runs as a program in an environment of its own (`.peers/gguf`, or `$ROUNDEL_PEERS/gguf`); without it these tests
skip.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ops.block_cases import MATRICES, importance_of, matrix
from roundel.data.bundled import bundled_model
from roundel.formats.gguf.block_types import BLOCK_TYPES
from roundel.ops.blocks import round_blocks

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("ROUNDEL_PEERS", HERE.parents[1] / ".peers"))
PYTHON = PEERS / "gguf" / "bin" / "python"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"xllamacpp is not installed: no {PYTHON}")


@pytest.fixture(scope="module")
def matrices() -> dict[str, Tensor]:
    """Made-up matrices, and rows of the bundled model's; each with importance and without."""
    found = {kind: matrix(kind, (8, 1024)) for kind in MATRICES}
    for name, weight in sorted(load_file(bundled_model() / "model.safetensors").items()):
        if weight.ndim == 2 and ".layers.1." in name:
            flat = weight.float().flatten()
            found[name] = flat[: flat.numel() // 1024 * 1024].view(-1, 1024)[:32].clone()
    return found


@pytest.fixture(scope="module")
def theirs(matrices: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("ggml")
    given = {name: weight.numpy() for name, weight in matrices.items()}
    given |= {f"{name}.known": weight.numpy() for name, weight in matrices.items()}
    given |= {f"{name}.known.imatrix": importance_of(1024).numpy() for name in matrices}
    np.savez(folder / "in.npz", **given)
    command = [PYTHON, HERE / "run_ggml.py", folder / "in.npz", folder / "out.npz", *BLOCK_TYPES]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    with np.load(folder / "out.npz") as found:
        return {name: torch.from_numpy(found[name]) for name in found.files}


@pytest.mark.parametrize("known", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_same_bytes(name: str, known: bool, matrices: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    kind = BLOCK_TYPES[name]
    for key, weight in matrices.items():
        expected = theirs[f"{key}{'.known' * known}/{name}"]
        ours = kind.pack_stored(round_blocks(weight, name, importance_of(1024) if known else None))
        differing = (ours != expected).view(-1, kind.nbytes).any(-1)
        assert not differing.any(), f"{key}: {int(differing.sum())} of {differing.numel()} blocks"


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_same_numbers_read(name: str, theirs: dict[str, Tensor], matrices: dict[str, Tensor]) -> None:
    for key in matrices:
        for which in (key, f"{key}.known"):
            decoded = BLOCK_TYPES[name].unpack(theirs[f"{which}/{name}"]).decode()
            assert torch.equal(decoded, theirs[f"{which}/{name}/decoded"]), which
