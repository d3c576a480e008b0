"""Models measured on a text side by side: perplexity, and how far each one's predictions are from the first one's.

Everything streams: a model takes the memory of one decoder block, of the states that travel, and of its head, whatever
its number of layers. Numbers are those of the model in float32.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from roundel.api import check_device
from roundel.calibrating import Offload
from roundel.calibration.activations import Frontier
from roundel.errors import PlanError, RecipeError, SourceError
from roundel.evaluation.judging import Verdict
from roundel.evaluation.means import Mean, mean_of, percentile_of
from roundel.evaluation.perplexity import HIGH
from roundel.evaluation.positions import write_positions
from roundel.evaluation.room import frontiers_in_memory
from roundel.evaluation.subject import Subject, open_subject
from roundel.evaluation.text import WINDOW, Passage, read_passage
from roundel.evaluation.travel import judged, through_blocks
from roundel.inspection import inspect_checkpoint
from roundel.memory import forget_peak, peak_memory

__all__ = ["Distance", "Evaluation", "Measured", "measure"]

Tick = Callable[[float, str], None]
NATS_PER_BIT = math.log(2)


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a model is from the reference, over the same positions.

    perplexity     the difference, the reference's taken away, with its paired error
    kl_mean        of KL(reference || model) in nats; kl_p999 is its 99.9th percentile
    agreement      share of positions where both find the same token likeliest
    """

    perplexity: Mean
    kl_mean: Mean
    kl_p999: Mean
    agreement: Mean


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model.

    nbytes             of all its tensors on disk
    bits_per_weight    stored bits of a quantized weight; None where nothing is quantized
    bits_per_byte      of the text; None where it is not known as text
    tokens_per_second  of this evaluation, reading and decoding included
    peak_memory        the most that the process held while its blocks ran, states of other models not counted; on an
                       accelerator the most that was held there; None where the system does not say
    distance           from the reference; None for the reference itself
    """

    name: str
    nbytes: int
    bits_per_weight: float | None
    perplexity: Mean
    bits_per_byte: Mean | None
    tokens_per_second: float
    peak_memory: int | None
    distance: Distance | None

    def to_dict(self) -> dict[str, object]:
        far = self.distance
        return {
            "name": self.name,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "perplexity": self.perplexity.to_dict(),
            "bits_per_byte": None if self.bits_per_byte is None else self.bits_per_byte.to_dict(),
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory,
            "perplexity_difference": None if far is None else far.perplexity.to_dict(),
            "kl_mean": None if far is None else far.kl_mean.to_dict(),
            "kl_p999": None if far is None else far.kl_p999.to_dict(),
            "top1_agreement": None if far is None else far.agreement.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Models on one text; the first is the reference of the others.

    windows, length, scored   windows, tokens of each, tokens that were predicted in all of them
    """

    dataset: str
    windows: int
    length: int
    scored: int
    models: tuple[Measured, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        return {
            "dataset": self.dataset,
            "windows": self.windows,
            "window": self.length,
            "tokens": self.scored,
            "models": [model.to_dict() for model in self.models],
            "notes": list(self.notes),
        }


def measure(
    models: Sequence[str | Path],
    dataset: str,
    *,
    names: Sequence[str] | None = None,
    tokenizer: Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    offload: Offload = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    tick: Tick = lambda done, text: None,
    positions: Path | None = None,
) -> Evaluation:
    """Measure models on a text, all on the same tokens; those after the first are compared with it.

    models      folders or Hub ids
    dataset     as `--dataset` of calibration takes it; "bundled" is the text that comes with roundel for this
    names       of the models in tables; None: those of their folders
    tokenizer   a folder; None: the first model's
    window      tokens; None: WINDOW, or what the models take
    stride      tokens by which windows lie apart; None: they do not overlap
    limit       windows at most
    device      where blocks are run: "cpu", "cuda", "cuda:1"
    offload     where states lie between blocks: "ram", "disk", or "auto", in memory while they fit in half of it
    tick        told which share is done (0 to 1), and what is at hand
    positions   a safetensors file that is written with every position's numbers

    Raises RecipeError for a wish that makes no sense or a device that is not there, PlanError for models that cannot be
    run block by block or compared, and for too little memory or disk, before a weight is read; SourceError for broken
    checkpoints.
    """
    check_device(device)
    with ExitStack() as held:
        scratch = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="roundel-eval-")))
        subjects: list[Subject] = []
        for number, (model, name) in enumerate(zip(models, names or _names(models), strict=True)):
            work = scratch / f"hub-{number}"
            subject = open_subject(model, work, name=name, device=device, trust_remote_code=trust_remote_code)
            held.callback(subject.close)
            subjects.append(subject)
        passage = read_passage(
            dataset,
            tokenizer or subjects[0].folder,
            window=_window(subjects, window),
            stride=stride,
            limit=limit,
            trust_remote_code=trust_remote_code,
        )
        _check_vocabulary(subjects, passage)
        in_memory = frontiers_in_memory(subjects, passage, offload, scratch)
        windows = len(passage.windows)
        ticker = _Ticker(tick, sum(subject.weights for subject in subjects) * windows)
        runs: list[_Run] = []
        for number, subject in enumerate(subjects):
            shape = (windows, passage.length, subject.skeleton.hidden)
            states = Frontier(scratch / f"{number}.states", shape, torch.float32, in_memory=in_memory)
            held.callback(states.close)
            others = sum(run.states.nbytes for run in runs) if in_memory else 0
            runs.append(_run(subject, passage, states, ticker, others))
        started = time.perf_counter()
        verdicts = list(judged(subjects, passage, [run.states for run in runs], ticker.add))
        each = (time.perf_counter() - started) / len(subjects)
        if positions is not None:
            write_positions(positions, passage, verdicts, [subject.name for subject in subjects])
        return Evaluation(
            dataset=dataset,
            windows=windows,
            length=passage.length,
            scored=passage.scored,
            models=tuple(
                _measured(subject, passage, verdicts, number, passage.windows.numel() / (run.seconds + each), run.peak)
                for number, (subject, run) in enumerate(zip(subjects, runs, strict=True))
            ),
            notes=passage.notes,
        )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What left a model's last block, the seconds that took, and the peak as `Measured` has it."""

    states: Frontier
    seconds: float
    peak: int | None


