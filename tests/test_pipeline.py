"""The loop: the same bytes whatever the workers, the kernels and the accidents, and layers that cannot be rounded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import roundel
from commands import process
from formats.test_gguf import tokenized
from models.pico import build
from models.raw import hashes, plant, spot
from roundel import pipeline
from roundel.checkpoint import open_checkpoint
from roundel.data.bundled import bundled_model
from roundel.errors import NumericsError, OutputError, PlanChanged, PlanError, SourceError
from roundel.io.journal import JOURNAL, alone, read_journal
from roundel.output import open_shards
from roundel.standalone import Standalone
from victim import Victims

DEEP: dict[str, Any] = {"num_hidden_layers": 24, "hidden_size": 128, "intermediate_size": 256}
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build("llama", tmp_path / "model", shards=2)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    served = Victims()
    yield served
    served.close()


# The same bytes


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"shard_size": "40KB"}),
        ("qwen3_moe", {"scheme": "W4A16_MIXED", "format": "auto_round,auto_gptq"}),
        ("gpt_oss", {"scheme": "W3A16G32"}),
    ],
)
def test_workers_make_no_difference(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = build(model_type, tmp_path / "model", shards=3)
    found = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers) / "out"
        roundel.quantize(model, out, workers=workers, **options)
        found.append(hashes(out))
    assert found[0] == found[1] == found[2]


def test_a_note_on_one_format_leaves_the_others_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenized(build("gpt_oss", tmp_path / "model"))  # each expert's bias is a part of a tensor of the source's
    options: dict[str, Any] = {"format": "gguf:q8_0,fake"}
    roundel.quantize(model, tmp_path / "plain", **options)
    restate = Standalone._restate

    def noting(pieces: Standalone, *given: Any) -> str:
        return restate(pieces, *given) or "a note"

    monkeypatch.setattr(Standalone, "_restate", noting)
    roundel.quantize(model, tmp_path / "noted", **options)
    plain, noted = (
        {name: found for name, found in hashes(tmp_path / folder).items() if not name.endswith("report.json")}
        for folder in ("plain", "noted")
    )
    assert plain == noted and any(name.endswith(".gguf") for name in plain)


@pytest.mark.parametrize("scheme", ["W4A16", "W3A16G32_ASYM", "W2A16", "W8A16_ASYM", "MXFP4", "MXFP8"])
def test_kernels_make_no_difference(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", tmp_path / "model", hidden_size=128)
    for folder, reference in (("kernels", "0"), ("reference", "1")):
        monkeypatch.setenv("ROUNDEL_REFERENCE", reference)
        roundel.quantize(model, tmp_path / folder, scheme=scheme)
    first, second = hashes(tmp_path / "kernels"), hashes(tmp_path / "reference")
    assert {k: v for k, v in first.items() if k != "report.json"} == {
        k: v for k, v in second.items() if k != "report.json"
    }
    rows = [json.loads((tmp_path / f / "report.json").read_text())["rows"] for f in ("kernels", "reference")]
    for one, other in zip(*rows, strict=True):
        assert one.get("sqnr") == pytest.approx(other.get("sqnr"), abs=0.001)


def test_progress_tells_of_every_work_once(model: Path, out: Path) -> None:
    told: list[str] = []
    report = roundel.quantize(model, out, workers=2, progress=lambda work, row: told.append(row.name))
    assert sorted(told) == sorted(work.name for work in report.plan.works) and len(set(told)) == len(told)


# Killed


def survives(model: Path, out: Path, fresh: dict[str, str], **options: Any) -> None:
    """A killed run is no model, and the same command ends with the same bytes."""
    folders = [out] if "," not in str(options.get("format")) else list(out.glob("*/"))
    for folder in folders:
        if (folder / "config.json").exists():  # then everything else is there too
            held = {name: value for name, value in hashes(out).items() if name != JOURNAL}
            assert held.keys() <= fresh.keys() and all(fresh[name] == value for name, value in held.items())
            open_checkpoint(folder).close()
        elif folder.exists():
            with pytest.raises(SourceError, match=r"unfinished output of roundel|not a model folder"):
                open_checkpoint(folder)
    roundel.quantize(model, out, **options)
    assert hashes(out) == fresh


@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_killed_before_any_call_that_changes_the_disk(
    shard_size: str, model: Path, tmp_path: Path, victims: Victims
) -> None:
    (model / "tokenizer.json").write_text("{}")
    options: dict[str, Any] = {"workers": 1, "shard_size": shard_size}
    calls = victims.calls(model, tmp_path / "fresh", **options)
    fresh, alive = hashes(tmp_path / "fresh"), 0
    for number in range(0, calls, 3):
        out = tmp_path / f"out{number}"
        alive += not victims.killed_at(number, model, out, **options)
        survives(model, out, fresh, **options)
        shutil.rmtree(out)
    assert alive < calls / 6  # how often the committer flushes differs, so the last numbers may be past the end


def test_killed_again_and_again(model: Path, out: Path, tmp_path: Path, victims: Victims) -> None:
    victims.calls(model, tmp_path / "fresh", workers=2)
    deaths = 0
    while victims.killed_at(25, model, out, workers=2):
        deaths += 1
        assert deaths < 100
    assert deaths > 3
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_killed_with_several_formats(model: Path, tmp_path: Path, victims: Victims) -> None:
    options: dict[str, Any] = {"format": "auto_round,auto_gptq", "workers": 1}
    roundel.quantize(model, tmp_path / "fresh", **options)
    for number in (1, 4, 60):
        out = tmp_path / f"out{number}"
        assert victims.killed_at(number, model, out, **options)
        survives(model, out, hashes(tmp_path / "fresh"), **options)


def test_killed_while_an_output_is_replaced(model: Path, out: Path, tmp_path: Path, victims: Victims) -> None:
    roundel.quantize(model, tmp_path / "old", scheme="W8A16", shard_size="40KB")
    victims.calls(model, tmp_path / "fresh", workers=1)
    fresh, options = hashes(tmp_path / "fresh"), {"workers": 1, "overwrite": True}
    for number in range(2, 30, 3):  # before 2, the old output is whole
        shutil.copytree(tmp_path / "old", out)
        assert victims.killed_at(number, model, out, **options)
        survives(model, out, fresh, **options)
        shutil.rmtree(out)


SLOW = """
import sys, time
from roundel import committer
from roundel.standalone import Standalone
from roundel.cli.main import main
perform = Standalone.perform
def slowly(self, work):
    time.sleep(0.02)
    return perform(self, work)
