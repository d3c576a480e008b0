"""The output folder: what is in it, what may be written where, and that a full disk is no end."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import safe_open

import roundel
from models.pico import build
from models.raw import hashes
from rights import public_folder, without_rights
from roundel import Recipe, pipeline
from roundel.checkpoint import open_checkpoint
from roundel.cli.main import cli
from roundel.errors import OutputError, QuantizationError, SourceError
from roundel.io.source import INDEX

SMALL = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"chat_template": "x"}',
    "generation_config.json": '{"do_sample": true}',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "modeling_own.py": "raise SystemExit",
}
WRITTEN = {"README.md", "config.json", "model.safetensors", "quantization_config.json", "recipe.json", "report.json"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return dressed(build("llama", tmp_path / "model"))


def dressed(model: Path) -> Path:
    for name, text in SMALL.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)
    (model / "README.md").write_text("not ours")
    return model


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def refused(why: str, model: Path, out: Path, error: type[QuantizationError] = OutputError, **options: object) -> str:
    with pytest.raises(error, match=why) as found:
        roundel.quantize(model, out, workers=1, **options)  # type: ignore[arg-type]
    return str(found.value)


def test_what_is_in_it(model: Path, out: Path) -> None:
    report = roundel.quantize(model, out, scheme="W4A16G32", ignore_layers=["layers.1.mlp"])
    assert set(hashes(out)) == WRITTEN | set(SMALL)
    assert all((out / name).read_text() == text for name, text in SMALL.items())
    config, quantization = (
        json.loads((out / name).read_text()) for name in ("config.json", "quantization_config.json")
    )
    assert config == json.loads((model / "config.json").read_text()) | {"quantization_config": quantization}
    assert quantization["quant_method"] == "auto-round" and quantization["group_size"] == 32
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["scheme"] == "W4A16G32" and recipe["ignore_layers"] == ["layers.1.mlp"]
    saved = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in saved["rows"]] == [work.name for work in report.plan.works]
    assert sum(row["bytes"] for row in saved["rows"]) == sum(
        place.spec.nbytes for shard in report.plan.outputs[0].shards for place in shard.places.values()
    )
    assert {kept["name"] for kept in saved["kept"]} == {kept.name for kept in report.plan.kept}
    with safe_open(out / "model.safetensors", "numpy") as found:
        assert "model.layers.0.mlp.up_proj.qweight" in set(found.keys()) and "model.layers.1.mlp.up_proj.weight" in set(
            found.keys()
        )


def test_the_card_says_how_to_make_it_again(model: Path, out: Path, tmp_path: Path) -> None:
    wishes = {"bits": 3, "group_size": 32, "sym": False, "layer_config": {"v_proj": {"bits": 8}}, "shard_size": "100KB"}
    roundel.quantize(model, out, recipe=Recipe.from_dict(wishes | {"quant_lm_head": True, "strict": True}))
    card = (out / "README.md").read_text()
    assert "model" in card and "auto_round" in card and "not ours" not in card
    (command,) = [shlex.split(line) for line in card.splitlines() if line.startswith("    roundel quantize model OUT")]
    again = [str(tmp_path / "again") if word == "OUT" else str(model) if word == "model" else word for word in command]
    assert CliRunner().invoke(cli, again[1:], catch_exceptions=False).exit_code == 0
    assert hashes(tmp_path / "again") == hashes(out)


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"scheme": "w2a16g32", "ignore_layers": "down_proj,layers.0", "shard_size": 50_000},
        {"bits": 8, "sym": False, "layer_config": {"layers.1": "W4A16G32", r"q_proj$": {"bits": 16}}, "strict": True},
        {"scheme": "MXFP4", "formats": "auto_round,llm_compressor", "quant_lm_head": True},
    ],
)
def test_its_recipe_makes_it_again(wishes: dict[str, object], model: Path, out: Path, tmp_path: Path) -> None:
    roundel.quantize(model, out, recipe=Recipe.from_dict(wishes))
    saved = next(out.rglob("recipe.json"))
    roundel.quantize(model, tmp_path / "again", recipe=Recipe.load(saved))
    assert hashes(tmp_path / "again") == hashes(out)


def test_several_formats_are_the_same_as_each_alone(model: Path, out: Path, tmp_path: Path) -> None:
    names = ("auto_round", "auto_gptq", "auto_awq")
    roundel.quantize(model, out, format=",".join(names), scheme="W4A16G32")
    assert {path.name for path in out.iterdir()} == set(names)
    for name in names:
        roundel.quantize(model, tmp_path / name, format=name, scheme="W4A16G32")
        alone, among = hashes(tmp_path / name), hashes(out / name)
        assert set(alone) == set(among) == WRITTEN | set(SMALL)
        different = {file for file in alone if alone[file] != among[file]}
        assert different <= {"recipe.json", "README.md", "report.json"}, "which name all formats that were asked for"


def test_shards_and_their_index(model: Path, out: Path) -> None:
    roundel.quantize(model, out, shard_size="30KB")
    index = json.loads((out / INDEX).read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == shards
    total = 0
    for shard in shards:
        with safe_open(out / shard, "numpy") as found:
            assert {name for name, file in index["weight_map"].items() if file == shard} == set(found.keys())
        total += (out / shard).stat().st_size
    assert 0 < total - index["metadata"]["total_size"] < 3000 * len(shards)


@pytest.mark.parametrize("model_type", ["llama", "gemma3"])
def test_a_head_that_is_untied_says_so(model_type: str, tmp_path: Path, out: Path) -> None:
    model = build(model_type, tmp_path / model_type, tie_word_embeddings=True)
    roundel.quantize(model, out, quant_lm_head=True, scheme="W8A16")
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config.get("text_config", config)["tie_word_embeddings"] is False


def test_a_complete_output_is_left_alone(model: Path, out: Path) -> None:
    roundel.quantize(model, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert roundel.quantize(model, out).already_complete
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    refused("not empty", model, out, scheme="W8A16")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"fingerprint": 3}'])
def test_a_folder_with_a_strange_report_is_not_empty(content: str, model: Path, out: Path) -> None:
    out.mkdir()
    (out / "report.json").write_text(content)
    refused("not empty", model, out)


def test_a_truncated_output_is_not_complete(model: Path, out: Path) -> None:
    roundel.quantize(model, out)
    os.truncate(out / "model.safetensors", 5000)
    refused("not empty", model, out)
    assert not roundel.quantize(model, out, overwrite=True).already_complete


def test_a_folder_that_is_not_empty_is_not_touched(model: Path, out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    message = refused("is not empty and holds no unfinished run", model, out)
    assert str(out) in message and "--overwrite" in message
    assert os.listdir(out) == ["notes.txt"]


def test_overwrite_removes_only_what_is_ours(model: Path, out: Path, tmp_path: Path) -> None:
    roundel.quantize(model, out, shard_size="30KB")
    (out / "notes.txt").write_text("mine")
    (out / "below").mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (out / "below" / name).write_text("mine")
    roundel.quantize(model, out, overwrite=True, scheme="W8A16")
    roundel.quantize(model, tmp_path / "fresh", scheme="W8A16")
    found = hashes(out)
    mine = {name: found.pop(name) for name in list(found) if name == "notes.txt" or name.startswith("below/")}
    assert len(mine) == 4 and found == hashes(tmp_path / "fresh")


def test_the_source_is_never_the_output(model: Path, tmp_path: Path) -> None:
    before = hashes(model)
    link, home = tmp_path / "link", tmp_path / "home"
    link.symlink_to(model)
    for out in (model, link, tmp_path / "x" / ".." / "model"):
        refused("is the source itself", model, out, overwrite=True)
    for out in (model / "out", link / "a" / "b"):
        refused("lies in the source .* outside of it", model, out)
    shutil.copytree(model, home / "auto_gptq")
    refused("is the source itself", home / "auto_gptq", home, overwrite=True, format="auto_round,auto_gptq")
    assert hashes(model) == before == hashes(home / "auto_gptq") and not (model / "out").exists()


def test_a_file_in_the_way(model: Path, out: Path) -> None:
    out.write_text("mine")
    refused("is a file. Choose a folder", model, out)
    refused("out is a file. Choose a folder", model, out / "below")
    refused("is a file. Choose a folder", model, out, algorithm="gptq", dataset="absent.txt")  # before data is read
    out.unlink()
    out.mkdir()
    (out / "auto_gptq").write_text("mine")
    refused("auto_gptq is a file", model, out, format="auto_round,auto_gptq", overwrite=True)
    assert (out / "auto_gptq").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("mode", [0o000, 0o111, 0o444, 0o555])
@pytest.mark.parametrize("where", ["out", "out/below", "out/auto_gptq"])
def test_no_permission(where: str, mode: int, overwrite: bool) -> None:
    with public_folder() as home:
        model, out = build("llama", home / "model"), home / "out"
        (model / "model.safetensors").chmod(0o644)
        target, closed = (out, out / "auto_gptq") if where == "out/auto_gptq" else (home / where, out)
        for folder in dict.fromkeys((out, closed)):
            folder.mkdir()
            folder.chmod(0o777)
        closed.chmod(mode)
        with without_rights():
            why = "is not empty" if target == out != closed and not overwrite else "ermission denied"
            message = refused(why, model, target, overwrite=overwrite, format="auto_round,auto_gptq")
        assert "Choose a" in message
        closed.chmod(0o777)
        assert not any(path.is_file() for path in out.rglob("*"))


def test_a_folder_can_be_the_one_at_hand(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.mkdir()
    monkeypatch.chdir(out)
    roundel.quantize(model, ".")
    open_checkpoint(out).close()


def test_a_small_file_that_leaves_the_source(model: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * (2 << 20))
    (model / "tokenizer.model").symlink_to(tmp_path / "secret")
    refused("tokenizer.model is a link that leaves", model, out, error=SourceError)
    assert not out.exists()


Usage = shutil._ntuple_diskusage


def test_a_disk_that_is_too_small(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roundel.quantize(model, out)
    before = hashes(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6, 1000))
    other = out.with_name("other")
    message = refused("has 1.0 kB free and the output takes", model, other)
    assert str(other) in message and "choose another disk" in message
    assert os.listdir(other) == []
    refused("free and the output takes", model, out, overwrite=True, quant_lm_head=True, bits=8)
    assert hashes(out) == before, "nothing is removed for an output that does not fit"
    roundel.quantize(model, out, overwrite=True)  # fits where the same output was
    assert hashes(out) == before


@pytest.mark.parametrize("done", [False, True])
def test_what_an_unfinished_run_holds_counts_as_free(
    done: bool, model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(model, out, "finish" if done else "_Loop.go")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6, 1000))
    roundel.quantize(model, out)
    monkeypatch.undo()
    roundel.quantize(model, tmp_path / "fresh")
    assert hashes(out) == hashes(tmp_path / "fresh")


def interrupt(model: Path, out: Path, where: str, **options: object) -> None:
    """Stop a run where it calls a function of the pipeline."""
    owner, name = (pipeline._Loop, "go") if where == "_Loop.go" else (pipeline, where)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, name, stop)
        roundel.quantize(model, out, **options)  # type: ignore[arg-type]


def test_files_that_were_taken_away_are_made_again(model: Path, tmp_path: Path) -> None:
    roundel.quantize(model, tmp_path / "fresh", shard_size="30KB")
    fresh = hashes(tmp_path / "fresh")
    victims = sorted(path.name for path in (tmp_path / "fresh").glob("*.safetensors"))
    for number, victim in enumerate(victims):
        out = tmp_path / f"out{number}"
        interrupt(model, out, "finish", shard_size="30KB")
        if number == 0:
            os.truncate(out / victim, 5000)
        elif number == 1:
            (out / victim).rename(out / f"{victim}.partial")  # as a crash between two renames leaves it
        else:
            (out / victim).unlink()
        roundel.quantize(model, out, shard_size="30KB")
        assert hashes(out) == fresh


def test_a_journal_that_forgot_is_not_trusted(model: Path, out: Path, tmp_path: Path) -> None:
    interrupt(model, out, "finish")
    lines = (out / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (out / "journal.jsonl").write_bytes(b"".join(lines[:5]))
    roundel.quantize(model, out)
    roundel.quantize(model, tmp_path / "fresh")
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_a_run_that_ended_at_its_first_instant(model: Path, out: Path) -> None:
    out.mkdir()
    (out / "journal.new").write_text("{")
    roundel.quantize(model, out)
    assert set(hashes(out)) == WRITTEN | set(SMALL)


CALLS = ("posix_fallocate", "pwrite", "write", "fdatasync", "fsync", "copy_file_range")


def full_from(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Have the disk be full from the n-th call that writes."""
    count = itertools.count()

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            if next(count) >= number:
                raise OSError(28, "No space left on device")
            return real(*args)

        return call

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        for name in CALLS:
            monkeypatch.setattr(os, name, counted(getattr(os, name)))

    return patch


