"""A GGUF file through the commands, as a folder is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import roundel
from commands import command
from roundel.calibration.tokenizer import load_tokenizer
from roundel.data.bundled import bundled_model


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    roundel.quantize(bundled_model(), folder / "out", format="gguf:q8_0")
    (file,) = (folder / "out").glob("*.gguf")
    return Path(shutil.copy(file, folder / "bare.gguf"))


def test_inspect_and_verify(bare: Path) -> None:
    assert "GGUF:Q8_0: 30 layers" in command("inspect", bare).output
    found = command("verify", bare, "--against", bundled_model())
    assert found.code == 0 and "45.3 dB on average" in found.output


def test_generate(bare: Path) -> None:
    prompt = ("It was a dark night, and", "--max-new-tokens", 8, "--temperature", 0)
    ours, original = (command("generate", model, *prompt) for model in (bare, bundled_model()))
    assert ours.code == 0, ours.error
    assert ours.output == original.output and len(ours.output) > len(prompt[0]) + 8


def test_perplexity_and_divergence(bare: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a dark night, and the sea. " * 60)
    found = command("eval", bare, "--ppl", text, "--window", 64, "--kl-against", bundled_model())
    assert found.code == 0, found.error
    assert "KL in nats, mean" in found.output and "bare.gguf" in found.output


def test_the_tokenizer_is_found(bare: Path) -> None:
    text = "It was a dark night"
    own, made = load_tokenizer(bundled_model()), load_tokenizer(bare)
    assert made.encode(text, add_special_tokens=False, verbose=False) == own.encode(
        text, add_special_tokens=False, verbose=False
    )