Standalone.perform, committer.FLUSH_SECONDS = slowly, 0.02
main()
"""


def begin(model: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """The command in a process of its own, slowed down."""
    command = [sys.executable, "-c", SLOW, "quantize", str(model), str(out), "--workers", "2", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not reached() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def rows(out: Path) -> int:
    found = read_journal(out)
    return len(found[1]) if found is not None else 0


def finish(model: Path, out: Path) -> str:
    command = [sys.executable, "-m", "roundel", "quantize", str(model), str(out)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_command_is_killed_and_repeated(out: Path, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", shards=3, **DEEP)
    roundel.quantize(model, tmp_path / "fresh")
    for least in (1, 60, 150):
        process = begin(model, out)
        until(lambda least=least: rows(out) >= least, process)  # type: ignore[misc]
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and least <= rows(out) < 219
        with pytest.raises(SourceError, match="unfinished output"):
            open_checkpoint(out)
    before = rows(out)
    assert f"continued: {before} of 219 pieces were done already" in finish(model, out)
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_the_command_is_interrupted_and_repeated(out: Path, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", **DEEP)
    process = begin(model, out)
    until(lambda: rows(out) >= 20, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted. What is finished is kept: repeat the same command to continue." in error
    assert "Traceback" not in error and 20 <= rows(out) < 219
    process = begin(model, out, "--scheme", "W8A16")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 3 and "recipe.scheme: begun with W4A16, now W8A16" in error
    roundel.quantize(model, out)
    roundel.quantize(model, tmp_path / "fresh")
    assert hashes(out) == hashes(tmp_path / "fresh")


# Changed while unfinished


def begun(model: Path, out: Path, **options: Any) -> None:
    """An unfinished run: all but the last piece of work."""
    perform = Standalone.perform

    def stop(pieces: Standalone, work: Any) -> Any:
        if work.name == pieces.plan.works[-1].name:
            raise KeyboardInterrupt
        return perform(pieces, work)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Standalone, "perform", stop)
        roundel.quantize(model, out, workers=1, **options)


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ({"bits": 3}, {"recipe.bits": (None, 3)}),
        ({"scheme": "W8A16", "strict": True}, {"recipe.scheme": ("W4A16", "W8A16"), "recipe.strict": (None, True)}),
        ({"format": "auto_gptq"}, {"recipe.formats": (["auto_round"], ["auto_gptq"])}),
        ({"shard_size": "40KB"}, {"recipe.shard_size": (None, "40KB")}),
        ({"ignore_layers": "v_proj"}, {"recipe.ignore_layers": (None, ["v_proj"])}),
    ],
)
def test_a_changed_option_is_refused(
    changed: dict[str, Any], fields: dict[str, Any], model: Path, out: Path, tmp_path: Path
) -> None:
    begun(model, out)
    before = hashes(out)
    with pytest.raises(PlanChanged) as found:
        roundel.quantize(model, out, **changed)
    assert found.value.fields == fields
    assert all(name in str(found.value) for name in fields) and "--overwrite" in str(found.value)
    assert hashes(out) == before
    roundel.quantize(model, out, overwrite=True, **changed)
    roundel.quantize(model, tmp_path / "fresh", **changed)
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_a_changed_source_is_refused(model: Path, out: Path, tmp_path: Path) -> None:
    begun(model, out)
    shutil.rmtree(model)
    build("llama", model, dtype="float32", shards=2)
    with pytest.raises(PlanChanged) as found:
        roundel.quantize(model, out)
    assert set(found.value.fields) == {"source_fingerprint"}


def test_workers_may_change(model: Path, out: Path, tmp_path: Path) -> None:
    begun(model, out)
    roundel.quantize(model, out, workers=3)
    roundel.quantize(model, tmp_path / "fresh", workers=1)
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_a_source_that_breaks_on_the_way(model: Path, out: Path, tmp_path: Path) -> None:
    roundel.quantize(model, tmp_path / "fresh")
    path, begin, _ = spot(model, "model.layers.1.mlp.up_proj.weight")
    whole = path.read_bytes()

    def truncate(*arguments: Any) -> Any:
        os.truncate(path, begin + 100)
        return open_shards(*arguments)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(SourceError, match="ended early"):
        patched.setattr(pipeline, "open_shards", truncate)
        roundel.quantize(model, out)
    path.write_bytes(whole)
    roundel.quantize(model, out)
    assert hashes(out) == hashes(tmp_path / "fresh")


# Weights that cannot be rounded

BAD = {
    "model.layers.0.self_attn.q_proj": (5 * 64 + 7, NAN),
    "model.layers.1.mlp.down_proj": (3 * 128 + 100, INF),
    "model.layers.1.self_attn.v_proj": (0, -INF),
}


def spoiled(model: Path, **layers: tuple[int, float]) -> None:
    for name, (index, value) in (layers or BAD).items():
        plant(model, f"{name}.weight", index, value)


@pytest.mark.parametrize("reference", ["0", "1"])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16G32_ASYM", "MXFP4", "MXFP8"])
def test_layers_that_are_not_finite_are_kept(
    scheme: str, reference: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUNDEL_REFERENCE", reference)
    spoiled(model)
    found = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers) / "out"
        report = roundel.quantize(model, out, scheme=scheme, workers=workers)
        found.append(hashes(out))
    assert found[0] == found[1] == found[2]
    assert list(report.plan.demoted) == sorted(
        BAD, key=[w.name.removesuffix(".weight") for w in report.plan.works].index
    )
    saved = json.loads((out / "report.json").read_text())
    reasons = {kept["name"]: kept["reason"] for kept in saved["kept"]}
    for (name, (index, _)), spelled in zip(BAD.items(), ("nan", "inf", "-inf"), strict=True):
        row, column = divmod(index, 128 if "down" in name else 64)
        assert reasons[name] == f"weights that cannot be rounded: weight [{row}, {column}] is {spelled}"
        assert f"fallback: {name} stays in full precision: {reasons[name]}" in saved["notes"]
        assert reasons[name] in (out / "README.md").read_text()
    copied = {row["name"].removesuffix(".weight"): row["kind"] for row in saved["rows"]}
    assert all(copied[name] == "copy" for name in BAD) and copied["model.layers.0.mlp.up_proj"] == "round"
    checkpoint, source = open_checkpoint(out), open_checkpoint(model)
    assert set(checkpoint.layers) == {layer.name for layer in report.plan.layers} and not set(BAD) & set(
        checkpoint.layers
    )
    for name in BAD:
        pieces = [c.source.read(c.matrices[name].stored.parts["weight"]).tobytes() for c in (checkpoint, source)]
        assert pieces[0] == pieces[1]
    checkpoint.close()
    source.close()


@pytest.mark.parametrize("formats", ["auto_round", "auto_round,auto_gptq"])
def test_strict_names_the_layer_and_the_index(formats: str, model: Path, out: Path) -> None:
    spoiled(model)
    for _ in range(2):  # and again where the first attempt stopped
        with pytest.raises(NumericsError) as found:
            roundel.quantize(model, out, strict=True, format=formats)
        message = str(found.value)
        first = next(name for name in roundel.plan(model).origins if name in BAD)
        assert message.startswith(f"{first} [") and "has no nearest code" in message
        assert f"--ignore-layers {first}" in message and "2 more layers have such weights" in message
        assert all(name in message for name in BAD)
        assert not (out / "config.json").exists()
    roundel.quantize(model, out, strict=True, format=formats, overwrite=True, ignore_layers=list(BAD))


def test_a_kept_layer_may_be_anything(model: Path, out: Path) -> None:
    spoiled(model)
    plant(model, "model.norm.weight", 0, NAN)
    report = roundel.quantize(model, out, ignore_layers=list(BAD), strict=True)
    assert not report.plan.demoted


@pytest.mark.parametrize("formats", ["auto_round", "auto_gptq,auto_round", "gguf:q8_0,fake"])
def test_repeating_a_command_that_kept_such_layers(formats: str, model: Path, out: Path) -> None:
    model = shutil.copytree(bundled_model(), model.parent / "bundled")
    spoiled(model)
    roundel.quantize(model, out, format=formats)
    before = hashes(out)
    assert roundel.quantize(model, out, format=formats).already_complete
    assert hashes(out) == before


def test_killed_while_layers_are_found_bad(model: Path, tmp_path: Path, victims: Victims) -> None:
    spoiled(model)
    options: dict[str, Any] = {"workers": 2, "shard_size": "20KB"}  # many files that are removed on the way
    calls = victims.calls(model, tmp_path / "fresh", **options)
    fresh = hashes(tmp_path / "fresh")
    for number in range(0, calls, 3):
        out = tmp_path / f"out{number}"
        victims.killed_at(number, model, out, **options)
        survives(model, out, fresh, **options)
        shutil.rmtree(out)


def test_nothing_left_to_round(model: Path, out: Path) -> None:
    for layer in roundel.plan(model).layers:
        plant(model, f"{layer.name}.weight", 0, NAN)
    with pytest.raises(PlanError, match="No layer of model would be rounded"):
        roundel.quantize(model, out)


@pytest.mark.parametrize("reference", ["0", "1"])
@pytest.mark.parametrize("scheme", ["W4A16", "W8A16_ASYM"])
def test_scales_beyond_float16(
    scheme: str, reference: str, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUNDEL_REFERENCE", reference)
    model, name = build("llama", tmp_path / "model", dtype="float32"), "model.layers.0.mlp.gate_proj"
    plant(model, f"{name}.weight", 3 * 64 + 9, 1e9, "float32")
    report = roundel.quantize(model, out, scheme=scheme)
    assert "weight [3, 9] is 1000000000.0, beyond what a float16 scale can reach" in report.plan.demoted[name]
    with pytest.raises(NumericsError, match=r"gate_proj .*weight \[3, 9\]"):
        roundel.quantize(model, out, scheme=scheme, strict=True, overwrite=True)
    assert not roundel.quantize(model, out, scheme="MXFP8", overwrite=True).plan.demoted


def test_a_packed_source_with_a_scale_that_is_not_finite(model: Path, tmp_path: Path, out: Path) -> None:
    packed, name = tmp_path / "packed", "model.layers.1.mlp.up_proj"
    roundel.quantize(model, packed)
    path, begin, _ = spot(packed, f"{name}.scales")
    with path.open("r+b") as file:
        file.seek(begin + 2 * 5)
        file.write(b"\x00\x7e")  # a float16 NaN, of row 5
    for options in ({"format": "auto_gptq"}, {"scheme": "W8A16"}):
        with pytest.raises(NumericsError, match=rf"{name} .*weight \[5, 0\] is nan"):
            roundel.quantize(packed, out, strict=True, overwrite=True, **options)  # type: ignore[arg-type]
        report = roundel.quantize(packed, out, overwrite=True, **options)  # type: ignore[arg-type]
        assert list(report.plan.demoted) == [name]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:

    source = build("llama", tmp_path / "m")
    out = tmp_path / "o"
    out.mkdir()
    with alone(out), pytest.raises(OutputError, match="Another run"):
        roundel.quantize(source, out, scheme="W4A16G32")
    roundel.quantize(source, out, scheme="W4A16G32")


def test_a_source_that_changed_is_another_source(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "m")
    assert not roundel.quantize(source, tmp_path / "o", scheme="W4A16G32").already_complete
    assert roundel.quantize(source, tmp_path / "o", scheme="W4A16G32").already_complete
    build("llama", source, seed=1)
    with pytest.raises(OutputError, match="not empty"):
        roundel.quantize(source, tmp_path / "o", scheme="W4A16G32")


def test_a_script_needs_no_main_guard(model: Path, tmp_path: Path) -> None:
    """auto-round starts processes that run the script again, and so themselves, without model and with it."""
    script = tmp_path / "script.py"
    wish = f"{str(model)!r}, {str(tmp_path / 'out')!r}, scheme='W4A16G32', workers=3"
    script.write_text(f"import roundel\nprint('begun')\nprint(len(roundel.quantize({wish}).rounded))\n")
    done = process(script)
    assert (done.code, done.output) == (0, "begun 14"), done.error
