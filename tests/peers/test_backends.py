"""Backends whose packages are no part of ours, in environments where they are installed.

ark runs on this processor. Triton's kernels run in its interpreter, and are compiled for cards that need not be there.
Of GPTQModel's classes it is tested what they are given, and what they refuse: their kernels need a card.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("ROUNDEL_PEERS", HERE.parents[1] / ".peers"))


def run(peer: str, program: str, *arguments: str) -> dict[str, float]:
    """What a program of this folder prints in a peer's environment."""
    python = PEERS / peer / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{peer} is not there: run `make peers`")
    done = subprocess.run(
        [str(python), str(HERE / program), *arguments], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("backend", "peer"), [("ark", "auto-round"), ("triton", "triton")])
def test_products_are_those_of_decoded_weights(backend: str, peer: str) -> None:
    shares = run(peer, "run_backend.py", backend)
    assert len(shares) > 20
    assert not {name: share for name, share in shares.items() if not share <= 1}
    assert max(shares.values()) > 0.01  # it was measured


def test_triton_kernels_compile_for_cards() -> None:
    shared = run("triton", "compile_kernels.py")
    assert len(shared) >= 8
    assert max(shared.values()) <= 99 * 1024, shared


def test_gptqmodel_is_given_what_its_own_packer_makes() -> None:
    found = run("gptqmodel", "run_gptqmodel.py")
    assert sum(name.endswith("packed") for name in found) > 20
    assert not {name: number for name, number in found.items() if number}
