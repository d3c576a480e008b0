"""Checkpoints as models: what is loaded is what transformers loads, what is given takes its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from roundel.calibration.tokenizer import load_tokenizer
from roundel.data.bundled import bundled_model
from roundel.errors import RecipeError, SourceError
from roundel.evaluation.models import continuation, decoded_model, draw, float_model, logits_of

LAYER = "model.layers.1.mlp.down_proj"


def altered(tmp_path: Path, tensors: dict[str, torch.Tensor | None] | None = None, **settings: object) -> Path:
    """A copy of the bundled model with tensors replaced (None: left out) and config fields set."""
    folder = tmp_path / "altered"
    shutil.copytree(bundled_model(), folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    merged = load_file(folder / "model.safetensors") | (tensors or {})
    save_file({n: t for n, t in merged.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_float_model_is_transformers() -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32, local_files_only=True).eval()
    ours = float_model(bundled_model())
    assert not ours.training
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_given_matrices_replace_stored_ones() -> None:
    matrix = torch.randn(256, 640, generator=torch.Generator().manual_seed(1))
    plain, replaced = (
        float_model(bundled_model()).state_dict(),
        decoded_model(bundled_model(), {LAYER: matrix}).state_dict(),
    )
    assert torch.equal(replaced[f"{LAYER}.weight"], matrix)
    assert all(torch.equal(plain[n], replaced[n]) for n in plain if n != f"{LAYER}.weight")


def test_given_matrices_replace_packed_ones(tmp_path: Path) -> None:
    words = torch.zeros(80, 256, dtype=torch.int32)
    parts = {"qweight": words, "qzeros": torch.zeros(5, 32, dtype=torch.int32), "scales": torch.ones(5, 256)}
    folder = altered(
        tmp_path,
        {f"{LAYER}.weight": None, **{f"{LAYER}.{part}": tensor for part, tensor in parts.items()}},
        quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128},
    )
    with pytest.raises(SourceError, match=r"down_proj\.q(weight|zeros) as I32"):
        float_model(folder)
    matrix = torch.randn(256, 640, generator=torch.Generator().manual_seed(1))
    assert torch.equal(decoded_model(folder, {LAYER: matrix}).state_dict()[f"{LAYER}.weight"], matrix)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"stores nothing under 'lm_tail'"):
        decoded_model(bundled_model(), {"lm_tail": torch.zeros(2, 2)})
    with pytest.raises(SourceError, match=r"is \[256, 640\] in tinybook, but \[2, 2\] was given"):
        decoded_model(bundled_model(), {LAYER: torch.zeros(2, 2)})
    with pytest.raises(SourceError, match=r"lacks 'model\.norm\.weight'"):
        float_model(altered(tmp_path / "a", {"model.norm.weight": None}))
    with pytest.raises(SourceError, match=r"cannot make a causal language model"):
        float_model(altered(tmp_path / "b", model_type="no_such_model"))


def test_loading_is_silent_and_leaves_transformers_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    float_model(bundled_model())
    load_tokenizer(bundled_model())
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_draw_follows_the_cumulated_distribution() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().repeat(6, 1)
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 0.9999999])
    assert draw(logits, uniform).tolist() == [0, 0, 1, 1, 2, 3]


def test_continuation() -> None:
    model, tokenizer = float_model(bundled_model()), load_tokenizer(bundled_model())
    greedy = continuation(model, tokenizer, "It was a dark night, and", 12)
    ids = tokenizer.encode("It was a dark night, and", add_special_tokens=False, verbose=False)
    begun = len(ids)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(logits_of(model)(torch.tensor([ids]))[0, -1].argmax()))
    assert greedy == tokenizer.decode(ids[begun:])
    sampled = [continuation(model, tokenizer, "It was", 12, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(RecipeError, match="empty prompt"):
        continuation(model, tokenizer, "", 3)
