"""Tokens a second of a loaded W4A16 model on this machine's processor, beside float models and llama.cpp, in one run.

    python benchmarks/inference.py [--shape llama-1b] [--threads 2] [--tokens 32] [--prompt 512] [--skip NAME,...]

The model is synthetic: the shape of Llama-3.2-1B (1.24 billion weights, the head tied), W4A16 symmetric in groups of
128, once with the head kept in bfloat16 and once with it rounded too. Every row is a process of its own. Writing: a
prompt of 16 tokens, then tokens one by one, the median time of one. Reading: 512 tokens at once, the better of two.
The time to the first token is that of loading and the prompt; what importing transformers takes is not in it. bfloat16
writes no text, for torch emulates it on processors that have no instructions for it: its row is the time of its matrix
products alone, each shape measured, which no model of it can be faster than. The share of bandwidth is bytes
of weights that a token reads over its time, against the best of torch's sums of 400 MB. llama.cpp needs `make peers`.
On a card (--device cuda) products by single matrices are measured, which products.py does.
--clock cpu counts processor time instead, for a machine that others use too: with --threads 1 it means the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import products
import torch
from measuring import BENCH, ROOT
from synthetic import SHAPES, make

import roundel
from roundel.memory import peak_memory

clock = time.process_time if "cpu" in sys.argv else time.perf_counter
ROWS = ("numba, head kept", "numba, head rounded", "float32", "bfloat16", "llama.cpp Q4_0", "llama.cpp, head in f16")


def bandwidth() -> float:
    """Bytes a second that torch's sums read."""
    numbers, best = torch.ones(100_000_000), float("inf")
    for _ in range(8):
        started = clock()
        numbers.sum()
        best = min(best, clock() - started)
    return numbers.nbytes / best


def timed(model: torch.nn.Module, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a token that is written, and of a prompt that is read."""
    generator = torch.Generator().manual_seed(0)

    def prompt(length: int) -> torch.Tensor:
        return torch.randint(0, 30000, (1, length), generator=generator)

    with torch.inference_mode():
        started = clock()
        output = model(input_ids=prompt(16), use_cache=True, logits_to_keep=1)
        first = clock() - started
        steps = []
        for _ in range(arguments.tokens):
            started = clock()
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            steps.append(clock() - started)
        reads = []
        for _ in range(2):
            entering = prompt(arguments.prompt)
            started = clock()
            model(input_ids=entering, use_cache=True, logits_to_keep=1)
            reads.append(clock() - started)
    return {"first": first, "token": statistics.median(steps), "best": min(steps), "prompt": min(reads)}


def ours(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    import_transformers()
    started = clock()
    model = roundel.load(folder)
    loading = clock() - started
    peak = peak_memory()
    read = sum(b.nbytes for m in model.modules() if type(m).__name__ == "Packed" for b in m.buffers())
    head = model.get_output_embeddings()
    read += head.weight.nbytes if hasattr(head, "weight") else 0
    found = timed(model, arguments)
    return found | {"first": loading + found["first"], "read": read, "peak": peak}


def import_transformers() -> None:
    """What every start takes, whatever is loaded."""
    import transformers.models.llama.modeling_llama  # noqa: F401


def float32(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    import_transformers()
    started = clock()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loading = clock() - started
    found = timed(model, arguments)
    read = 4 * sum(p.numel() for p in model.parameters())
    return found | {"first": loading + found["first"], "read": read, "peak": peak_memory()}


def bfloat16(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Loading and the first token of the model; of another, its matrix products, each shape as often as there are."""
    from transformers import AutoModelForCausalLM

    import_transformers()
    started = clock()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        model(input_ids=torch.arange(16)[None], use_cache=True, logits_to_keep=1)
    first, peak = clock() - started, peak_memory()
    del model
    shapes = [shape for name, shape in SHAPES[arguments.shape].tensors() if len(shape) == 2]
    total, read = 0.0, 0
    for shape in sorted(set(shapes)):
        copies = [torch.randn(shape).bfloat16() for _ in range(max(1, (100 << 20) // (2 * shape[0] * shape[1])))]
        x, times = torch.randn(1, shape[1]).bfloat16(), []
        for _ in range(3):
            started = clock()
            for weight in copies:
                torch.nn.functional.linear(x, weight)
            times.append((clock() - started) / len(copies))
        total += min(times) * shapes.count(shape)
        read += 2 * shape[0] * shape[1] * shapes.count(shape)
    return {"token": total, "best": total, "read": read, "first": first, "peak": peak}


def llama_cpp(head: str, config: Path, arguments: argparse.Namespace) -> dict[str, float]:
    peer = ROOT / ".peers" / "gguf" / "bin" / "python"
    if not peer.exists():
        return {}
    file = BENCH / f"{arguments.shape}-{head}.gguf"
    command = [peer, ROOT / "benchmarks" / "peers" / "llama_cpp_tokens.py", config, file, "--head", head]
    numbers = ("--threads", arguments.threads, "--tokens", arguments.tokens, "--prompt", arguments.prompt)
    numbers += ("--clock", arguments.clock)
    done = subprocess.run([*map(str, command), *map(str, numbers)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1]) | {"read": file.stat().st_size}


def rounded(source: Path, name: str, **wishes: object) -> Path:
    out = BENCH / f"{source.name}-{name}"
    roundel.quantize(source, out, scheme="W4A16", **wishes)
    return out


def row(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    source = BENCH / f"{arguments.shape}-whole"
    torch.set_num_threads(arguments.threads)
    if name == "numba, head kept":
        return ours(BENCH / f"{source.name}-kept", arguments)
    if name == "numba, head rounded":
        return ours(BENCH / f"{source.name}-head", arguments)
    if name == "float32":
        return float32(source, arguments)
    if name == "bfloat16":
        return bfloat16(source, arguments)
    return llama_cpp("q4_0" if name.endswith("Q4_0") else "f16", source / "config.json", arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--skip", default="", help="rows to leave out, by the first letters of their names")
    parser.add_argument("--device", default="cpu", help="another than cpu: products.py, on that device")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        products.main(["--device", arguments.device, "--prompt", str(arguments.prompt)])
        return
    if arguments.row:
        print(json.dumps(row(arguments.row, arguments)))
        return
    torch.set_num_threads(arguments.threads)
    source = make(BENCH / f"{arguments.shape}-whole", SHAPES[arguments.shape])
    rounded(source, "kept")
    rounded(source, "head", quant_lm_head=True)
    best = bandwidth()
    print(f"{platform.machine()}, {arguments.threads} threads, {best / 1e9:.1f} GB/s read")
    print("| | tokens/s | best | ms a token | share of bandwidth | s for the prompt | s to a token | GB at most |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ROWS:
        if any(name.startswith(left) for left in arguments.skip.split(",") if left):
            continue
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", name], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-3000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        if found:
            print(f"| {name} | {' | '.join(_cells(found, best))} |", flush=True)


def _cells(found: dict[str, float], best: float) -> list[str]:
    token, read = found["token"], found["read"]
    cells = [f"{1 / token:.2f}", f"{1 / found['best']:.2f}", f"{1000 * token:.0f}", f"{read / token / best:.0%}"]
    cells += [f"{found[key]:.2f}" if key in found else "" for key in ("prompt", "first")]
    return [*cells, f"{found['peak'] / 1e9:.2f}" if "peak" in found else ""]


if __name__ == "__main__":
    main()
