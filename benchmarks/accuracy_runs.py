"""One run of one tool on one scheme: started as a program, proven to lie on its grid, measured by roundel's own code.

Used by accuracy.py, which says what is compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from contenders import Duel, Peer, Scheme
from torch import Tensor

from roundel.calibration.tokenizer import load_tokenizer
from roundel.checkpoint import open_checkpoint
from roundel.evaluation.models import decoded_model, float_model, logits_of
from roundel.evaluation.perplexity import BATCH, compare, windows

__all__ = ["BENCH", "WINDOW", "Bench", "Failed", "Measured", "Yardstick"]

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / ".bench" / "accuracy"
WINDOW = 256  # tokens; what the bundled model was trained on


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one run: perplexity, mean KL divergence from the float model in nats, processor seconds of the tool (of ours:
    of its whole process), stored bits for each rounded weight."""

    perplexity: float
    divergence: float
    seconds: float
    bits_per_weight: float


class Failed(Exception):
    """A tool ended with an error; the text is the last line of what it printed, and where the rest stands."""


class Yardstick:
    """The text to be predicted, and what the float model says of it."""

    def __init__(self, model: Path, text: Path, count: int) -> None:
        self.windows = windows(text.read_text(encoding="utf-8"), load_tokenizer(model), WINDOW)[:count]
        before = logits_of(float_model(model))
        with torch.no_grad():
            self._logits = [before(ids) for ids in torch.split(self.windows, BATCH)]
        self.digest = _digest([self.windows.tolist()])
        self.perplexity = self.measure(float_model(model))[0]

    def measure(self, model: torch.nn.Module) -> tuple[float, float]:
        """Perplexity and mean divergence."""
        said = iter(self._logits)  # `compare` asks for the windows in order
        compared = compare(lambda ids: next(said), logits_of(model), self.windows)
        return compared.perplexity, compared.kl_mean

    def measure_ours(self, folder: Path) -> tuple[float, float]:
        """The same of a checkpoint that roundel wrote, decoded."""
        checkpoint = open_checkpoint(folder)
        weights = {name: checkpoint.decode(name) for name in checkpoint.layers}
        checkpoint.close()
        return self.measure(decoded_model(folder, weights))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all runs share. `model_digest` is of its weights."""

    model: Path
    model_digest: str
    yardstick: Yardstick
    nsamples: int
    seqlen: int
    samples: Tensor
    fresh: bool

    def tokens(self, seed: int) -> Path:
        """The file of a seed's samples: rows {"input_ids": [...]}."""
        order = list(range(len(self.samples)))
        random.Random(seed).shuffle(order)
        rows = [json.dumps({"input_ids": self.samples[i].tolist()}) for i in order[: self.nsamples]]
        path = BENCH / f"samples-{_digest(rows)[:12]}.jsonl"
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_text("\n".join(rows) + "\n")
            unfinished.rename(path)  # another benchmark may be reading beside this one
        return path

    def peer(self, peer: Peer, scheme: Scheme, seed: int) -> Measured:
        """A peer's result, from earlier where there is one. Raises Failed."""
        tokens = self.tokens(seed)
        job: dict[str, Any] = asdict(scheme) | {"seed": seed, "options": dict(peer.options)}
        data = tokens.name if peer.looks_at_data else None
        settings = [peer.program, job, data, self.model_digest, self.yardstick.digest]
        kept = BENCH / f"{_slug(peer.name)}-{_slug(str(scheme))}-{seed}-{_digest(settings)[:8]}.json"
        if kept.exists() and not self.fresh:
            return Measured(**json.loads(kept.read_text())["measured"])
        out = kept.with_suffix("")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "job.json").write_text(json.dumps(job | _paths(model=self.model, tokens=tokens, out=out)))
        python = ROOT / ".peers" / peer.environment / "bin" / "python"
        _run([str(python), str(ROOT / "benchmarks" / "peers" / peer.program), str(out / "job.json")], out)
        result = json.loads((out / "result.json").read_text())
        _prove_grid(out, self.model, scheme)
        perplexity, divergence = self.yardstick.measure(float_model(out))
        measured = Measured(
            perplexity=perplexity,
            divergence=divergence,
            seconds=result["seconds"],
            bits_per_weight=result["bits_per_weight"],
        )
        kept.write_text(json.dumps({"measured": asdict(measured), "peer": peer.name, "job": job, "result": result}))
        shutil.rmtree(out)
        return measured

    def ours(self, duel: Duel, scheme: Scheme, seed: int) -> Measured:
        """Ours, run anew. Raises Failed."""
        out = BENCH / f"roundel-{os.getpid()}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        command = [sys.executable, "-m", "roundel", "quantize", str(self.model), str(out / "model")]
        name = f"W{scheme.bits}A16" + ("_HQQ" if duel.float_zeros else "")
        command += ["--scheme", name, "--group-size", str(scheme.group_size)]
        command += [] if scheme.symmetric else ["--asym"]
        command += ["--algorithm", duel.algorithm, *duel.options]
        if duel.looks_at_data:
            command += ["--dataset", str(self.tokens(seed)), "--nsamples", str(self.nsamples)]
            command += ["--seqlen", str(self.seqlen), "--seed", str(seed)]
        seconds = _run(command, out)
        perplexity, divergence = self.yardstick.measure_ours(out / "model")
        shutil.rmtree(out)
        zero = 0 if scheme.symmetric else 16 if duel.float_zeros else scheme.bits
        bits = scheme.bits + (16 + zero) / scheme.group_size
        return Measured(perplexity=perplexity, divergence=divergence, seconds=seconds, bits_per_weight=bits)


def _prove_grid(folder: Path, source: Path, scheme: Scheme) -> None:
    """Raises Failed unless every matrix of the decoder blocks was rounded, and no group holds more values than the
    scheme has codes."""
    from safetensors.torch import load_file

    rounded, before = load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
    order = load_file(folder / "groups.safetensors") if (folder / "groups.safetensors").exists() else {}
    for name in (n for n, value in before.items() if ".layers." in n and value.dim() == 2):
        layer, weight = name.removesuffix(".weight"), rounded[name]
        if layer in order:
            weight = weight[:, torch.argsort(order[layer], stable=True)]
        groups = weight.view(weight.shape[0], -1, scheme.group_size).sort(-1).values
        most = int((groups.diff(dim=-1) != 0).sum(-1).max()) + 1
        if most > 2**scheme.bits:
            raise Failed(f"{layer} has {most} values in a group of {scheme}")


def _run(command: list[str], out: Path) -> float:
    """Processor seconds of a program that is run to its end, its output in out/log.txt. Raises Failed."""
    log = out / "log.txt"
    with log.open("wb") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=out)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        said = log.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
        raise Failed(f"{said[-1].strip()} ({log.relative_to(ROOT)})")
    return usage.ru_utime + usage.ru_stime


def _paths(**paths: Path) -> dict[str, str]:
    return {name: str(path) for name, path in paths.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in name).lower().split())
