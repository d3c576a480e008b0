"""`roundel generate` and `roundel chat` on the bundled model, rounded."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import roundel
from commands import command
from roundel.calibration.tokenizer import load_tokenizer
from roundel.data.bundled import bundled_model
from roundel.evaluation.models import continuation, float_model

PROMPT = "It was a dark night, and"
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded") / "out"
    roundel.quantize(bundled_model(), folder, scheme="W4A16", workers=1)
    return folder


def talking(rounded: Path, folder: Path) -> Path:
    """The same with a chat template."""
    shutil.copytree(rounded, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return folder


def test_generate_writes_what_the_float_model_writes_in_eight_bits(tmp_path: Path) -> None:
    roundel.quantize(bundled_model(), tmp_path, scheme="W8A16", workers=1)
    found = command("generate", tmp_path, PROMPT, "--max-new-tokens", 6, "--temperature", 0)
    source = bundled_model()
    expected = PROMPT + continuation(float_model(source), load_tokenizer(source), PROMPT, 6)
    assert (found.code, found.output) == (0, " ".join(expected.split()))


def test_generate_draws_the_same_with_the_same_seed(rounded: Path) -> None:
    options = ("--max-new-tokens", 12, "--temperature", 1, "--seed")
    one, same, other = (command("generate", rounded, PROMPT, *options, seed) for seed in (1, 1, 2))
    assert one.code == 0 and one.output == same.output != other.output


def test_generate_runs_a_checkpoint_that_is_not_rounded() -> None:
    found = command("generate", bundled_model(), PROMPT, "--max-new-tokens", 3, "--temperature", 0)
    assert found.code == 0 and found.output.startswith(PROMPT) and len(found.output) > len(PROMPT)


def test_chat(rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = talking(rounded, tmp_path / "talking")
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\nWhy?\n\nnot read\n"))
    found = command("chat", folder, "--system", "Be brief.", "--max-new-tokens", 4, "--temperature", 0)
    assert found.code == 0 and found.output.count(">") == 3


def test_a_chat_goes_on_where_it_was(rounded: Path, tmp_path: Path) -> None:
    """The second answer is to the whole conversation."""
    from roundel.inference.drawing import Drawing
    from roundel.inference.text import answered, continued, tokenizer_for

    folder = talking(rounded, tmp_path / "talking")
    model = roundel.load(folder)
    tokenizer = tokenizer_for(folder, model)
    drawing, pieces = Drawing(tokens=5, temperature=0), []
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    turns.append({"role": "user", "content": "Why?"})
    found = answered(model, tokenizer, turns, pieces.append, drawing)
    text = "user: Who?\nassistant: I.\nuser: Why?\nassistant:"
    assert found == "".join(pieces) == continued(model, tokenizer, text, lambda _: None, drawing)
    assert found


def test_no_chat_template(rounded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    found = command("chat", rounded)  # told before anything is said
    assert (
        found.code == 5 and not found.output and "no chat template" in found.error and "roundel generate" in found.error
    )


def test_a_template_that_says_nothing(rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = talking(rounded, tmp_path / "talking")
    (folder / "chat_template.jinja").write_text("{# nothing #}")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    found = command("chat", folder)
    assert found.code == 5 and "makes nothing of this conversation" in found.error


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"temperature": 0}, {"top_p": 3}])
def test_a_generation_config_that_is_not_possible(rounded: Path, tmp_path: Path, wrong: dict[str, object]) -> None:
    folder = shutil.copytree(rounded, tmp_path / "out")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True} | wrong))
    found = command("generate", folder, PROMPT)
    assert found.code == 5 and f"says {next(iter(wrong))}=" in found.error


def test_other_ways_of_decoding_that_a_checkpoint_wants(rounded: Path) -> None:
    """One text is written, token by token."""
    from roundel.inference.drawing import Drawing
    from roundel.inference.text import continued, tokenizer_for

    model: Any = roundel.load(rounded)
    tokenizer = tokenizer_for(rounded, model)

    def text(**wanted: Any) -> str:
        model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0, **wanted)
        return continued(model, tokenizer, PROMPT, str, Drawing(tokens=5))

    plain = text()
    for wanted in (
        {"num_beams": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 2, "num_return_sequences": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"force_words_ids": [[5]], "num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"token_healing": True},
        {"cache_implementation": "quantized"},
        {"return_dict_in_generate": True},
        {"stop_strings": ["no such text"]},
    ):
        assert text(**wanted) == plain, wanted
    assert plain not in text(stop_strings=[plain.split()[0]])
    assert text(do_sample=True, num_return_sequences=2)


@pytest.mark.parametrize("temperature", [1e-320, 1e-7])
def test_next_to_no_temperature_is_none(rounded: Path, temperature: float) -> None:
    greedy, found = (
        command("generate", rounded, PROMPT, "--max-new-tokens", 3, "--temperature", chosen)
        for chosen in (0, temperature)
    )
    assert (found.code, found.output) == (0, greedy.output)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_that_computes_no_numbers(rounded: Path, tmp_path: Path, temperature: float) -> None:
    folder = shutil.copytree(rounded, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, folder / "model.safetensors")
    found = command("generate", folder, PROMPT, "--temperature", temperature, "--max-new-tokens", 3)
    assert found.code == 6 and "is not a number" in found.error and "roundel verify" in found.error


def test_what_is_interrupted_keeps_nothing(rounded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("roundel.inference.text.continued", interrupted)
    found = command("generate", rounded, PROMPT)
    assert (found.code, found.error) == (130, "Interrupted.")


def test_no_tokenizer(rounded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(rounded, tmp_path / "out", ignore=shutil.ignore_patterns("tokenizer*"))
    found = command("generate", folder, PROMPT)
    assert found.code == 5 and "holds no tokenizer that can be read" in found.error


def test_a_tokenizer_of_another_model(rounded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(rounded, tmp_path / "out")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append(
        {
            "id": 99999, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
    )  # fmt: skip
    path.write_text(json.dumps(tokenizer))
    found = command("generate", folder, PROMPT)
    assert found.code == 5 and "belongs to another model" in found.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backend", "nunba"), "Did you mean 'numba'?"),
        (("--temperature", "-1"), "A temperature of -1.0 is not possible"),
        (("--top-p", "2"), "top_p=2.0 is not possible"),
        (("--max-new-tokens", "0"), "0 tokens are none to write"),
        (("--seed", str(1 << 64)), "does not fit into 64 bits"),
        (("--device", "gpu"), "none that torch knows"),
    ],
)
def test_wishes_that_make_no_sense(rounded: Path, options: tuple[str, ...], message: str) -> None:
    found = command("generate", rounded, PROMPT, *options)
    assert found.code == 2 and message in found.error


def test_prompts_that_cannot_be_continued(rounded: Path) -> None:
    empty = command("generate", rounded, "")
    assert empty.code == 2 and "empty prompt" in empty.error
    long = command("generate", rounded, "night " * 5000)
    assert long.code == 2 and "Shorten it" in long.error