def _run(subject: Subject, passage: Passage, states: Frontier, ticker: _Ticker, others: int) -> _Run:
    """The blocks of one model, over all windows. others: bytes of memory that other models' states take."""
    device = subject.device
    forgotten, started = _forget_peak(device), time.perf_counter()
    through_blocks(subject, passage, states, ticker.add)
    seconds, peak = time.perf_counter() - started, None
    if forgotten:
        peak = peak_memory() - others if device == "cpu" else _device_peak(device)
    return _Run(states=states, seconds=seconds, peak=peak)


def _forget_peak(device: str) -> bool:
    """Have the peak count from now on; False where the system cannot."""
    if device == "cpu":
        return forget_peak()
    torch.cuda.reset_peak_memory_stats(device)
    return True


def _device_peak(device: str) -> int:
    return int(torch.cuda.max_memory_allocated(device))


class _Ticker:
    """Work as it is done -> the share that is done. Work is weights times windows, which time goes with."""

    def __init__(self, tick: Tick, total: int) -> None:
        self._tick, self._total, self._done = tick, total, 0

    def add(self, work: int, text: str) -> None:
        self._done += work
        self._tick(min(1.0, self._done / self._total), text)


def _measured(
    subject: Subject, passage: Passage, verdicts: Sequence[list[Verdict]], number: int, speed: float, peak: int | None
) -> Measured:
    surprises = [window[number].surprise for window in verdicts]
    mean = mean_of(surprises)
    bits = None
    if passage.bytes_per_token is not None:
        bits = mean.times(1 / (NATS_PER_BIT * passage.bytes_per_token))
    return Measured(
        name=subject.name,
        nbytes=subject.nbytes,
        bits_per_weight=inspect_checkpoint(subject.checkpoint).bits_per_weight,
        perplexity=mean.exp(),
        bits_per_byte=bits,
        tokens_per_second=speed,
        peak_memory=peak,
        distance=None if number == 0 else _distance(verdicts, number),
    )


def _distance(verdicts: Sequence[list[Verdict]], number: int) -> Distance:
    ours, theirs = [window[number] for window in verdicts], [window[0] for window in verdicts]
    after, before = (mean_of([v.surprise for v in each]).exp().value for each in (ours, theirs))
    # To first order, a change of the mean surprise changes the perplexity by as much times the perplexity.
    moved = [after * one.surprise - before * other.surprise for one, other in zip(ours, theirs, strict=True)]
    divergences = [verdict.divergence for verdict in ours]
    agreeing = [(one.top == other.top).double() for one, other in zip(ours, theirs, strict=True)]
    return Distance(
        perplexity=Mean(after - before, mean_of(moved).error),
        kl_mean=mean_of(divergences),
        kl_p999=percentile_of(divergences, HIGH),
        agreement=mean_of(agreeing),
    )


def _window(subjects: Sequence[Subject], asked: int | None) -> int:
    limits = [subject.limit for subject in subjects if subject.limit is not None]
    if asked is None:
        return min([WINDOW, *limits])
    for subject in subjects:
        if subject.limit is not None and asked > subject.limit:
            raise RecipeError(f"{subject.name} takes {subject.limit:,} tokens, not {asked:,}. Use a shorter --window.")
    return asked


def _check_vocabulary(subjects: Sequence[Subject], passage: Passage) -> None:
    for subject in subjects[1:]:
        if subject.vocabulary != subjects[0].vocabulary:
            raise PlanError(
                f"{subject.name} predicts {subject.vocabulary:,} tokens, {subjects[0].name} "
                f"{subjects[0].vocabulary:,}: distributions over different vocabularies cannot be compared. Compare a "
                "model with the one it was made from."
            )
    largest = int(passage.windows.max())
    if largest >= subjects[0].vocabulary:
        raise SourceError(
            f"The text has the token {largest:,}, {subjects[0].name} knows {subjects[0].vocabulary:,}: the tokenizer "
            "is another model's. Copy the model's own tokenizer files into its folder, or name theirs with --tokenizer."
        )


def _names(models: Sequence[str | Path]) -> list[str]:
    """Short names; whole paths where short ones are not enough to tell models apart."""
    short = [Path(model).resolve().name if Path(model).exists() else str(model) for model in models]
    names = short if len(set(short)) == len(short) else [str(model) for model in models]
    if len(set(names)) < len(names):
        raise RecipeError("A model is named twice. Name each once.")
    return names
