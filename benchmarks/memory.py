"""Peak memory of algorithms that look at data, on a Llama-8B-shaped checkpoint whose activations lie on disk.

    python benchmarks/memory.py [--layers 2,8] [--chains gptq,...] [--nsamples 4] [--seqlen 512] [--batch-size 1]

Makes synthetic checkpoints of so many layers under .bench/ (0.44 GB of bf16 a layer), runs `roundel quantize --offload
disk` on each as a process of its own and prints its peak resident memory, beside the float32 weights of one block and
the activations that lie between blocks. W4G128.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from measuring import BENCH, Run, measure
from synthetic import SHAPES, Shape, make

VOCABULARY = 8192  # the embedding is read once, before the first block
CHAINS = "opt-rtn --imatrix,gptq,awq+rtn --n-grid 4,signround --iters 2"


def block_bytes(shape: Shape) -> int:
    """Of one decoder block in float32."""
    return sum(4 * a * b for name, (a, *rest) in shape.tensors() if ".layers.0." in name for b in rest)


def quantize(model: Path, chain: str, data: Path, arguments: argparse.Namespace) -> Run:
    name, *options = chain.split()
    out = BENCH / "memory"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "roundel", "quantize", str(model), str(out)]
    command += ["--algorithm", name.replace("+", ","), *options, "--dataset", str(data), "--offload", "disk"]
    for option in ("nsamples", "seqlen", "batch-size"):
        command += [f"--{option}", str(getattr(arguments, option.replace("-", "_")))]
    return measure(command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,8")
    parser.add_argument("--chains", default=CHAINS)
    parser.add_argument("--nsamples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()
    data = BENCH / "memory.jsonl"
    BENCH.mkdir(exist_ok=True)
    draw = random.Random(0)
    rows = [[draw.randrange(VOCABULARY) for _ in range(arguments.seqlen)] for _ in range(arguments.nsamples)]
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    one = replace(SHAPES["llama-8b"], layers=1, vocabulary=VOCABULARY)
    between = arguments.nsamples * arguments.seqlen * one.hidden * 4
    print(f"one block in float32: {block_bytes(one) / 1e9:.2f} GB; a stream of activations: {between / 1e9:.2f} GB\n")
    print("| algorithm | layers | peak GB | blocks of float32 | s |")
    print("| --- | --- | --- | --- | --- |")
    for chain in arguments.chains.split(","):
        for layers in map(int, arguments.layers.split(",")):
            model = make(BENCH / f"llama-8b-{layers}", replace(one, layers=layers), 2_000_000_000)
            run = quantize(model, chain, data, arguments)
            share = run.peak * 1e6 / block_bytes(one)
            print(f"| {chain} | {layers} | {run.peak / 1e3:.2f} | {share:.2f} | {run.wall:.0f} |", flush=True)


if __name__ == "__main__":
    main()
