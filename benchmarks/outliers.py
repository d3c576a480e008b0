"""How much of what plain rounding loses to outlier channels the transforms win back.

    python benchmarks/outliers.py --calib TEXT --eval TEXT [--schemes W4A16,W3A16] [--factor 32] [--nsamples 64]

The bundled model is rewritten so that some channels are `factor` times larger and the columns that read them smaller,
which changes nothing it computes (tests/models/outliers.py). Perplexity is measured on windows of the other text, in
float32. Recovered: the share of the loss in mean log likelihood, beyond what the model loses without outliers, that is
won back.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from accuracy_runs import Yardstick

from roundel.data.bundled import bundled_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from models.outliers import inject  # noqa: E402

BENCH = ROOT / ".bench" / "outliers"
CHAINS = ("rtn", "smoothquant,rtn", "awq,rtn", "teq,rtn")


def quantize(model: Path, scheme: str, chain: str, arguments: argparse.Namespace) -> Path:
    out = BENCH / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "roundel", "quantize", str(model), str(out), "--scheme", scheme]
    command += ["--algorithm", chain]
    if chain != "rtn":
        command += ["--dataset", str(arguments.calib), "--nsamples", str(arguments.nsamples), "--seqlen", "256"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr[-3000:])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--schemes", default="W4A16,W3A16")
    parser.add_argument("--factor", type=int, default=32)
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=100)
    arguments = parser.parse_args()
    arguments.calib = arguments.calib.resolve()
    torch.set_num_threads(1)
    BENCH.mkdir(parents=True, exist_ok=True)
    plain = bundled_model()
    hurt = inject(plain, BENCH / "model", factor=arguments.factor)
    yardstick = Yardstick(plain, arguments.eval, arguments.windows)
    print(f"bundled model in float32: {yardstick.perplexity:.3f}\n")
    print("| scheme | algorithm | perplexity | with outliers | recovered |")
    print("| --- | --- | --- | --- | --- |")
    for scheme in arguments.schemes.split(","):
        best = yardstick.measure_ours(quantize(plain, scheme, "rtn", arguments))[0]
        worst = 0.0
        for chain in CHAINS:
            found = yardstick.measure_ours(quantize(hurt, scheme, chain, arguments))[0]
            worst = worst or found
            won = (math.log(worst) - math.log(found)) / (math.log(worst) - math.log(best))
            cells = (f"{best:.2f}", f"{found:.2f}", "") if chain == "rtn" else ("", f"{found:.2f}", f"{won:.0%}")
            print(f"| {scheme} | {chain} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
