"""Products by one matrix, backend by backend: of one input, and of a prompt's.

    python benchmarks/products.py [--device cpu] [--threads 1] [--shape 4096x14336] [--schemes W4A16,...] [--prompt 512]
    python benchmarks/inference.py --device cuda           # the same, on a card

Every row is a process of its own, those of ark and of auto-round in the environment that `make peers` makes for them.
Matrices are random, several of them in turn, so that no cache holds one (400 MB of weights on a card, 100 MB on a CPU).
On a card products are recorded as a graph and replayed, so that starting kernels is not what is measured, and the best
of several is taken; on a CPU it is the best processor time, divided by the threads, for a machine that others use too.
The share of bandwidth is bytes of packed weights over time, against the best of torch's sums (400 MB; 4 GB on a card).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / ".peers" / "auto-round" / "bin" / "python"
ROWS = {"cpu": ("numba", "ark", "torch", "auto-round torch"), "cuda": ("triton", "marlin", "exllamav2", "torch")}
FOREIGN = ("ark", "auto-round torch")
SCALES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def best(run: Callable[[], object], count: int, device: str) -> float:
    """Seconds of one of `count` products that a call makes."""
    if device == "cpu":
        times = []
        for _ in range(6):
            started = time.process_time()
            run()
            times.append(time.process_time() - started)
        return min(times) / count / torch.get_num_threads()
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return min(times) / count


def bandwidth(device: str) -> float:
    """Bytes a second that torch's sums read."""
    numbers = torch.ones(100_000_000 if device == "cpu" else 1_000_000_000, device=device)
    return numbers.nbytes / best(numbers.sum, 1, device)


def timed(modules: Sequence[Callable], width: int, prompt: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, tokens in (("one", 1), ("few", 8), ("prompt", prompt)):
        x = torch.randn(tokens, width, generator=generator).to(device, dtype)
        used = modules if tokens <= 16 else modules[:2]

        def run(used: Sequence[Callable] = used, x: torch.Tensor = x) -> None:
            for module in used:
                module(x)

        with torch.inference_mode():
            found[name] = best(run, len(used), device)
    return found


def copies(nbytes: float, device: str) -> int:
    return max(1, min(64, math.ceil((1e8 if device == "cpu" else 4e8) / nbytes)))


def floats(shape: tuple[int, int], prompt: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """torch's own product of a float matrix."""
    weights = [torch.randn(shape, device=device).to(dtype) for _ in range(copies(shape[0] * shape[1] * 2, device))]
    modules = [lambda x, weight=weight: torch.nn.functional.linear(x, weight) for weight in weights]
    return timed(modules, shape[1], prompt, dtype, device) | {"nbytes": weights[0].nbytes}


def row(name: str, scheme: str, shape: tuple[int, int], prompt: int, device: str) -> dict[str, float]:
    """Seconds of a product, or none where the backend does not take the matrix, or is not there."""
    sys.path.insert(0, str(ROOT / "src"))
    from roundel.inference.backends import BACKENDS
    from roundel.inference.gptqmodel import word_parts
    from roundel.scheme import Scheme
    from roundel.tensor import QuantizedTensor
    from roundel.unit import Layer, Stored

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if name in ("float32", "bfloat16"):
        return floats(shape, prompt, getattr(torch, name), device)
    kind = Scheme.parse(scheme)
    grid = kind.weight
    layer = Layer(
        name="matrix", shape=shape, dtype="BF16", scheme=kind, stored=Stored(format="auto_round", scheme=kind)
    )
    backend = BACKENDS.get(name)
    if backend is None and (grid.element.name != "int4" or not grid.is_integer_in_groups):
        return {}
    if backend is not None and (backend.refuse(layer, device) or backend.needs):
        return {}
    blocks, modules, nbytes = grid.blocks(shape), [], 0
    for _ in range(copies(shape[0] * shape[1] * grid.element.bits / 8, device)):
        if grid.element.is_integer:
            codes = torch.randint(int(grid.element.lo), int(grid.element.hi) + 1, shape, device=device)
            codes = codes.to(torch.int8 if grid.symmetric else torch.uint8)
            scale = (torch.rand(blocks, device=device) * 0.01).to(SCALES[str(grid.scale)])
            zero = None if grid.symmetric else codes[:, : blocks[1]].contiguous()
        else:
            codes = torch.randint(0, 16, shape, device=device, dtype=torch.uint8)
            exponents = torch.randint(110, 120, blocks, device=device, dtype=torch.uint8)
            scale, zero = exponents.view(torch.float8_e8m0fnu), None
        quantized = QuantizedTensor(grid=grid, codes=codes, scale=scale, zero=zero)
        if backend is None:
            from auto_round_extension.torch.qlinear_torch import QuantLinear

            made = QuantLinear(4, kind.group_size, shape[1], shape[0], False)
            for part in ("qweight", "qzeros", "scales"):
                setattr(made, part, word_parts(quantized, name)[0][part])
        else:
            made = backend.make(layer, quantized)
        modules.append(made)
        nbytes = sum(b.nbytes for b in (*made.buffers(), *made.parameters()))
    return timed(modules, shape[1], prompt, dtype, device) | {"nbytes": nbytes}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", default="4096x14336")
    parser.add_argument("--schemes", default="W4A16,W4A16G32_ASYM,W2A16,W3A16,W8A16,MXFP4")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--backends", default="", help="only these, by commas")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    out, width = map(int, arguments.shape.split("x"))
    torch.set_num_threads(arguments.threads)
    kind = torch.device(arguments.device).type
    if arguments.row:
        name, scheme = arguments.row.split(":")
        print(json.dumps(row(name, scheme, (out, width), arguments.prompt, arguments.device)))
        return
    peak = bandwidth(arguments.device)
    where = f"{arguments.threads} threads" if kind == "cpu" else torch.cuda.get_device_name(arguments.device)
    print(f"{where}, {peak / 1e9:.1f} GB/s read; [{out}, {width}]")
    whole = "float32" if kind == "cpu" else "bfloat16"
    print(f"| | | µs | GB/s | share | µs for 8 | ms for {arguments.prompt} | times {whole}'s |")
    print("|---|---|---|---|---|---|---|---|")
    prompt = 0.0
    wanted = [(whole, "")] + [(n, s) for s in arguments.schemes.split(",") for n in ROWS[kind]]
    chosen = arguments.backends.split(",") if arguments.backends else [whole, *ROWS[kind]]
    wanted = [(name, scheme) for name, scheme in wanted if name in chosen]
    given = ["--device", arguments.device, "--shape", arguments.shape, "--prompt", str(arguments.prompt)]
    for name, scheme in wanted:
        python = str(PEER) if name in FOREIGN else sys.executable
        if not Path(python).exists():
            continue
        command = [python, __file__, *given, "--threads", str(arguments.threads), "--row", f"{name}:{scheme}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} {scheme}: {done.stderr[-3000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        if not found:
            continue
        prompt = prompt or found["prompt"]
        speed = found["nbytes"] / found["one"]
        cells = [f"{1e6 * found['one']:.1f}", f"{speed / 1e9:.1f}", f"{speed / peak:.0%}", f"{1e6 * found['few']:.1f}"]
        cells += [f"{1e3 * found['prompt']:.3f}", f"{found['prompt'] / prompt:.2f}"]
        print(f"| {name} | {scheme} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
