"""Tasks of lm-evaluation-harness on a checkpoint, through the library `lm_eval` itself, an optional part.

Its Hugging Face backend is given the model as `inference` loads it, which computes in float32; its vLLM backend is
given the folder, and runs it as vLLM does. Tasks run one by one: one that fails says why and keeps the others'
results.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roundel.api import check_device
from roundel.calibration.quiet import quiet
from roundel.errors import RecipeError, nearest
from roundel.evaluation.means import Mean, influences, standard_error
from roundel.inference.loading import load
from roundel.inference.text import tokenizer_for

__all__ = ["Score", "TaskRun", "differences", "run_tasks", "vllm_arguments"]

LINKS: tuple[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], ...] = (
    # metrics by a mean over questions, and their slopes: the mean, perplexity, bits
    (lambda mean: mean, torch.ones_like),
    (lambda mean: torch.exp(-mean), lambda mean: -torch.exp(-mean)),
    (lambda mean: -mean / math.log(2), lambda mean: torch.full_like(mean, -1 / math.log(2))),
)
RUNTIMES = ("hf", "vllm")  # backends of lm-evaluation-harness


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task.

    metric   its name; with the filter behind a comma where there is one ("exact_match,strict-match")
    moved    by what each question moves the metric, in order, where it is a function of a mean over them; else empty
    """

    metric: str
    result: Mean
    moved: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """A task on a model: its scores by (sub)task, or why it failed."""

    task: str
    scores: Mapping[str, tuple[Score, ...]]
    failure: str | None = None

    def to_dict(self) -> dict[str, object]:
        scores = {
            name: {score.metric: score.result.to_dict() for score in found} for name, found in self.scores.items()
        }
        return {"task": self.task, "scores": scores, "failure": self.failure}


def run_tasks(
    folder: Path,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    batch: int | None = None,
    limit: int | None = None,
    tokenizer: Path | None = None,
    runtime: str = "hf",
    device: str = "cpu",
    trust_remote_code: bool = False,
    tick: Callable[[float, str], None] = lambda done, text: None,
) -> list[TaskRun]:
    """Run tasks on the checkpoint in a folder.

    tasks      names as lm-evaluation-harness knows them, patterns with * among them
    include    a folder with task YAMLs of one's own
    batch      questions at once; None: 1, or as many as vLLM likes
    limit      questions of each task at most
    runtime    one of RUNTIMES
    device     where the model is: "cpu", "cuda"; vLLM chooses for itself
    trust_remote_code   whether code that ships inside the checkpoint may run, the tokenizer's too

    Raises RecipeError when lm_eval or vllm is not installed, or lm_eval knows no such task; BackendError when the model
    does not fit in memory; SourceError for a broken checkpoint, PlanError for a model that transformers does not know.
    """
    check_device(device)
    if runtime == "vllm":
        _check_vllm(device)
    with _warnings_off():
        manager, names = _known(tasks, include)
        if runtime == "vllm":
            model = _vllm(folder, tokenizer, batch, trust_remote_code)
        else:
            model = _model(folder, tokenizer, batch or 1, device, trust_remote_code)
        found = []
        for number, name in enumerate(names):
            tick(number / len(names), f"{folder.name} {name}")
            found.append(_run(model, name, manager, limit))
        return found


@contextmanager
def _warnings_off() -> Iterator[None]:
    """lm_eval says errors alone: it warns of each default that a task leaves as it is."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def differences(before: Sequence[TaskRun], after: Sequence[TaskRun]) -> dict[tuple[str, str], Mean]:
    """(task, metric) -> what it changed by, from one model to another; paired by question where these are known."""
    old = {(task, s.metric): s for run in before for task, scores in run.scores.items() for s in scores}
    found: dict[tuple[str, str], Mean] = {}
    for run in after:
        for task, scores in run.scores.items():
            for score in scores:
                other = old.get((task, score.metric))
                if other is None:
                    continue
                paired = len(score.moved) == len(other.moved) > 0
                error = standard_error(_doubles(score.moved) - _doubles(other.moved)) if paired else None
                found[task, score.metric] = Mean(score.result.value - other.result.value, error)
    return found


def _known(tasks: Sequence[str], include: Path | None) -> tuple[Any, list[str]]:
    """lm_eval's table of tasks, and the names that are asked for."""
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(
            "Tasks are run by lm-evaluation-harness, which is not installed. Run `pip install 'roundel[tasks]'`, or "
            "drop --tasks."
        )
    if include is not None and not include.is_dir():
        raise RecipeError(f"There is no folder {include} with tasks. Check --include-path.")
    from lm_eval.tasks import TaskManager

    manager: Any = TaskManager(include_path=None if include is None else str(include))
    everything: list[str] = list(manager.all_tasks)
    names: list[str] = []
    for task in tasks:
        matching = sorted(manager.match_tasks([task])) if task.strip() else []
        if not matching:
            hint = "" if include is not None else " Tasks of your own are found with --include-path FOLDER."
            raise RecipeError(f"lm-evaluation-harness knows no task {task!r}.{nearest(task, everything)}{hint}")
        names += [name for name in matching if name not in names]
    return manager, names


