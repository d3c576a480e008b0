"""`roundel eval --tasks` with the real lm-evaluation-harness, on task files of our own, offline.

The library lives in an environment of its own, .peers/lmeval (`make peers`); where that is absent only its absence is
tested.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from commands import Outcome, command
from models import pico
from roundel.api import quantize
from roundel.data.bundled import bundled_model, bundled_text
from roundel.errors import RecipeError, SourceError
from roundel.evaluation.means import Mean
from roundel.evaluation.tasks import TaskRun, _model, _scores, differences, run_tasks, vllm_arguments
from roundel.inference.loading import load

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("ROUNDEL_PEERS", ROOT / ".peers")) / "lmeval" / "bin" / "python"
installed = pytest.mark.skipif(not PYTHON.exists(), reason="lm-evaluation-harness is not there: run `make peers`")

CHOICES = """task: own_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{begin}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1}}
"""
TEXTS = """task: own_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{begin}}}}"
metric_list: [{{metric: bits_per_byte}}]
metadata: {{version: 1}}
"""
BROKEN = CHOICES.replace("own_choices", "own_broken").replace("{{{{answer}}}}", "{{{{nothing.there}}}}")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of the bundled text: which of two endings is its own?"""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [line for line in bundled_text("evaluation").read_text(encoding="utf-8").splitlines() if len(line) > 120]
    rows = []
    for number, line in enumerate(lines[:24]):
        endings = [line[60:100], lines[number + 1][60:100]]
        answer = number % 2
        rows.append({"begin": line[:60], "choices": endings[::-1] if answer else endings, "answer": answer})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choices", CHOICES), ("texts", TEXTS), ("broken", BROKEN)):
        (folder / f"{name}.yaml").write_text(text.format(file=file))
    return folder


def evaluated(tmp_path: Path, *arguments: object) -> Outcome:
    """`roundel eval ARGUMENTS` where lm_eval is installed."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    done = subprocess.run(
        [str(PYTHON), "-m", "roundel", "eval", *map(str, arguments)],
        capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path,
    )  # fmt: skip
    return Outcome(done.returncode, " ".join(done.stdout.split()), " ".join(done.stderr.split()))


@installed
def test_tasks_beside_the_source(tasks: Path, tmp_path: Path) -> None:
    """A failing task is told and keeps the others; two bits answer and predict worse than the model they are of."""
    quantize(bundled_model(), tmp_path / "w2", bits=2, group_size=64)
    wish = ("--tasks", "own_choices,own_broken,own_texts", "--include-path", tasks, "--limit", 12, "--eval-bs", 4)
    done = evaluated(tmp_path, tmp_path / "w2", "--kl-against", bundled_model(), *wish, "--json", tmp_path / "n.json")
    assert done.code == 1, done.error
    assert "failed own_broken" in done.output
    before, after = json.loads((tmp_path / "n.json").read_text())["tasks"]
    assert [run["task"] for run in after["tasks"]] == ["own_choices", "own_broken", "own_texts"]
    choices, broken, _ = after["tasks"]
    assert broken["failure"]
    assert broken["scores"] == {}
    assert 0.4 <= choices["scores"]["own_choices"]["acc"]["value"] <= 1.0
    old, new = (run["tasks"][2]["scores"]["own_texts"]["bits_per_byte"]["value"] for run in (before, after))
    assert 1.0 < old < new < 3.0
    changes = {(d["task"], d["metric"]): d for d in after["differences"]}
    assert changes["own_texts", "bits_per_byte"]["value"] == pytest.approx(new - old)
    assert 0 < changes["own_texts", "bits_per_byte"]["standard_error"] < 0.2
    assert changes["own_choices", "acc"]["standard_error"] is not None


@installed
def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    done = evaluated(tmp_path, bundled_model(), "--tasks", "hellaswagg")
    assert done.code == 2
    assert "knows no task 'hellaswagg'. Did you mean 'hellaswag'?" in done.error


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed beside roundel")
def test_its_absence_names_the_command() -> None:
    done = command("eval", bundled_model(), "--tasks", "hellaswag")
    assert done.code == 2
    assert "pip install 'roundel[tasks]'" in done.error


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text", "qwen3_5", "qwen2_vl", "tied"])
def test_the_model_is_what_is_loaded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Families whose experts are fused or whose text model is part of a larger one; lm_eval ties heads once more."""
    wishes = {"gpt_oss": {"quantization_config": None}, "tied": {"tie_word_embeddings": True}}.get(kind, {})
    model = pico.build("llama" if kind == "tied" else kind, tmp_path / "model", vocab_size=2048, **wishes)
    quantize(model, tmp_path / "out", scheme="W4A16G32", quant_lm_head=kind == "tied")
    ids = torch.randint(0, 2048, (1, 40), generator=torch.Generator().manual_seed(0))

    def backend(*, pretrained: Any, **more: object) -> Any:
        pretrained.tie_weights()
        with torch.no_grad():
            return pretrained(input_ids=ids).logits

    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=backend))  # type: ignore[arg-type]
    found = _model(tmp_path / "out", bundled_model(), 1, "cpu", False)
    with torch.no_grad():
        expected = load(tmp_path / "out", backend="torch")(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_code_of_a_tokenizer_runs_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bundled_model(), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast):\n    ours = 1\n"
    )
    backend = SimpleNamespace(HFLM=lambda *, tokenizer, **more: tokenizer)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", backend)  # type: ignore[arg-type]
    assert _model(folder, None, 1, "cpu", True).ours == 1
    with pytest.raises(SourceError, match="pass --trust-remote-code"):
        _model(folder, None, 1, "cpu", False)


