"""Our search for scales against auto-round's own code: on every matrix, at most its weighted error.

auto-round runs as a program in its own environment (`.peers/auto-round`, or `$ROUNDEL_PEERS/auto-round`); without it
these tests skip.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from roundel.algorithms.opt_rtn import OptRtn
from roundel.data.bundled import bundled_model
from roundel.scheme import ELEMENTS, Grid, Scheme

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("ROUNDEL_PEERS", HERE.parents[1] / ".peers"))
PYTHON = PEERS / "auto-round" / "bin" / "python"
NVFP4 = Grid(element=ELEMENTS["e2m1"], block=(1, 16), scale=Grid(element=ELEMENTS["e4m3"], block=(0, 0), scale="F32"))
JOBS = ("W2A16G32", "W2A16G64", "W3A16G64", "W4A16G64", "W5A16G64", "MXFP4", "MXFP8", "NVFP4")

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"auto-round is not installed: no {PYTHON}")


@pytest.fixture(scope="module")
def matrices() -> dict[str, Tensor]:
    """Rows of the bundled model's matrices, as bfloat16 (which auto-round searches in) and as float32, with the mean
    squares of made-up inputs or without."""
    tensors = load_file(bundled_model() / "model.safetensors")
    found: dict[str, Tensor] = {}
    for number, (name, weight) in enumerate(sorted(tensors.items())):
        if ".layers.1." not in name or weight.ndim != 2:
            continue
        for dtype in (torch.bfloat16, torch.float32):
            key = f"{name}.{dtype}"
            found[key] = weight[:16].to(dtype).contiguous()
            drawn = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(number))
            found[f"{key}.known"] = found[key].clone()
            found[f"{key}.known.imatrix"] = torch.exp(1.5 * drawn)
    return found


@pytest.fixture(scope="module")
def theirs(matrices: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("search")
    save_file(matrices, folder / "in.safetensors")
    command = [PYTHON, HERE / "run_auto_round_search.py", folder / "in.safetensors", folder / "out.safetensors"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return load_file(folder / "out.safetensors")


@pytest.mark.parametrize("job", JOBS)
def test_at_most_its_error(job: str, matrices: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    grid = NVFP4 if job == "NVFP4" else Scheme.parse(job).weight
    worse, gained = [], []
    for name in matrices:
        if name.endswith(".imatrix"):
            continue
        weight, importance = matrices[name], matrices.get(f"{name}.imatrix")
        counted = 1.0 if importance is None else importance.double()
        their_error = float(((theirs[f"{name}/{job}"].double() - weight.double()).square() * counted).sum())
        ours = OptRtn().search(weight, grid, importance)
        gained.append(ours.error / their_error)
        if ours.error > their_error * (1 + 1e-6):
            worse.append((name, ours.error, their_error))
    assert len(gained) == 28
    assert not worse
    print(f"{job}: {min(gained):.4f} to {max(gained):.4f} of its error")
