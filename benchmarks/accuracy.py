"""Perplexity after rounding, beside the peers: the same model, samples, schemes and measure for everybody.

    python benchmarks/accuracy.py --calib TEXT --eval TEXT [--model FOLDER] [--schemes W4G128,W2G64] [--grids sym,asym]
        [--seeds 1,2,3] [--nsamples 128] [--seqlen 256] [--iters 200] [--windows 200] [--only gptq,awq] [--no-ours]
        [--fresh]

The text to calibrate with is cut into samples of `seqlen` tokens once; a seed shuffles them and keeps the first
`nsamples`, and seeds what the tools draw themselves. Every tool is run as a program of its own, the peers in their own
environments (`make peers`), and writes a checkpoint; what a peer's decodes to is proven to lie on the grid that was
asked for; all are measured by the same code, in float32, on windows of the other text. Peers' results are kept under
.bench/accuracy/ by their settings, so only ours are run again; `--fresh` runs all. Prints tables for
docs/benchmarks.md; its status is 1 where a tool failed or ours is worse.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accuracy_runs import BENCH, WINDOW, Bench, Failed, Measured, Yardstick
from contenders import GRIDS, Duel, Scheme, duels

from roundel.calibration.tokenizer import load_tokenizer
from roundel.data.bundled import bundled_model
from roundel.evaluation.perplexity import windows

NOISE = 1.003  # ours may be this many times theirs
SEEDLESS = (1,)  # one run is enough for a way that looks at no data


@dataclass(frozen=True)
class Row:
    """One way and what it came to over the seeds; no results where it failed."""

    name: str
    results: tuple[Measured, ...]
    failure: str = ""

    @property
    def mean(self) -> float:
        return sum(r.perplexity for r in self.results) / len(self.results)

    def perplexity(self) -> str:
        """Mean, and half of the range over the seeds."""
        if not self.results:
            return "failed"
        found = [r.perplexity for r in self.results]
        return f"{self.mean:.3f} ± {(max(found) - min(found)) / 2:.3f}" if len(found) > 1 else f"{self.mean:.3f}"

    def cells(self) -> str:
        if not self.results:
            return f"| {self.name} | | failed: {self.failure} | | |"
        divergence, seconds = (
            sum(getattr(r, name) for r in self.results) / len(self.results) for name in ("divergence", "seconds")
        )
        bits = self.results[0].bits_per_weight
        return f"| {self.name} | {bits:.3f} | {self.perplexity()} | {divergence:.4f} | {seconds:.1f} |"


def collect(name: str, run: Callable[[int], Measured], seeds: Sequence[int]) -> Row:
    """`run(seed)` for each seed, said on stderr."""
    results = []
    for seed in seeds:
        started = time.perf_counter()
        try:
            results.append(run(seed))
        except Failed as failure:
            print(f"{name}, seed {seed}: {failure}", file=sys.stderr, flush=True)
            return Row(name, (), str(failure))
        took = time.perf_counter() - started
        print(f"{name}, seed {seed}: {results[-1].perplexity:.3f}, {took:.0f} s", file=sys.stderr, flush=True)
    return Row(name, tuple(results))


def play(bench: Bench, scheme: Scheme, chosen: Sequence[Duel], seeds: Sequence[int], with_ours: bool) -> bool:
    """Run and print one scheme's tables. False where something failed or ours is worse."""
    grid, rows, verdicts = "sym" if scheme.symmetric else "asym", {}, []
    for duel in chosen:
        theirs = []
        for peer in (p for p in duel.peers if grid in p.grids):
            if peer.name not in rows:
                rows[peer.name] = collect(
                    f"{scheme}, {peer.name}",
                    lambda seed, peer=peer: bench.peer(peer, scheme, seed),
                    seeds if peer.looks_at_data else SEEDLESS,
                )
            theirs.append(peer.name)
        if with_ours and theirs:
            ours = collect(
                f"{scheme}, {duel.name}",
                lambda seed, duel=duel: bench.ours(duel, scheme, seed),
                seeds if duel.looks_at_data else SEEDLESS,
            )
            rows[f"**roundel {duel.name}**"] = ours
            verdicts += [(duel.name, ours, name, rows[name]) for name in theirs]
    print(f"\n### {scheme}\n\n| | bits for each weight | perplexity | KL divergence | processor s |")
    print("| --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        print(Row(name, row.results, row.failure).cells())
    good = all(row.results for row in rows.values())
    if verdicts:
        print(f"\n| roundel | perplexity | peer | perplexity | ours / theirs | at most {NOISE} |")
        print("| --- | --- | --- | --- | --- | --- |")
    for name, ours, peer_name, peer_row in verdicts:
        ratio = ours.mean / peer_row.mean if ours.results and peer_row.results else float("nan")
        good = good and ratio <= NOISE
        verdict = "yes" if ratio <= NOISE else "**no**"
        print(f"| {name} | {ours.perplexity()} | {peer_name} | {peer_row.perplexity()} | {ratio:.4f} | {verdict} |")
    sys.stdout.flush()
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; the bundled model when left out")
    parser.add_argument("--calib", type=Path, required=True, help="text to calibrate with")
    parser.add_argument("--eval", type=Path, required=True, help="text to measure on")
    parser.add_argument("--schemes", default="W4G128,W3G128,W2G64,W2G32")
    parser.add_argument("--grids", default=",".join(GRIDS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--iters", type=int, default=200, help="steps of SignRound, ours and auto-round's")
    parser.add_argument("--windows", type=int, default=200, help=f"windows of {WINDOW} tokens to measure on")
    parser.add_argument("--only", default="", help="of ours, and their peers: rtn, opt-rtn, signround, gptq, awq, hqq")
    parser.add_argument("--no-ours", action="store_true", help="peers alone")
    parser.add_argument("--fresh", action="store_true", help="run peers again whose results are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    BENCH.mkdir(parents=True, exist_ok=True)
    model = (arguments.model or bundled_model()).resolve()
    chosen = [
        d
        for d in duels(arguments.iters)
        if not arguments.only or d.algorithm.split(",")[0] in arguments.only.split(",")
    ]
    yardstick = Yardstick(model, arguments.eval, arguments.windows)
    bench = Bench(
        model=model,
        model_digest=hashlib.sha256(b"".join(f.read_bytes() for f in sorted(model.glob("*.safetensors")))).hexdigest(),
        yardstick=yardstick,
        nsamples=arguments.nsamples,
        seqlen=arguments.seqlen,
        samples=windows(arguments.calib.read_text(encoding="utf-8"), load_tokenizer(model), arguments.seqlen),
        fresh=arguments.fresh,
    )
    print(
        f"{model.name}, {len(yardstick.windows)} windows of {WINDOW} tokens of {arguments.eval.name}; "
        f"{arguments.nsamples} of {len(bench.samples)} samples of {arguments.seqlen} tokens of {arguments.calib.name}, "
        f"seeds {arguments.seeds}; perplexity in float32 {yardstick.perplexity:.3f}; {time.strftime('%Y-%m-%d')}"
    )
    if len(bench.samples) < arguments.nsamples:
        parser.error(f"{arguments.calib} holds {len(bench.samples)} samples of {arguments.seqlen} tokens")
    seeds, good = [int(seed) for seed in arguments.seeds.split(",")], True
    for name in arguments.schemes.split(","):
        for grid in arguments.grids.split(","):
            good = play(bench, Scheme.parse(name, grid), chosen, seeds, not arguments.no_ours) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