VLLM = vllm_arguments(Path("out"), Path("words"), 8, False)


@installed
def test_the_vllm_backend_has_these_arguments() -> None:
    """Its file is only read: it imports vLLM, which needs a GPU."""
    (file,) = PYTHON.parents[1].glob("lib/python*/site-packages/lm_eval/models/vllm_causallms.py")
    (made,) = (
        function
        for kind in ast.walk(ast.parse(file.read_text()))
        if isinstance(kind, ast.ClassDef) and kind.name == "VLLM"
        for function in kind.body
        if isinstance(function, ast.FunctionDef) and function.name == "__init__"
    )
    assert set(VLLM) <= {argument.arg for argument in (*made.args.args, *made.args.kwonlyargs)}


def test_the_vllm_backend_is_given_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM needs a GPU, so what it would be called with is looked at."""
    heard = []
    made = SimpleNamespace(VLLM=lambda **arguments: heard.append(arguments) or "model")
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", made)  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("roundel.evaluation.tasks._known", lambda tasks, include: ("manager", list(tasks)))
    monkeypatch.setattr("roundel.evaluation.tasks._run", lambda model, name, manager, limit: (model, name, limit))
    found = run_tasks(tmp_path, ["a", "b"], runtime="vllm", limit=3)
    assert found == [("model", "a", 3), ("model", "b", 3)]
    assert heard == [
        {
            "pretrained": str(tmp_path),
            "tokenizer": None,
            "dtype": "auto",
            "batch_size": "auto",
            "trust_remote_code": False,
        }
    ]
    assert VLLM["tokenizer"] == "words" and VLLM["batch_size"] == 8
    monkeypatch.setattr("roundel.evaluation.tasks.check_device", lambda device: None)
    with pytest.raises(RecipeError, match="Set CUDA_VISIBLE_DEVICES"):
        run_tasks(tmp_path, ["a"], runtime="vllm", device="cuda:1")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed beside roundel")
def test_vllm_s_absence_names_the_command() -> None:
    done = command("eval", bundled_model(), "--tasks", "hellaswag", "--backend", "vllm")
    assert done.code == 2 and "pip install 'lm_eval[vllm]'" in done.error


def told(metric: str, value: float, answers: Sequence[object]) -> list[TaskRun]:
    """A run of one task, from what lm_eval says of it and logs of each question."""
    samples = [{"filter": "none", metric: answer} for answer in answers]
    scores = tuple(_scores({f"{metric},none": value, f"{metric}_stderr,none": "N/A"}, samples))
    return [TaskRun(task="t", scores={"t": scores})]


def test_differences_are_paired_by_question() -> None:
    before, after = (1.0, 0.0, 1.0, 1.0), (1.0, 0.0, 1.0, 0.0)
    changes = torch.tensor(after) - torch.tensor(before)
    found = differences(told("acc", 0.75, before), told("acc", 0.5, after))["t", "acc"]
    assert found.value == -0.25
    assert found.error == pytest.approx(float(changes.std()) / 2)


TEXTS_READ = [(-300.0, 100), (-100.0, 40), (-500.0, 180), (-20.0, 9)]  # log likelihoods, bytes


@pytest.mark.parametrize(
    ("metric", "link"),
    [("bits_per_byte", lambda mean: -mean / math.log(2)), ("byte_perplexity", lambda mean: math.exp(-mean))],
)
def test_likelihoods_of_texts_have_errors_too(metric: str, link: Callable[[float], float]) -> None:
    """Held to the jackknife: what the metric is without each of the texts."""

    def metric_of(texts: Sequence[tuple[float, int]]) -> float:
        return link(sum(t[0] for t in texts) / sum(t[1] for t in texts))

    def jackknife(numbers: Sequence[float]) -> float:
        count, mean = len(numbers), sum(numbers) / len(numbers)
        return math.sqrt((count - 1) / count * sum((n - mean) ** 2 for n in numbers))

    many = [(a * (1 + 0.01 * (i % 5)), b) for i in range(30) for a, b in TEXTS_READ]
    worse = [(a * (1.1 + 0.002 * (i % 7)), b) for i, (a, b) in enumerate(many)]
    runs = [told(metric, metric_of(texts), texts) for texts in (many, worse)]
    without = [[metric_of(texts[:i] + texts[i + 1 :]) for i in range(len(texts))] for texts in (many, worse)]
    (score,) = runs[0][0].scores["t"]
    assert score.result.error == pytest.approx(jackknife(without[0]), rel=0.02)
    found = differences(runs[0], runs[1])["t", metric]
    assert found.value == pytest.approx(metric_of(worse) - metric_of(many))
    paired = jackknife([new - old for old, new in zip(*without, strict=True)])
    assert found.error == pytest.approx(paired, rel=0.02)
    assert paired < jackknife(without[1]) / 1.5


def test_a_metric_that_is_no_function_of_a_mean_has_no_error() -> None:
    (score,) = told("f1", 0.4, [0.0, 1.0, 1.0])[0].scores["t"]
    assert score.result == Mean(0.4, None)
    assert score.moved == ()
