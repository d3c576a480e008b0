"""A file of importances that we wrote, in llama.cpp's quantizer: its blocks are those that we round with that file.

llama.cpp's source and library stand in `.peers/llama-cpp` (or `$ROUNDEL_PEERS/llama-cpp`); without them this skips.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

import roundel
from roundel.data.bundled import bundled_model
from roundel.formats.gguf.mixtures import MIXTURES
from roundel.io.gguf import read_gguf, read_tensor

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("ROUNDEL_PEERS", HERE.parents[1] / ".peers"))
PYTHON = PEERS / "llama-cpp" / "bin" / "python"
LIBRARY = PEERS / "llama-cpp" / "build" / "bin" / "libllama.so"

pytestmark = pytest.mark.skipif(
    not (PYTHON.exists() and LIBRARY.exists()), reason=f"llama.cpp is not there: no {PYTHON} or no {LIBRARY}"
)


def ran(*arguments: object) -> str:
    done = subprocess.run(
        [PYTHON, HERE / "llama_cpp.py", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_llama_cpp_rounds_with_our_file_as_we_do(tmp_path: Path) -> None:
    kept = tmp_path / "imatrix.gguf"
    roundel.quantize(
        bundled_model(), tmp_path / "seen", format="gguf:q4_k_m", algorithm="opt-rtn", imatrix=True, dataset="bundled",
        nsamples=4, seqlen=64, save_imatrix=kept,
    )  # fmt: skip
    ran("convert", bundled_model(), tmp_path / "whole.gguf", "f32")
    mixtures = ("q4_k_m", "q2_k", "q3_k_m", "q5_k_m", "q6_k", "q4_0", "iq4_nl")
    numbers = [MIXTURES[name].file_type for name in mixtures]
    answers = ran("quantize", tmp_path / "whole.gguf", tmp_path / "theirs-{}.gguf", kept, *numbers).splitlines()
    assert [json.loads(line)["failed"] for line in answers if line.startswith("{")] == [0] * len(mixtures)
    for name, number in zip(mixtures, numbers, strict=True):
        roundel.quantize(bundled_model(), tmp_path / name, format=f"gguf:{name}", imatrix=str(kept))
        ours = next((tmp_path / name).glob("*.gguf"))
        theirs = json.loads(ran("see", tmp_path / f"theirs-{number}.gguf"))[str(tmp_path / f"theirs-{number}.gguf")]
        header = read_gguf(ours)
        assert set(header.tensors) == set(theirs["tensors"])
        different = [
            tensor
            for tensor, (kind, _, digest) in theirs["tensors"].items()
            if (header.tensors[tensor].type, hashlib.sha256(read_tensor(ours, header.places[tensor])).hexdigest())
            != (kind, digest)
        ]
        assert not different, (name, different)
