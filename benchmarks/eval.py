"""Perplexity streamed from disk against perplexity of a loaded transformers model: seconds, tokens a second, memory.

    python benchmarks/eval.py [--windows 8] [--window 512] [--models tinybook,qwen3-0.6b]

Both compute in float32, on the same tokens, each in a process of its own; time is the whole process's. Random weights
predict nothing, so of the synthetic model only time, memory and equality of the numbers say anything.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from measuring import BENCH, ROOT, Run, measure
from synthetic import SHAPES, make

LOADED = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
folder, text, window, dtype = sys.argv[1], sys.argv[2], int(sys.argv[3]), getattr(torch, sys.argv[4])
ids = torch.tensor(json.loads(open(text).read())["input_ids"]).view(-1, window)
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
loaded = time.perf_counter() - started
part, total = max(1, 2048 // window), 0.0
with torch.no_grad():
    for batch in ids.split(part):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        for one, tokens in zip(logits, batch[:, 1:]):
            total += float(torch.nn.functional.cross_entropy(one.float(), tokens, reduction="sum"))
seconds = time.perf_counter() - started
print(json.dumps([total / (ids.numel() - len(ids)), ids.numel() / seconds, loaded]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--models", default="tinybook,qwen3-0.6b")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the loaded model")
    arguments = parser.parse_args()
    BENCH.mkdir(exist_ok=True)
    for name in arguments.models.split(","):
        folder = ROOT / "src/roundel/data/tinybook" if name == "tinybook" else make(BENCH / name, SHAPES[name])
        _compare(name, folder, arguments.windows, arguments.window, arguments.dtypes.split(","))


def _compare(name: str, folder: Path, windows: int, window: int, dtypes: list[str]) -> None:
    text, numbers = BENCH / "ids.jsonl", BENCH / "numbers.json"
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = [(n * 7919 + n * n) % vocabulary for n in range(windows * window)]
    text.write_text(json.dumps({"input_ids": ids}))
    print(f"\n### {name}, {windows} windows of {window} tokens\n")
    print("| | seconds | processor s | tokens/s | peak MB | surprise, nats |")
    print("| --- | --- | --- | --- | --- | --- |")
    packed = BENCH / f"{name}-eval-w4"
    roundel = [sys.executable, "-m", "roundel"]
    measure([*roundel, "quantize", str(folder), str(packed), "--overwrite"])
    for label, model in (("roundel, streamed", folder), ("roundel, streamed, W4A16", packed)):
        command = [*roundel, "eval", str(model), "--ppl", str(text), "--window", str(window), "--json", str(numbers)]
        ran = measure(command)
        found = json.loads(numbers.read_text())["perplexity"]["models"][0]
        surprise = math.log(found["perplexity"]["value"])
        _row(label, ran, found["tokens_per_second"], surprise)
    for dtype in dtypes:
        ran = measure([sys.executable, "-c", LOADED, str(folder), str(text), str(window), dtype])
        surprise, speed, _ = json.loads((BENCH / "log.txt").read_text().splitlines()[-1])
        _row(f"transformers, {dtype}", ran, speed, surprise)


def _row(label: str, ran: Run, speed: float, surprise: float) -> None:
    numbers = f"{ran.wall:.1f} | {ran.cpu:.1f} | {speed:.0f} | {ran.peak:.0f} | {surprise:.5f}"
    print(f"| {label} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
