"""Streamed numbers equal those of the whole model as transformers loads it, family by family, float and quantized."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.cases import CONFIGS, make_case
from models import pico
from roundel.api import quantize
from roundel.checkpoint import open_checkpoint
from roundel.data.bundled import bundled_model
from roundel.errors import NumericsError, PlanError, RecipeError, SourceError
from roundel.evaluation import room, travel
from roundel.evaluation.measure import Evaluation, measure
from roundel.evaluation.models import decoded_model, float_model, logits_of
from roundel.evaluation.perplexity import compare

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "opt", "gpt2", "cohere", "qwen3_moe", "gpt_oss", "deepseek_v3")
WINDOW, COUNT = 24, 5


def tokens_file(folder: Path, tokens: int = WINDOW * COUNT + 7) -> Path:
    ids = torch.randint(3, 256, (tokens,), generator=torch.Generator().manual_seed(3))
    path = folder / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": part.tolist()}) + "\n" for part in ids.split(50)))
    return path


def windows_in(path: Path) -> Tensor:
    ids = [token for line in path.read_text().splitlines() for token in json.loads(line)["input_ids"]]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


def decoded(folder: Path) -> torch.nn.Module:
    checkpoint = open_checkpoint(folder)
    weights = {name: checkpoint.weights(layer).float() for name, layer in checkpoint.layers.items()}
    checkpoint.close()
    return decoded_model(folder, weights)


def assert_equal(found: Evaluation, reference: torch.nn.Module, candidate: torch.nn.Module, windows: Tensor) -> None:
    expected = compare(logits_of(reference), logits_of(candidate), windows)
    first, second = found.models
    assert first.perplexity.value == pytest.approx(expected.perplexity_reference, rel=1e-5)
    assert second.perplexity.value == pytest.approx(expected.perplexity, rel=1e-5)
    far = second.distance
    assert far is not None
    assert far.perplexity.value == pytest.approx(
        expected.perplexity - expected.perplexity_reference, rel=1e-3, abs=1e-3
    )
    assert far.kl_mean.value == pytest.approx(expected.kl_mean, rel=1e-3, abs=1e-7)
    assert far.kl_p999.value == pytest.approx(expected.kl_p999, rel=1e-3, abs=1e-6)
    assert abs(far.agreement.value - expected.top1_agreement) <= 1 / expected.tokens  # a tie may fall either way
    assert found.scored == expected.tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_as_the_whole_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary in slabs of 37 tokens, two windows at a time; the whole model as transformers loads it."""
    monkeypatch.setattr(travel, "SLAB", 37 * WINDOW)
    monkeypatch.setattr(travel, "PART_TOKENS", 2 * WINDOW)
    case = make_case(family, tmp_path / "model")
    case.checkpoint.close()
    if family in ("gpt2", "gpt_oss"):  # nothing is rounded of the one, transformers joins no experts of the other
        pico.build(family, tmp_path / "out", "float32", seed=1, **CONFIGS.get(family, {}))
    else:
        quantize(tmp_path / "model", tmp_path / "out", scheme="W4A16", group_size=32)
    text = tokens_file(tmp_path)
    found = measure([tmp_path / "model", tmp_path / "out"], str(text), window=WINDOW)
    assert_equal(found, case.model, decoded(tmp_path / "out"), windows_in(text))


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "nvfp4", "auto_gptq", "auto_awq", "llm_compressor"])
def test_packed_checkpoints(kind: str, tmp_path: Path) -> None:
    model, packed = pico.build("llama", tmp_path / "model", vocab_size=256), tmp_path / "packed"
    if kind in ("fp8", "mxfp4", "nvfp4"):
        {"fp8": pico.build_fp8, "mxfp4": pico.build_mxfp4, "nvfp4": pico.build_nvfp4}[kind](packed, vocab_size=256)
    else:
        scheme = {"llm_compressor": {"scheme": "MXFP4"}}.get(kind, {"scheme": "W4A16_ASYM", "group_size": 32})
        quantize(model, packed, format=kind, **scheme)
    text = tokens_file(tmp_path)
    found = measure([model, packed], str(text), window=WINDOW)
    assert_equal(found, float_model(model), decoded(packed), windows_in(text))


def test_a_packed_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(travel, "SLAB", 50 * WINDOW)
    model = pico.build("llama", tmp_path / "model")
    quantize(model, tmp_path / "out", scheme="W8A16", group_size=32, quant_lm_head=True)
    text = tokens_file(tmp_path)
    found = measure([model, tmp_path / "out"], str(text), window=WINDOW)
    assert_equal(found, float_model(model), decoded(tmp_path / "out"), windows_in(text))


def test_disk_and_memory_give_the_same(tmp_path: Path) -> None:
    model, text = pico.build("llama", tmp_path / "model"), str(tokens_file(tmp_path))
    one, other = (measure([model], text, window=WINDOW, offload=place).models[0] for place in ("ram", "disk"))
    assert one.perplexity == other.perplexity


