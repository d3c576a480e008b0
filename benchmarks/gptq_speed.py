"""Seconds that GPTQ takes for each layer of a decoder block, beside GPTQModel's own on the same inputs, in one run.

    python benchmarks/gptq_speed.py [--runs 3] [--shapes 1024x3072,2048x6144] [--samples 16] [--threads 2] [--no-peer]

The blocks are synthetic: seven matrices, inputs of correlated channels, `samples` x 2048 tokens. Both tools collect the
Hessian of inputs that several layers share once, round at W4G128 symmetric with their defaults (group-aware order), and
are told to use the same threads; they take turns, and of each time the best of the runs is shown. Of ours are shown
also the plain range in place of searched scales (`trials=0`), and the share of the machine's matrix-multiply peak that
is reached: useful operations (in * in a token for the Hessian, in^3 / 3 for its factors, in * in * out for feedback)
over the time, against torch's best product of square matrices in the same run. Needs `make peers`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measuring import ROOT, matmul_peak

from roundel.algorithms.gptq import Gptq
from roundel.algorithms.hessians import Collector
from roundel.scheme import Scheme
from roundel.unit import Layer, Stored, Unit

BENCH = ROOT / ".bench" / "gptq"
TOKENS, BATCH = 2048, 8
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Times:
    """Of the layers that share one input: seconds on the clock and of processor, of collecting their Hessian and of
    rounding them; and their output error, relative to the output, on average."""

    collecting: tuple[float, float]
    rounding: tuple[float, float]
    error: float

    def least(self, other: Times) -> Times:
        """The lesser of each."""
        pairs = ((self.collecting, other.collecting), (self.rounding, other.rounding))
        collecting, rounding = ((min(a[0], b[0]), min(a[1], b[1])) for a, b in pairs)
        return Times(collecting, rounding, self.error)


def make(hidden: int, inner: int, samples: int) -> dict[str, tuple[int, int]]:
    """Write weights and inputs of a block; layer -> [out, in]."""
    generator = torch.Generator().manual_seed(0)
    BENCH.mkdir(parents=True, exist_ok=True)
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    shapes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for group in GROUPS:
        width = shapes[group[0]][1]
        mixing = torch.randn(width // 4, width, generator=generator) / (width // 4) ** 0.5
        x = torch.randn(samples, TOKENS, width // 4, generator=generator) @ mixing
        x += 0.5 * torch.randn(x.shape, generator=generator)
        x *= torch.exp(0.7 * torch.randn(width, generator=generator))
        np.save(BENCH / f"{group[0]}.inputs.npy", x.numpy())
        for name in group:
            np.save(BENCH / f"{name}.npy", (torch.randn(shapes[name], generator=generator) * 0.02).numpy())
    return shapes


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    now = clock()
    return now[0] - start[0], now[1] - start[1]


def ours(shapes: Mapping[str, tuple[int, int]], options: Mapping[str, int]) -> dict[str, Times]:
    """Each group of layers collected and rounded as `Gptq.quantize` does it; by the group's first layer."""
    found: dict[str, Times] = {}
    for group in GROUPS:
        inputs = torch.from_numpy(np.load(BENCH / f"{group[0]}.inputs.npy"))
        layers = tuple(
            Layer(name=name, shape=shapes[name], dtype="F32", scheme=Scheme.parse("W4A16"), stored=Stored())
            for name in group
        )
        weights = {layer.tensor: torch.from_numpy(np.load(BENCH / f"{layer.name}.npy")) for layer in layers}
        start = clock()
        collector = Collector(1 << 40)
        for batch in inputs.split(BATCH):
            for name in group:
                collector.see(name, batch.flatten(0, 1))
        (hessian,) = collector.finish()
        collecting, start = since(start), clock()
        rounded = Gptq(**options).round(Unit(name="block", layers=layers, weights=weights), layers, hessian)
        rounding = since(start)
        rows = inputs.flatten(0, 1)[:: inputs.shape[0]]
        errors = [
            float((rows @ (weights[layer.tensor] - rounded[layer.name].tensor.decode()).T).square().sum())
            / float((rows @ weights[layer.tensor].T).square().sum())
            for layer in layers
        ]
        found[group[0]] = Times(collecting, rounding, sum(errors) / len(errors))
    return found


