"""The bundled model and texts: they are there, they are what PROVENANCE.md says, and the texts can be made again."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from roundel.calibration.tokenizer import load_tokenizer
from roundel.data.bundled import bundled_model, bundled_text
from roundel.evaluation.models import float_model, logits_of
from roundel.evaluation.perplexity import perplexity, windows

ROOT = Path(__file__).parents[2]
SHA256 = {
    "tinybook/model.safetensors": "057193ed462784de6b009418dd6b2026074fc05a3bcfd2a5ad0e3c10ffadbb60",
    "text/calibration.txt": "3bc3f98ddfe712fca0a159acc08c4424152146a7226ca9e94bbb5c9c5843212e",
    "text/evaluation.txt": "f2f40681ef6fad3146a7d3eaea21e4e59b7ad41b9e749eaa502237ba6955bee3",
}
TOKENS = {"calibration": 60_037, "evaluation": 25_608}


def sampler() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sample_texts", ROOT / "tools" / "sample_texts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_are_whole() -> None:
    folder = bundled_model().parent
    assert {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in SHA256} == SHA256


def test_the_model_folder_is_a_checkpoint() -> None:
    names = {path.name for path in bundled_model().iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert sum(p.numel() for p in float_model(bundled_model()).parameters()) == 3_803_392
    assert (bundled_model() / "PROVENANCE.md").exists()
    assert (bundled_text("evaluation").parent / "PROVENANCE.md").exists()


@pytest.mark.parametrize("name", ["calibration", "evaluation"])
def test_texts_are_plain_lines_of_the_stated_length(name: str) -> None:
    text = bundled_text(name).read_text(encoding="utf-8")
    tokenizer = load_tokenizer(bundled_model())
    assert len(tokenizer.encode(text, add_special_tokens=False, verbose=False)) == TOKENS[name]
    assert text.endswith("\n")
    assert text.splitlines() == text.split("\n")[:-1]
    assert all(
        65 <= 1 + len(tokenizer.encode(line, add_special_tokens=False, verbose=False)) <= 255
        for line in text.splitlines()
    )
    assert "<|endoftext|>" not in text
    assert "\ufffd" not in text


def test_the_model_recognises_its_own_text() -> None:
    """The first 20 windows; all 100 have perplexity 35.05."""
    text = bundled_text("evaluation").read_text(encoding="utf-8")
    ids = windows(text, load_tokenizer(bundled_model()), 256)
    assert ids.shape == (100, 256)
    assert perplexity(logits_of(float_model(bundled_model())), ids[:20]) == pytest.approx(37.434, abs=0.01)


def test_the_first_passage_can_be_sampled_again() -> None:
    tool = sampler()
    tokenizer = load_tokenizer(bundled_model())
    made, tokens = next(tool.passages(tool.writer(), tokenizer, tool.SEEDS["evaluation"], batch=1))
    stored = bundled_text("evaluation").read_text(encoding="utf-8").partition("\n")[0]
    assert made == stored
    assert tokens == 1 + len(tokenizer.encode(made, add_special_tokens=False, verbose=False))


def test_draws_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = sampler()
    monkeypatch.setattr(tool, "LONGEST", 15)
    model, line_end = tool.writer(), 199
    together = tool.candidates(model, line_end, seed=7, first=0, batch=3)
    for first, row in enumerate(together):
        alone = tool.candidates(model, line_end, seed=7, first=first, batch=1)[0]
        ended = (alone == line_end).nonzero()[:1].flatten().tolist() or [15]
        assert torch.equal(row[: ended[0] + 1], alone[: ended[0] + 1])