def test_overlapping_windows_score_each_token_once(tmp_path: Path) -> None:
    model, text, stride = pico.build("llama", tmp_path / "model"), tokens_file(tmp_path), 7
    found = measure([model], str(text), window=WINDOW, stride=stride)
    logits, surprises = logits_of(float_model(model)), []
    ids = torch.tensor([t for line in text.read_text().splitlines() for t in json.loads(line)["input_ids"]])
    with torch.no_grad():
        for number, start in enumerate(range(0, len(ids) - WINDOW + 1, stride)):
            log_p = logits(ids[None, start : start + WINDOW])[0].double().log_softmax(-1)
            for place in range(1 if number == 0 else WINDOW - stride, WINDOW):
                surprises.append(-float(log_p[place - 1, ids[start + place]]))
    assert found.scored == len(surprises)
    assert found.models[0].perplexity.value == pytest.approx(math.exp(sum(surprises) / len(surprises)), rel=1e-5)


def test_several_models_are_compared_with_the_first(tmp_path: Path) -> None:
    model, text = pico.build("llama", tmp_path / "model"), str(tokens_file(tmp_path))
    for bits in (3, 8):
        quantize(model, tmp_path / f"w{bits}", bits=bits, group_size=32)
    found = measure([model, tmp_path / "w8", tmp_path / "w3"], text, window=WINDOW)
    fine, coarse = (model.distance for model in found.models[1:])
    assert fine is not None
    assert coarse is not None
    assert 0 < fine.kl_mean.value < 0.05 * coarse.kl_mean.value
    alone = measure([model, tmp_path / "w3"], text, window=WINDOW).models[1].distance
    assert alone == coarse


def test_a_model_is_no_distance_from_its_copy(tmp_path: Path) -> None:
    models = [pico.build("llama", tmp_path / name) for name in ("one", "other")]
    far = measure(models, str(tokens_file(tmp_path)), window=WINDOW).models[1].distance
    assert far is not None
    assert (far.perplexity.value, far.perplexity.error, far.kl_mean.value, far.agreement.value) == (0, 0, 0, 1)


def test_positions_are_written(tmp_path: Path) -> None:
    model, text, file = (
        pico.build("llama", tmp_path / "model"),
        tokens_file(tmp_path),
        tmp_path / "p" / "all.safetensors",
    )
    quantize(model, tmp_path / "out", bits=4, group_size=32)
    found = measure([model, tmp_path / "out"], str(text), window=WINDOW, positions=file)
    held = load_file(file)
    assert torch.equal(held["tokens"], windows_in(text))
    scored = ~held["1.surprise"].isnan()
    assert int(scored.sum()) == found.scored
    assert not scored[:, 0].any()
    assert float(held["1.surprise"][scored].mean().exp()) == pytest.approx(found.models[1].perplexity.value, rel=1e-5)
    assert float(held["1.divergence"][scored].mean()) == pytest.approx(found.models[1].distance.kl_mean.value, rel=1e-4)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["models"]) == ["model", "out"]


def test_what_cannot_be_measured_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = pico.build("llama", tmp_path / "model"), str(tokens_file(tmp_path))
    words = tmp_path / "words.txt"
    words.write_text("a few words\n" * 20)
    with pytest.raises(SourceError, match="holds no tokenizer"):
        measure([model], str(words), window=WINDOW)
    with pytest.raises(SourceError, match="the tokenizer is another model's"):
        measure([model], str(words), window=WINDOW, tokenizer=bundled_model())
    with pytest.raises(RecipeError, match=r"has 127 tokens, a window 128\. Use a longer text"):
        measure([model], text)
    with pytest.raises(RecipeError, match="takes 128 tokens, not 4,096"):
        measure([model], text, window=4096)
    with pytest.raises(RecipeError, match="A stride of 25"):
        measure([model], text, window=WINDOW, stride=25)
    with pytest.raises(RecipeError, match="named twice"):
        measure([model, model], text, window=WINDOW)
    other = pico.build("llama", tmp_path / "other", vocab_size=300)
    with pytest.raises(PlanError, match="300 tokens, model 256"):
        measure([model, other], text, window=WINDOW)
    odd = pico.build("llama", tmp_path / "odd")
    stored = load_file(odd / "model.safetensors")
    stored["model.norm.weight"] = stored["model.norm.weight"][:5].clone()
    save_file(stored, odd / "model.safetensors")
    with pytest.raises(SourceError, match=r"model\.norm\.weight is \[5\], and config\.json describes"):
        measure([odd], text, window=WINDOW)
    monkeypatch.setattr(room, "free_memory", lambda device="cpu": 1 << 20)
    with pytest.raises(PlanError, match="of memory to run"):
        measure([model], text, window=WINDOW)


def test_too_little_disk_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = pico.build("llama", tmp_path / "model"), str(tokens_file(tmp_path))

    class Full:
        free = 1000

    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: Full)
    with pytest.raises(PlanError, match=r"on disk between blocks.*TMPDIR.*--limit"):
        measure([model], text, window=WINDOW, offload="disk")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_broken_weights_are_named(name: str, tmp_path: Path) -> None:
    model, text = pico.build("llama", tmp_path / "model"), str(tokens_file(tmp_path))
    tensors = load_file(model / "model.safetensors")
    tensors[name][3, 5] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match="model.layers.1" if "layers" in name else "not numbers"):
        measure([model], text, window=WINDOW)


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    model, text = pico.build("llama", tmp_path / "model"), str(tokens_file(tmp_path))
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-1000])
    with pytest.raises(SourceError):
        measure([model], text, window=WINDOW)


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    model, text, told = pico.build("llama", tmp_path / "model"), str(tokens_file(tmp_path)), list[float]()
    measure([model], text, window=WINDOW, tick=lambda done, text: told.append(done))
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0, abs=0.01)