def test_a_disk_full_at_any_call_is_continued(model: Path, tmp_path: Path) -> None:
    roundel.quantize(model, tmp_path / "fresh", workers=1, shard_size="30KB")
    fresh, finished = hashes(tmp_path / "fresh"), False
    for number in range(0, 400, 7):
        out = tmp_path / f"out{number}"
        with pytest.MonkeyPatch.context() as monkeypatch:
            full_from(number)(monkeypatch)
            try:
                roundel.quantize(model, out, workers=1, shard_size="30KB")
                finished = True
            except OutputError as error:
                assert "No space left on device" in str(error) and "ree the disk" in str(error)
        if (out / "config.json").exists():  # then everything else is there too
            assert {**hashes(out), "journal.jsonl": ""} == {**fresh, "journal.jsonl": ""}
        roundel.quantize(model, out, workers=1, shard_size="30KB")
        assert hashes(out) == fresh
        shutil.rmtree(out)
        if finished:
            return
    pytest.fail("the run never came to its end")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of a given size in kB; called again, it is resized."""
    home, mounted = tmp_path / "disk", False

    def mount(kilobytes: int) -> Path:
        nonlocal mounted
        home.mkdir(exist_ok=True)
        remount = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={kilobytes}k", "tmpfs", str(home)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no disk can be mounted here: {error}")
        mounted = True
        return home

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(home)], check=True)


@pytest.mark.parametrize("share", [0.05, 0.4, 0.6, 0.7, 0.8, 0.9])
def test_a_real_disk_that_is_full(
    share: float, model: Path, tmp_path: Path, tiny_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    roundel.quantize(model, tmp_path / "fresh", shard_size="30KB")
    taken = sum(-(-path.stat().st_size // 4096) * 4 for path in (tmp_path / "fresh").rglob("*") if path.is_file())
    out = tiny_disk(int(share * taken)) / "out"
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 10**9))  # found out late
        refused("No space left on device.*Free the disk", model, out, shard_size="30KB")
    assert not (out / "config.json").exists()
    tiny_disk(10_000)
    roundel.quantize(model, out, shard_size="30KB")
    assert hashes(out) == hashes(tmp_path / "fresh")
