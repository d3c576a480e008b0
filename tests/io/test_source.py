"""Folders that are models, and folders that are not: each is read or refused with what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from models.pico import build
from models.raw import hashes, raw_file
from rights import public_folder, without_rights
from roundel.checkpoint import open_checkpoint
from roundel.errors import SourceError
from roundel.io.source import INDEX, Source, open_source, small_files
from roundel.unit import Piece

FIRST, SECOND, THIRD = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return build("llama", tmp_path / "model", shards=3)


def refused(folder: Path | str, why: str) -> None:
    with pytest.raises(SourceError, match=why) as found:
        open_source(folder).close()
    assert re.search(r"\. [A-Z]", str(found.value)), "a message ends in what to do"


def everything(source: Source) -> dict[str, bytes]:
    return {name: source.read(Piece(tensor=name)).tobytes() for name in source.tensors}


def test_sharded_single_and_loose_shards_are_one_model(sharded: Path, tmp_path: Path) -> None:
    single = build("llama", tmp_path / "single")
    found = []
    for folder in (sharded, single, sharded):
        source = open_source(folder)
        found.append(everything(source))
        source.close()
        (sharded / INDEX).unlink(missing_ok=True)
    assert found[0] == found[1] == found[2] and len(found[0]) == 21


def test_a_single_file_wins_over_leftover_shards(sharded: Path, tmp_path: Path) -> None:
    (sharded / INDEX).unlink()
    shutil.copy(build("llama", tmp_path / "single", seed=1) / "model.safetensors", sharded)
    source = open_source(sharded)
    assert {source.shard_of(name) for name in source.tensors} == {"model.safetensors"}
    source.close()


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    refused(sharded, f"lacks 1 of 3 shards: {SECOND}")


def test_a_truncated_shard(sharded: Path) -> None:
    os.truncate(sharded / SECOND, (sharded / SECOND).stat().st_size - 1)
    refused(sharded, f"{SECOND} cannot be read: .*truncated")


def edited(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_that_names_the_wrong_shard(sharded: Path) -> None:
    edited(sharded, **{"model.embed_tokens.weight": THIRD})
    refused(sharded, f"lists 'model.embed_tokens.weight' in {THIRD}, which does not hold it")


def test_an_index_that_names_a_tensor_nobody_holds(sharded: Path) -> None:
    edited(sharded, ghost=FIRST)
    refused(sharded, "lists 'ghost'")


def test_a_tensor_in_two_loose_shards(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    shutil.copy(sharded / FIRST, sharded / "copy.safetensors")
    refused(sharded, "lies in both copy.safetensors and " + FIRST)


def test_a_tensor_in_two_shards_that_the_index_forgets(sharded: Path) -> None:
    shutil.copy(sharded / FIRST, sharded / SECOND)
    old = json.loads((sharded / INDEX).read_text())["weight_map"]
    first, second, *_ = (name for name, shard in old.items() if shard == FIRST)
    new = {name: shard for name, shard in old.items() if shard == THIRD} | {first: FIRST, second: SECOND}
    (sharded / INDEX).write_text(json.dumps({"weight_map": new}))
    refused(sharded, "lies in both")


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ("{", "not readable JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "no safetensors file"),
        ('{"weight_map": {"a": ""}}', "no safetensors file"),
    ],
)
def test_a_broken_index(index: str, why: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(index)
    refused(sharded, why)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/../../x.safetensors", "/etc/x.safetensors", "..\\x.safetensors"]
)
def test_shard_names_that_leave_the_folder(name: str, sharded: Path) -> None:
    shutil.copy(sharded / FIRST, sharded.parent / "x.safetensors")
    edited(sharded, **{"model.embed_tokens.weight": name})
    refused(sharded, "leaves its folder. Do not trust this checkpoint")


def test_a_shard_in_a_folder_below(sharded: Path) -> None:
    (sharded / "below").mkdir()
    (sharded / FIRST).rename(sharded / "below" / FIRST)
    index = (sharded / INDEX).read_text().replace(FIRST, f"below/{FIRST}")
    (sharded / INDEX).write_text(index)
    source = open_source(sharded)
    assert len(everything(source)) == 21
    source.close()


@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_that_leaves_the_folder(absolute: bool, sharded: Path) -> None:
    (sharded / FIRST).rename(sharded.parent / FIRST)
    (sharded / FIRST).symlink_to(sharded.parent / FIRST if absolute else Path("..") / FIRST)
    refused(sharded, f"{FIRST} is a link that leaves .* Copy the file")


def test_a_link_within_the_folder(sharded: Path) -> None:
    (sharded / FIRST).rename(sharded / "first.data")
    (sharded / FIRST).symlink_to("first.data")
    open_source(sharded).close()


def test_a_folder_behind_a_link(sharded: Path) -> None:
    (sharded.parent / "link").symlink_to(sharded, target_is_directory=True)
    source = open_source(sharded.parent / "link")
    assert len(everything(source)) == 21
    source.close()


def test_a_snapshot_of_the_hugging_face_cache(sharded: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--org--name"
    snapshot = home / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        shutil.copy(path, home / "blobs" / f"blob{number}")
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"blob{number}")
    source, plain = open_source(snapshot), open_source(sharded)
    assert everything(source) == everything(plain)
    source.close()
    plain.close()
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to(sharded / FIRST)
    refused(snapshot, "is a link that leaves")


def test_pickles_are_not_opened(sharded: Path) -> None:
    for path in sharded.glob("*.safetensors*"):
        path.unlink()
    (sharded / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(sharded, "holds pytorch_model.bin and no safetensors. Pickled weights can run code and are never read")


def test_what_is_no_model_folder(sharded: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nothing" / "here", "does not exist. Pass a model folder, or a Hub id")
    refused("x" * 5000 + "/..", "does not exist")
    refused("~nobody-of-this-name/model", "does not exist")
    refused(sharded / "config.json", "is a file. Pass the folder")
    (tmp_path / "empty").mkdir()
    refused(
        tmp_path / "empty", "is not a model folder: it has no config.json. Pass the one that holds config.json and "
    )
    shutil.copytree(sharded, tmp_path / "another")
    refused(tmp_path, "it has no config.json. Pass one in it that has: another, model.")
    for path in sharded.glob("*.safetensors*"):
        path.unlink()
    refused(sharded, "holds no .safetensors file")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "config.json of model is not readable JSON"),
        (b"{'model_type': 'llama'}", "not readable JSON"),
        (b"\xff\xfe{}", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not readable JSON"),
        (b'["llama"]', "not a JSON object"),
    ],
)
def test_a_broken_config(content: bytes, why: str, sharded: Path) -> None:
    (sharded / "config.json").write_bytes(content)
    refused(sharded, why)


def test_a_config_that_is_a_folder(sharded: Path) -> None:
    (sharded / "config.json").unlink()
    (sharded / "config.json").mkdir()
    refused(sharded, "config.json of model")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": 3},
        {"model_type": ["llama"]},
        {"model_type": "../llama"},
        {"model_type": "family"},
        {"model_type": "llama", "num_hidden_layers": "two"},
        {"model_type": "llama", "quantization_config": "awq"},
        {"model_type": "llama", "quantization_config": {}},
        {"model_type": "llama", "text_config": []},
        {"model_type": "llama", "tie_word_embeddings": "yes", "torch_dtype": 16},
    ],
)
def test_a_config_of_odd_values_is_read_or_refused(config: dict[str, object], sharded: Path) -> None:
    (sharded / "config.json").write_text(json.dumps(config))
    try:
        open_checkpoint(sharded).close()
    except SourceError as error:
        assert str(error)


def test_an_unfinished_output_is_no_model(sharded: Path) -> None:
    (sharded / "journal.jsonl").write_text("{}\n")
    open_source(sharded).close()  # killed after config.json: everything is there
    (sharded / "config.json").unlink()
    refused(sharded, "is an unfinished output of roundel. Repeat the command")


def test_what_travels_along(sharded: Path) -> None:
    names = [
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/x.jinja",
        "model.py",
    ]
    left = [
        "README.md",
        "pytorch_model.bin",
        "model.gguf",
        "recipe.json",
        "report.json",
        "report.html",
        "log.jsonl",
        ".git/HEAD",
        "a/.cache/x",
        "rng.pth",
    ]
    for name in [*names, *left]:
        (sharded / name).parent.mkdir(parents=True, exist_ok=True)
        (sharded / name).write_text(name)
    source = open_source(sharded)
    assert sorted(small_files(source)) == sorted(names)
    source.close()


def test_the_fingerprint_is_of_the_headers(sharded: Path, tmp_path: Path) -> None:
    first, other = open_source(sharded), open_source(build("llama", tmp_path / "other", shards=2))
    again = open_source(shutil.copytree(sharded, tmp_path / "again"))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    for source in (first, other, again):
        source.close()


def test_a_shard_that_shrinks_while_it_is_read(sharded: Path) -> None:
    source = open_source(sharded)
    name = max(source.tensors, key=lambda n: source.tensors[n].nbytes)
    os.truncate(sharded / source.shard_of(name), 200)
    with pytest.raises(SourceError, match="ended early"):
        source.read(Piece(tensor=name))
    source.close()


def test_nothing_in_the_source_is_written(sharded: Path) -> None:
    before = hashes(sharded)
    source = open_source(sharded)
    everything(source)
    source.drop([FIRST, SECOND, THIRD])
    source.close()
    assert hashes(sharded) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "."])
@pytest.mark.parametrize("mode", [0, 0o111])
def test_no_permission(name: str, mode: int) -> None:
    with public_folder() as home:
        model = build("llama", home / "model")
        (model / "model.safetensors").chmod(0o644)
        with without_rights():
            open_source(model).close()
        (model / name).chmod(mode)
        with without_rights():
            refused(model, "may not be read: permission denied. Check the (file|folder)'s rights")


def test_a_tensor_of_an_unknown_dtype_names_its_file(sharded: Path) -> None:
    raw_file(sharded / FIRST, {"x": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8))
    refused(sharded, rf"{FIRST} cannot be read: tensor 'x' has dtype 'C64'; known are BF16")