def vllm_arguments(
    folder: Path, tokenizer: Path | None, batch: int | None, trust_remote_code: bool
) -> dict[str, object]:
    """What lm_eval's vLLM backend is called with."""
    return {
        "pretrained": str(folder),
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "dtype": "auto",
        "batch_size": batch or "auto",
        "trust_remote_code": trust_remote_code,
    }


def _check_vllm(device: str) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise RecipeError(
            "vLLM is not installed. Run `pip install 'lm_eval[vllm]'` where there is a GPU, or leave out --backend."
        )
    if device != "cpu":
        raise RecipeError("vLLM chooses its devices itself. Set CUDA_VISIBLE_DEVICES in place of --device.")


def _vllm(folder: Path, tokenizer: Path | None, batch: int | None, trust_remote_code: bool) -> Any:
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(**vllm_arguments(folder, tokenizer, batch, trust_remote_code))


def _model(folder: Path, tokenizer: Path | None, batch: int, device: str, trusted: bool) -> Any:
    """The checkpoint as lm_eval's Hugging Face backend. Kernels of GPUs round more than float32 does: decoded there."""
    backend = None if device == "cpu" else "torch"
    model = load(folder, device=device, backend=backend, dtype=torch.float32, trust_remote_code=trusted)
    tokens = tokenizer_for(tokenizer or folder, model, trust_remote_code=trusted)
    from lm_eval.models.huggingface import HFLM

    with quiet():
        return HFLM(pretrained=model, tokenizer=tokens, batch_size=batch, device=device)


def _run(model: Any, task: str, manager: Any, limit: int | None) -> TaskRun:
    from lm_eval import simple_evaluate

    try:
        with quiet():
            found = simple_evaluate(
                model=model, tasks=[task], task_manager=manager, limit=limit, log_samples=True, verbosity="ERROR"
            )
    except _failures() as error:
        return TaskRun(task=task, scores={}, failure=f"{type(error).__name__}: {error}".partition("\n")[0])
    samples = found.get("samples") or {}
    return TaskRun(
        task=task,
        scores={name: tuple(_scores(told, samples.get(name, ()))) for name, told in found["results"].items()},
    )


def _scores(told: Mapping[str, object], samples: Sequence[Mapping[str, Any]]) -> list[Score]:
    found = []
    for key, value in told.items():
        metric, _, filtered = key.partition(",")
        if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not filtered:
            continue
        error = told.get(f"{metric}_stderr,{filtered}")
        moved = _moved(value, [s.get(metric) for s in samples if s.get("filter", filtered) == filtered])
        if not isinstance(error, (int, float)):
            error = standard_error(_doubles(moved)) if moved else None
        found.append(
            Score(
                metric=metric if filtered == "none" else key,
                result=Mean(float(value), None if error is None else float(error)),
                moved=moved,
            )
        )
    return found


def _moved(value: float, answers: Sequence[object]) -> tuple[float, ...]:
    """By what each question moves a metric, to first order; nothing where the metric is none of LINKS.

    answers   of each question: a number, or (amount, weight); lm_eval has the log likelihood of a text, and its words
              or bytes
    """
    pairs = [answer if isinstance(answer, (tuple, list)) else (answer, 1.0) for answer in answers]
    if not pairs or not all(len(p) == 2 and all(isinstance(n, (int, float)) for n in p) for p in pairs):
        return ()
    sums, weights = _doubles(pairs).T
    mean = sums.sum() / weights.sum()
    for link, slope in LINKS:
        if math.isclose(float(link(mean)), value, rel_tol=1e-6, abs_tol=1e-6):
            return tuple((influences(sums, weights) * slope(mean)).tolist())
    return ()


def _doubles(numbers: Sequence[object]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _failures() -> tuple[type[Exception], ...]:
    """What a task that is broken, or whose data is out of reach, raises."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    usual = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError)
    return (*usual, TypeError, ValueError, DatasetsError, TemplateError)
