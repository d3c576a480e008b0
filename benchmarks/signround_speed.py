"""How many tokens a second SignRound's tuning loop takes through a decoder block, beside auto-round's, in one run.

    python benchmarks/signround_speed.py [--runs 2] [--shapes qwen3-0.6b,qwen3-1.7b] [--steps 12] [--samples 16]
        [--tokens 512] [--batch 8] [--threads 2] [--no-peer]

The block is the first of a synthetic checkpoint (hidden 1024 and intermediate 3072; 2048 and 6144), W4G128 symmetric.
Both tools quantize that checkpoint, with the same samples, batch and threads; the time of a step is that between two
steps of the loop, the median of all but the first three, and the better of the runs counts. auto-round is run as it
comes, where it compiles, and without torch.compile. Of ours is shown the share of the machine's matrix-multiply peak
that is reached: the products that a step cannot do without (forward, gradient of inputs, gradient of weights) over its
time, against torch's best product of square matrices in the same run. Needs `make peers`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from measuring import BENCH, ROOT, matmul_peak
from synthetic import SHAPES, Shape, make

from roundel.data.bundled import bundled_model

VOCABULARY = 4096  # the block does not depend on it
WARM = 3  # steps that do not count


def model_of(name: str) -> tuple[Path, Shape]:
    """A checkpoint of one block, with the bundled model's tokenizer."""
    shape = replace(SHAPES[name], layers=1, vocabulary=VOCABULARY)
    folder = make(BENCH / f"{name}-1", shape)
    for path in bundled_model().glob("token*"):
        shutil.copy(path, folder)
    return folder, shape


def ours(model: Path, arguments: argparse.Namespace) -> float:
    """Seconds of a step; in a process of its own, as the peer is."""
    run = subprocess.run(
        [sys.executable, __file__, "--ours", str(model), *_settings(arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(run.stderr[-3000:])
    return float(json.loads(run.stdout.splitlines()[-1]))


def measure_ours(model: Path, arguments: argparse.Namespace) -> float:
    import roundel

    torch.set_num_threads(arguments.threads)
    generator, moments = torch.Generator().manual_seed(0), []
    data = torch.randint(0, VOCABULARY, (arguments.samples, arguments.tokens), generator=generator).tolist()
    out = BENCH / "signround"
    shutil.rmtree(out, ignore_errors=True)
    roundel.quantize(
        model,
        out,
        scheme="W4A16",
        algorithm="signround",
        iters=arguments.steps,
        nsamples=arguments.samples,
        seqlen=arguments.tokens,
        batch_size=arguments.batch,
        dataset=data,
        tick=lambda name, done, text: moments.append(time.perf_counter()) if text.startswith("loss") else None,
    )
    return _step(moments)


def theirs(model: Path, arguments: argparse.Namespace, compiled: bool) -> float:
    python = ROOT / ".peers" / "auto-round" / "bin" / "python"
    program = ROOT / "benchmarks" / "peers" / "auto_round_signround.py"
    numbers = (arguments.steps, arguments.samples, arguments.tokens, arguments.batch, arguments.threads, int(compiled))
    run = subprocess.run(
        [str(python), str(program), str(model), "W4A16", *map(str, numbers)],
        capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(run.stderr[-3000:])
    gaps: list[float] = json.loads(run.stdout.splitlines()[-1])["seconds"]
    return statistics.median(gaps[WARM:])


def _step(moments: list[float]) -> float:
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    return statistics.median(gaps[WARM:])


def _settings(arguments: argparse.Namespace) -> list[str]:
    names = ("steps", "samples", "tokens", "batch", "threads")
    return [text for name in names for text in (f"--{name}", str(getattr(arguments, name)))]


def operations(shape: Shape, batch: int, tokens: int) -> float:
    """Of a step: each weight takes part in three products of two operations for every token, and each pair of tokens
    (a causal half of them) in six of the attention's."""
    weights = sum(a * b for name, (a, *rest) in shape.tensors() if ".layers." in name for b in rest)
    attention = 6 * shape.heads * shape.head * tokens
    return batch * tokens * (6.0 * weights + attention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--shapes", default="qwen3-0.6b,qwen3-1.7b")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours is not None:
        print(json.dumps(measure_ours(arguments.ours, arguments)))
        return
    torch.set_num_threads(arguments.threads)
    loaded = f"{os.getloadavg()[0]:.1f}"
    print(f"{arguments.threads} threads, {platform.machine()}, {time.strftime('%Y-%m-%d')}; load {loaded}\n")
    print(f"batches of {arguments.batch} x {arguments.tokens} tokens; W4G128 symmetric\n")
    print("| block | tool | s a step | tokens/s | share of peak | auto-round / roundel |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in arguments.shapes.split(","):
        model, shape = model_of(name)
        fastest, best = 0.0, {}
        ours(model, argparse.Namespace(**{**vars(arguments), "steps": WARM + 2}))  # compiles the kernels once
        for _ in range(arguments.runs):
            fastest = max(fastest, matmul_peak())
            runs = {"roundel": lambda model=model: ours(model, arguments)}
            if not arguments.no_peer:
                runs["auto-round"] = lambda model=model: theirs(model, arguments, True)
                runs["auto-round, not compiled"] = lambda model=model: theirs(model, arguments, False)
            for tool, run in runs.items():
                best[tool] = min(best.get(tool, float("inf")), run())
        for tool, seconds in best.items():
            share = operations(shape, arguments.batch, arguments.tokens) / seconds / fastest
            ratio = "" if tool == "roundel" else f"{seconds / best['roundel']:.2f}"
            speed = arguments.batch * arguments.tokens / seconds
            print(f"| {name} | {tool} | {seconds:.3f} | {speed:.0f} | {share:.0%} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
