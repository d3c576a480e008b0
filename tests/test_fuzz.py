"""Every reader of a quantized format against checkpoints that are senseless at random: each is read or refused, in
little time and memory, and never crashes anything.

`ROUNDEL_FUZZ=2000 pytest tests/test_fuzz.py` tries that many of each kind in place of `CASES`.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

import roundel
from models.pico import build, build_fp8, build_nvfp4
from mutations import mutated, sound
from roundel.checkpoint import open_checkpoint
from roundel.errors import GridError, QuantizationError
from roundel.inspection import inspect_checkpoint
from roundel.verification import verify

CASES = int(os.environ.get("ROUNDEL_FUZZ", "25"))
SECONDS = 10  # of a processor, for one checkpoint of a hundred kilobytes
GROWN = 200 << 20  # bytes of memory, over all of them: what is loaded the first time a way is taken, and no more
SMALL = {"num_hidden_layers": 1}
GOLDEN = Path(__file__).parent / "data" / "golden"
KINDS: dict[str, Callable[[Path], Path]] = {
    **{
        f"{name}-{scheme}": lambda folder, name=name, scheme=scheme: written(folder, name, scheme)
        for name, scheme in (
            ("auto_round", "W4A16G32"), ("auto_round", "W4A16G32_ASYM"), ("auto_round", "W3A16G32_ASYM"),
            ("auto_round", "MXFP4"), ("auto_round", "MXINT4"), ("auto_round", "FP8_BLOCK"),
            ("auto_round", "FPW8A16"), ("auto_round:mlx", "W4A16G32_ASYM"),
            ("auto_gptq", "W4A16G32_ASYM"), ("gptq_v2", "W2A16G32"), ("auto_awq", "W4A16G32_ASYM"),
            ("llm_compressor", "W4A16G32_ASYM"), ("llm_compressor", "INT8_W8A8"), ("llm_compressor", "W3A16G32"),
            ("llm_compressor", "FP8_DYNAMIC"), ("llm_compressor", "FPW8A16"), ("llm_compressor", "MXFP8"),
            ("llm_compressor", "NVFP4A16"), ("fp8", "FP8_BLOCK"), ("mlx", "W4A16G32"), ("mlx", "W3A16G32_ASYM"),
            ("mlx", "MXFP4A16"), ("bnb", "NF4"), ("bnb", "NF4_DQ"), ("hqq", "W4A16G32_ASYM"), ("hqq", "W3A16G32"),
            ("hqq", "W1A16G32_HQQ"),
        )
    },
    "fp8-foreign": lambda folder: build_fp8(folder / "m", block_size=32, **SMALL),
    "modelopt": lambda folder: build_nvfp4(folder / "m", "modelopt", **SMALL),
    "mxfp4": lambda folder: build("gpt_oss", folder / "m", **SMALL),
    **{f"{name}-foreign": lambda folder, name=name: GOLDEN / name for name in ("gptq", "hqq")},
}  # fmt: skip


def written(folder: Path, name: str, scheme: str) -> Path:
    """A checkpoint of ours."""
    model = build("llama", folder / "plain", **SMALL)
    roundel.quantize(model, folder / "packed", scheme=scheme, format=name)
    return folder / "packed"


def read(folder: Path, out: Path) -> None:
    """All that people do with a checkpoint that reads its weights."""
    checkpoint = open_checkpoint(folder)
    try:
        inspect_checkpoint(checkpoint).to_dict()
    finally:
        checkpoint.close()
    verify(folder)
    roundel.plan(folder)
    roundel.convert(folder, out, format="llm_compressor", requantize=True, workers=1)


def too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


@pytest.mark.parametrize("kind", KINDS)
def test_senseless_checkpoints_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    seed, chance = sound(KINDS[kind](tmp_path)), random.Random(kind)
    folder, out = tmp_path / "mutated", tmp_path / "out"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    former = signal.signal(signal.SIGPROF, too_long)
    try:
        for number in range(CASES):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(out, ignore_errors=True)
            folder.mkdir()
            mutated(seed, chance).write(folder, chance)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                read(folder, out)
            except GridError as error:
                pytest.fail(f"{kind} {number}: {error}")
            except QuantizationError as error:
                assert len(str(error)) < 20_000
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GROWN