def theirs(threads: int, peer: Path) -> dict[str, Times]:
    job = {"folder": str(BENCH), "groups": GROUPS, "bits": 4, "group_size": 128, "sym": True, "options": {}}
    (BENCH / "job.json").write_text(json.dumps(job | {"threads": threads, "batch": BATCH}))
    program = ROOT / "benchmarks" / "peers" / "gptqmodel_layers.py"
    run = subprocess.run([str(peer), str(program), str(BENCH / "job.json")], capture_output=True, text=True)
    told = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not told:
        raise SystemExit(run.stderr[-3000:])
    return {
        name: Times(tuple(each[0]), tuple(each[1]), each[2])
        for name, each in json.loads(told[0].removeprefix("RESULT ")).items()
    }


def operations(shapes: Mapping[str, tuple[int, int]], group: Sequence[str], tokens: int) -> tuple[float, float]:
    """That collecting and rounding cannot do without: products of half a matrix, its factors, feedback."""
    width = shapes[group[0]][1]
    return float(tokens) * width**2, width**3 / 3 + sum(width * shapes[name][0] * width for name in group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shapes", default="1024x3072,2048x6144")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-peer", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    peer = ROOT / ".peers" / "gptqmodel" / "bin" / "python"
    print(
        f"{arguments.threads} threads, {platform.machine()}, {time.strftime('%Y-%m-%d')}; load {os.getloadavg()[0]:.1f}"
    )
    for shape in arguments.shapes.split(","):
        hidden, inner = (int(each) for each in shape.split("x"))
        shapes, best = make(hidden, inner, arguments.samples), {}
        contenders: dict[str, Callable[[], dict[str, Times]]] = {
            "roundel": lambda shapes=shapes: ours(shapes, {}),
            "roundel, trials=0": lambda shapes=shapes: ours(shapes, {"trials": 0}),
        }
        if peer.exists() and not arguments.no_peer:
            contenders["GPTQModel"] = lambda: theirs(arguments.threads, peer)
        ours({**shapes}, {})  # compiles the kernels once after an install
        fastest = 0.0
        for _ in range(arguments.runs):
            fastest = max(fastest, matmul_peak())
            for name, run in contenders.items():
                times = run()
                best[name] = {g: t.least(best[name][g]) for g, t in times.items()} if name in best else times
        show(shape, shapes, best, arguments.samples * TOKENS, fastest)


def show(
    shape: str, shapes: Mapping[str, tuple[int, int]], best: Mapping[str, dict[str, Times]], tokens: int, fastest: float
) -> None:
    print(f"\n## {shape}, {tokens} tokens; torch multiplies at {fastest / 1e9:.0f} Gop/s\n")
    print("| layers | tool | Hessian s | share of peak | rounding s (processor s) | share of peak | output error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for group in GROUPS:
        collecting, rounding = operations(shapes, group, tokens)
        for name, times in best.items():
            t = times[group[0]]
            shares = collecting / t.collecting[0] / fastest, rounding / t.rounding[0] / fastest
            print(
                f"| {', '.join(group)} | {name} | {t.collecting[0]:.2f} | {shares[0]:.0%} | "
                f"{t.rounding[0]:.2f} ({t.rounding[1]:.2f}) | {shares[1]:.0%} | {t.error:.5f} |"
            )
    totals = {
        name: [
            sum(part[i] for t in times.values() for part in parts(t)) / len(shapes)
            for parts in (lambda t: (t.rounding,), lambda t: (t.collecting, t.rounding))
            for i in (0, 1)
        ]
        for name, times in best.items()
    }
    print("\n| a layer, on average | rounding s | (processor) | with its share of Hessians s | (processor) |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in totals.items():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    if "GPTQModel" in totals:
        for name in ("roundel", "roundel, trials=0"):
            ratios = [theirs / own for theirs, own in zip(totals["GPTQModel"], totals[name], strict=True)]
            print(f"| GPTQModel / {name} | " + " | ".join(f"{ratio:.1f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
