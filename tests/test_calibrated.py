"""The loop over decoder blocks: what travels, what is resumed, what is refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import roundel
from models.pico import build
from models.raw import hashes, plant
from roundel.algorithms import ALGORITHMS
from roundel.calibrated import Units
from roundel.checkpoint import open_checkpoint
from roundel.errors import NumericsError, PlanChanged, RecipeError
from roundel.io.journal import read_journal
from roundel.planning import Work
from roundel.report import LOG, Row
from roundel.transforms import TRANSFORMS
from roundel.verification import verify
from victim import Victims

CHAINS = {  # with the fewest steps that still make every part of them run
    "opt-rtn": {"imatrix": True},
    "gptq": {},
    "signround": {"iters": 3},
    "awq,rtn": {"n_grid": 3},
    "smoothquant,gptq": {},
    "teq,opt-rtn": {"steps": 3},
}
SAMPLES, TOKENS = 6, 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of token ids."""
    path = tmp_path_factory.mktemp("data") / "tokens.jsonl"
    ids = torch.randint(0, 60, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return path


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    served = Victims()
    yield served
    served.close()


def options(chain: str, data: Path, **more: Any) -> dict[str, Any]:
    return {
        "algorithm": chain,
        "dataset": str(data),
        "nsamples": SAMPLES,
        "seqlen": TOKENS,
        "batch_size": 4,
        "scheme": "W4A16G32",
        **CHAINS[chain],
        **more,
    }


def test_every_step_is_tried_here() -> None:
    named = {name for chain in CHAINS for name in chain.split(",")}
    assert named >= {a.name for a in ALGORITHMS.values() if a.reads_activations} | set(TRANSFORMS)


@pytest.mark.parametrize("chain", ["gptq", "signround", "awq,rtn", "teq,opt-rtn"])
def test_what_the_caller_has_set_in_torch_changes_nothing(chain: str, data: Path, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    roundel.quantize(model, tmp_path / "usual", **options(chain, data))
    for name, mode in (("no_grad", torch.no_grad()), ("inference", torch.inference_mode())):
        with mode:
            roundel.quantize(model, tmp_path / name, **options(chain, data))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        roundel.quantize(model, tmp_path / "narrow", **options(chain, data))
    finally:
        torch.set_default_dtype(before)
    for name in ("no_grad", "inference", "narrow"):
        assert hashes(tmp_path / name) == hashes(tmp_path / "usual"), name


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_each_chain_writes_a_sound_checkpoint(chain: str, model_type: str, data: Path, tmp_path: Path) -> None:
    model = build(model_type, tmp_path / "model", shards=2)
    report = roundel.quantize(model, tmp_path / "out", quant_lm_head=True, **options(chain, data))
    assert verify(tmp_path / "out").problems == ()
    rounded = {row.name: row for row in report.rounded}
    assert rounded.keys() == {layer.name for layer in report.plan.layers} and "lm_head" in rounded
    compared = [row for row in report.rounded if row.error is not None and row.baseline is not None]
    assert all(row.error <= row.baseline * (1 + 1e-6) for row in compared if row.error and row.baseline)
    logged = [json.loads(line) for line in (tmp_path / "out" / LOG).read_text().splitlines()]
    assert {line["name"] for line in logged} == rounded.keys() and all("unit_seconds" in line for line in logged)
    assert not list((tmp_path / "out").glob("*.frontier"))


@pytest.mark.parametrize("chain", CHAINS)
def test_killed_and_continued(chain: str, data: Path, tmp_path: Path, victims: Victims) -> None:
    model = build("llama", tmp_path / "model", shards=2)
    wish = options(chain, data, quant_lm_head=True)
    calls = victims.calls(model, tmp_path / "fresh", **wish)
    fresh = hashes(tmp_path / "fresh")
    assert calls > 60
    for number in range(calls // 7, calls, calls // 5):
        out = tmp_path / f"out{number}"
        assert victims.killed_at(number, model, out, **wish)
        assert not (out / "config.json").exists()
        assert not victims.killed_at(10**6, model, out, **wish)
        assert hashes(out) == fresh, number


def test_killed_before_any_call_that_changes_the_disk(data: Path, tmp_path: Path, victims: Victims) -> None:
    model = build("llama", tmp_path / "model")
    wish = options("signround", data, iters=1, offload="disk", format="auto_round,auto_gptq")
    calls = victims.calls(model, tmp_path / "fresh", **wish)
    fresh = hashes(tmp_path / "fresh")
    for number in range(5, calls, 13):
        out = tmp_path / f"out{number}"
        victims.killed_at(number, model, out, **wish)
        assert not victims.killed_at(10**6, model, out, **wish)
        assert hashes(out) == fresh, number


class Stopped(Exception):
    pass


def stop_after_a_unit(work: Work, row: Row) -> None:
    if work.kind == "unit":
        raise Stopped


@pytest.mark.parametrize("stream", ["quantized", "float"])
def test_without_a_file_of_activations_the_run_begins_anew(stream: str, data: Path, tmp_path: Path) -> None:
    model, wish = build("llama", tmp_path / "model"), options("signround", data)
    roundel.quantize(model, tmp_path / "fresh", **wish)
    with pytest.raises(Stopped):
        roundel.quantize(model, tmp_path / "out", progress=stop_after_a_unit, **wish)
    (tmp_path / "out" / f"model.layers.1.{stream}.frontier").unlink()
    assert roundel.quantize(model, tmp_path / "out", **wish).resumed == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


@pytest.mark.parametrize("chain", ["signround", "awq,signround"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_several_blocks_are_one_unit(chain: str, model_type: str, data: Path, tmp_path: Path, victims: Victims) -> None:
    """Three blocks, two at a time: one objective for both, the third alone; resumed between them."""
    model = build(model_type, tmp_path / "model", shards=2, num_hidden_layers=3)
    wish = options("signround", data, algorithm=chain, blocks=2, quant_lm_head=True)
    report = roundel.quantize(model, tmp_path / "fresh", **wish)
    units = {work.name: work.blocks for work in report.plan.works if work.kind == "unit"}
    assert units == {
        "model.layers.0-1": ("model.layers.0", "model.layers.1"),
        "model.layers.2": ("model.layers.2",),
        "lm_head": ("lm_head",),
    }
    assert verify(tmp_path / "fresh").problems == ()
    errors = {row.name: (row.error, row.baseline) for row in report.rounded}
    first, second, third = (errors[f"model.layers.{n}.self_attn.q_proj"] for n in range(3))
    assert first == second != third
    assert all(error <= baseline for error, baseline in (first, third))  # type: ignore[operator]
    if chain == "awq,signround":
        noted = " ".join(row.note or "" for row in report.rows)
        assert "model.layers.0.input_layernorm" in noted and "model.layers.1.input_layernorm" in noted, noted
    calls = victims.calls(model, tmp_path / "again", **wish)
    assert victims.killed_at(calls * 3 // 4, model, tmp_path / "out", **wish)
    assert not victims.killed_at(10**6, model, tmp_path / "out", **wish)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


@pytest.mark.parametrize("times", [1, 2])
def test_an_interruption_lets_a_unit_end_first(
    times: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, wish = build("llama", tmp_path / "model"), options("gptq", data)
    roundel.quantize(model, tmp_path / "fresh", **wish)
    unit = Units._unit

    def disturbed(units: Units, work: Work, *rest: Any) -> Any:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        return unit(units, work, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Units, "_unit", disturbed)
        roundel.quantize(model, tmp_path / "out", **wish)
    assert "Press Ctrl-C again to stop at once" in capfd.readouterr().err
    found = read_journal(tmp_path / "out")
    assert found is not None
    units = [row["name"] for row in found[1] if row["kind"] == "unit"]
    assert units == (["model.layers.0"] if times == 1 else [])
    roundel.quantize(model, tmp_path / "out", **wish)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


@pytest.mark.parametrize("offload", ["ram", "disk"])
def test_a_run_that_was_stopped_holds_no_file_open(offload: str, data: Path, tmp_path: Path) -> None:
    model, kept = build("llama", tmp_path / "model"), tmp_path / "kept.gguf"
    with pytest.raises(Stopped):
        roundel.quantize(
            model, tmp_path / "out", progress=stop_after_a_unit, save_imatrix=kept, offload=offload,
            **options("signround", data),
        )  # fmt: skip
    assert list((tmp_path / "out").glob("*.frontier")) and Path(f"{kept}.partial").exists()
    links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert not [held for link in links if link.exists() and (held := link.resolve()).is_relative_to(tmp_path)]


def test_where_activations_lie_makes_no_difference(data: Path, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    for offload in ("ram", "disk"):
        roundel.quantize(model, tmp_path / offload, offload=offload, **options("signround", data))
    assert hashes(tmp_path / "ram") == hashes(tmp_path / "disk")


def test_bfloat16_activations_are_an_option(data: Path, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    for dtype in ("float32", "bfloat16"):
        roundel.quantize(model, tmp_path / dtype, **options("gptq", data, activation_dtype=dtype))
    assert verify(tmp_path / "bfloat16").problems == ()
    one, other = hashes(tmp_path / "float32"), hashes(tmp_path / "bfloat16")
    assert one["model.safetensors"] != other["model.safetensors"]


def test_the_recipe_that_is_saved_makes_the_same_bytes(data: Path, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    roundel.quantize(model, tmp_path / "one", **options("awq,rtn", data))
    recipe = roundel.Recipe.load(tmp_path / "one" / "recipe.json")
    assert recipe.options == {"n_grid": 3} and recipe.algorithm == "awq,rtn"
    roundel.quantize(model, tmp_path / "two", recipe=recipe)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_other_calibration_text_is_another_plan(data: Path, tmp_path: Path, victims: Victims) -> None:
    model, wish = build("llama", tmp_path / "model"), options("gptq", data)
    assert victims.killed_at(victims.calls(model, tmp_path / "fresh", **wish) // 2, model, tmp_path / "out", **wish)
    rows = [json.dumps({"input_ids": [1] * 16 + list(range(i, i + 16))}) for i in range(SAMPLES)]
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(rows))
    with pytest.raises(PlanChanged, match="calibration"):
        roundel.quantize(model, tmp_path / "out", **{**wish, "dataset": str(other)})


def test_a_live_model_and_lists_of_tokens(data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = build("llama", tmp_path / "model")
    rows = [json.loads(line)["input_ids"] for line in data.read_text().splitlines()]
    live = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    wish = {**options("gptq", data), "dataset": rows}
    roundel.quantize(live, tmp_path / "live", **wish)
    roundel.quantize(folder, tmp_path / "folder", **wish)
    one, other = open_checkpoint(tmp_path / "live"), open_checkpoint(tmp_path / "folder")
    for name in other.layers:
        assert torch.equal(one.decode(name), other.decode(name))
    one.close()
    other.close()


@pytest.mark.parametrize(
    ("loaded_from", "name"), [("{folder}", "a-model-s"), ("org/Name-1.5", "Name-1.5"), ("", "llama"), ("..", "llama")]
)
def test_a_live_model_is_known_again(loaded_from: str, name: str, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = build("llama", tmp_path / "a model's")
    live = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    live.config._name_or_path = loaded_from.format(folder=folder)
    wish = {
        **options("gptq", data),
        "dataset": [json.loads(line)["input_ids"] for line in data.read_text().splitlines()],
    }
    assert roundel.quantize(live, tmp_path / "fresh", **wish).plan.source_name == name
    with pytest.raises(Stopped):
        roundel.quantize(live, tmp_path / "out", progress=stop_after_a_unit, **wish)
    assert roundel.quantize(live, tmp_path / "out", **wish).resumed > 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")
    assert roundel.quantize(live, tmp_path / "out", **wish).already_complete


def test_an_instance_is_an_algorithm_too(data: Path, tmp_path: Path) -> None:
    from roundel.algorithms import Gptq

    model, wish = build("llama", tmp_path / "model"), options("gptq", data)
    roundel.quantize(model, tmp_path / "one", **{**wish, "algorithm": [TRANSFORMS["smoothquant"], Gptq(damping=0.05)]})
    assert roundel.Recipe.load(tmp_path / "one" / "recipe.json").options == {"gptq.damping": 0.05}
    roundel.quantize(model, tmp_path / "two", **{**wish, "algorithm": "smoothquant,gptq", "damping": 0.05})
    assert hashes(tmp_path / "one")["model.safetensors"] == hashes(tmp_path / "two")["model.safetensors"]


def test_weights_that_are_not_finite_are_found_before_any_block_is_done(data: Path, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    plant(model, "model.layers.0.mlp.up_proj.weight", 5, float("nan"))
    with pytest.raises(NumericsError, match=r"layers\.0\.mlp\.up_proj"):
        roundel.quantize(model, tmp_path / "strict", strict=True, **options("gptq", data))
    with pytest.raises(NumericsError, match="not finite"):  # what is kept is still run
        roundel.quantize(model, tmp_path / "out", **options("gptq", data))


def test_what_enters_a_block_comes_out_of_rounded_ones(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AutoAWQ and INC's AWQ hand on what the blocks give before they are rounded."""
    import transformers

    from roundel.algorithms import Gptq

    model, rows = build("llama", tmp_path / "model", dtype="float32"), data.read_text().splitlines()
    ids = [json.loads(row)["input_ids"] for row in rows]
    wish = {**options("smoothquant,gptq", data, format="fake", scheme="W2A16G32"), "dataset": ids}
    entered: dict[str, torch.Tensor] = {}
    quantize = Gptq.quantize

    def watched(algorithm: Gptq, unit: Any) -> Any:
        entered[unit.name] = unit.entering().inputs(range(SAMPLES)).clone()
        return quantize(algorithm, unit)

    monkeypatch.setattr(Gptq, "quantize", watched)
    roundel.quantize(model, tmp_path / "out", **wish)
    away = {}
    for folder in (tmp_path / "out", model):
        loaded, caught = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
        loaded.get_submodule("model.layers.1").register_forward_pre_hook(
            lambda _, x, caught=caught: caught.append(x[0])
        )
        with torch.no_grad():
            loaded(input_ids=torch.tensor(ids))
        away[folder.name] = float((entered["model.layers.1"] - caught[0]).norm() / caught[0].norm())
    assert away["out"] < 1e-3 < 0.05 < away["model"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scheme", ["W4A16G32_ASYM", "W2A16G48", "MXFP4"])
def test_plain_rounding_is_the_same_in_either_loop(scheme: str, dtype: str, data: Path, tmp_path: Path) -> None:
    """auto-round fits zero points in bfloat16 by one of its routes and in float32 by the other."""
    model = build("llama", tmp_path / "model", dtype=dtype)
    roundel.quantize(model, tmp_path / "stream", scheme=scheme)
    roundel.quantize(model, tmp_path / "units", **options("gptq", data, scheme=scheme, min_tokens=10**6))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("stream", "units"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)


def test_layers_that_are_kept_stay_as_they_are(data: Path, tmp_path: Path) -> None:
    """INC's GPTQ rounds them, by another layer's settings."""
    model = build("llama", tmp_path / "model")
    wish = options("gptq", data, layer_config={"k_proj": {"bits": 16}}, ignore_layers=["layers.1.mlp"])
    report = roundel.quantize(model, tmp_path / "out", **wish)
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "out"))
    stay = [name for name in before if "k_proj" in name or "layers.1.mlp" in name]
    assert len(stay) == 5 and len(report.rounded) == 14 - 5
    assert all(torch.equal(before[name], after[name]) for name in stay)


def test_every_step_of_a_chain_acts(data: Path, tmp_path: Path) -> None:
    """Of two algorithms in INC's dictionary only the first is left."""
    model, found = build("llama", tmp_path / "model"), {"source": load_file(tmp_path / "model" / "model.safetensors")}
    for chain in ("gptq", "smoothquant", "smoothquant,gptq"):
        roundel.quantize(model, tmp_path / chain, **options("smoothquant,gptq", data, algorithm=chain))
        found[chain] = load_file(tmp_path / chain / "model.safetensors")
    both = found.pop("smoothquant,gptq")
    norm, codes = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.qweight"
    assert torch.equal(both[norm], found["smoothquant"][norm]) and torch.equal(
        found["gptq"][norm], found["source"][norm]
    )
    assert not torch.equal(both[norm], found["gptq"][norm])
    assert not any(torch.equal(both[codes], found[name][codes]) for name in ("gptq", "smoothquant"))


def test_a_run_leaves_nothing_to_the_next(data: Path, tmp_path: Path) -> None:
    """auto-round keeps settings of a process; what came before changes what comes after."""
    model, wish = build("llama", tmp_path / "model"), options("awq,rtn", data)
    roundel.quantize(model, tmp_path / "first", **wish)
    other = options("signround", data, scheme="W2A16G64_ASYM", format="auto_gptq", quant_lm_head=True, seed=3)
    roundel.quantize(build("qwen3_moe", tmp_path / "other"), tmp_path / "between", **other)
    roundel.quantize(model, tmp_path / "second", **wish)
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")


def test_nothing_is_written_elsewhere(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto-round makes a work space, and INC a workspace of its own, wherever they are called."""
    model = build("llama", tmp_path / "model")
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = hashes(model)
    roundel.quantize(model, tmp_path / "out", **options("gptq", data, offload="disk"))
    assert hashes(model) == before
    assert not [*(tmp_path / "here").iterdir(), *(tmp_path / "temporary").iterdir()]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "here", "temporary", "out"}


@pytest.mark.parametrize(
    ("chain", "looked"), [("awq,rtn", True), *((c, s) for c in ("opt-rtn", "gptq", "signround") for s in (True, False))]
)
def test_a_layer_whose_scale_leaves_float16_stays(
    chain: str, looked: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in every run without data; found before any block is done, or else where it is rounded."""
    model = build("llama", tmp_path / "model")
    plant(model, "model.layers.1.mlp.up_proj.weight", 3 * 64 + 17, 3e6)
    done: list[str] = []
    if not looked:
        monkeypatch.setattr(Units, "_look_at_weights", lambda units, todo: None)
    report = roundel.quantize(
        model, tmp_path / "out", progress=lambda work, row: done.append(work.name), **options(chain, data)
    )
    assert done.count("model.layers.0") == (1 if looked else 2)
    kept = {each.name: each.reason for each in report.plan.kept}
    assert kept["model.layers.1.mlp.up_proj"].startswith("weights that cannot be rounded: weight [3, 17] is ")
    assert len(report.rounded) == 13 and verify(tmp_path / "out").problems == ()


@pytest.mark.parametrize(("scheme", "largest"), [("FP8_STATIC", 448.0), ("NVFP4", 6.0 * 448.0)])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_inputs_are_measured_where_their_scale_is_stored(
    scheme: str, largest: float, model_type: str, data: Path, tmp_path: Path
) -> None:
    """Also with an algorithm that looks at nothing; against what transformers' model is given."""
    import transformers

    model = build(model_type, tmp_path / "model")
    wish = {"scheme": scheme, "format": "llm_compressor", "nsamples": SAMPLES, "seqlen": TOKENS, "dataset": str(data)}
    report = roundel.quantize(model, tmp_path / "out", **wish)
    assert verify(tmp_path / "out").problems == ()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    name, peaks = "model.layers.0.self_attn.q_proj", []
    loaded.get_submodule(name).register_forward_pre_hook(lambda _, x: peaks.append(float(x[0].abs().max())))
    with torch.no_grad():
        loaded(input_ids=torch.tensor([json.loads(line)["input_ids"] for line in data.read_text().splitlines()]))
    checkpoint = open_checkpoint(tmp_path / "out")
    scales = {n: checkpoint.unpack(layer).input_scale for n, layer in checkpoint.layers.items()}
    checkpoint.close()
    assert set(scales) == {row.name for row in report.rounded}
    assert all(scale is not None and float(scale) > 0 for scale in scales.values())
    assert float(scales[name]) == pytest.approx(max(peaks) / largest, rel=0.005)  # bfloat16
    assert scales[name] == scales["model.layers.0.self_attn.k_proj"] != scales["model.layers.0.self_attn.o_proj"]


def test_an_expert_that_no_token_reached_is_scaled_as_its_siblings(tmp_path: Path) -> None:
    model = build("qwen3_moe", tmp_path / "model")
    wish: dict[str, Any] = {"scheme": "FP8_STATIC", "format": "llm_compressor", "nsamples": 1, "seqlen": 2}
    report = roundel.quantize(model, tmp_path / "out", dataset=[[5, 6]], **wish)
    unseen = [row for row in report.rounded if "siblings" in (row.note or "")]
    assert unseen and all(".experts." in row.name for row in unseen)
    assert verify(tmp_path / "out").problems == ()


def test_a_fallback_is_a_row_and_strictly_an_error(data: Path, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    wish = options("gptq", data, min_tokens=SAMPLES * TOKENS + 1)
    report = roundel.quantize(model, tmp_path / "out", **wish)
    assert all("tokens reached it, fewer than 193: rtn" in (row.note or "") for row in report.rounded)
    with pytest.raises(NumericsError, match=r"layers\.0\..*fewer than 193.*--strict.*--nsamples"):
        roundel.quantize(model, tmp_path / "strict", strict=True, **wish)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"algorithm": "gtpq"}, "Did you mean 'gptq'"),
        ({"algorithm": "gptq,awq"}, "gptq chooses codes, so it stands last"),
        ({"algorithm": "awq,awq,gptq"}, "names one step twice"),
        ({"algorithm": "gptq", "iters": 5}, "iters is an option of"),
        ({"algorithm": "gptq", "dampin": 5}, "no field 'dampin'"),
        ({"algorithm": "gptq", "damping": "much"}, "damping='much' is not possible"),
        ({"algorithm": "gptq", "nsamples": 0}, "nsamples=0"),
        ({"algorithm": "rtn", "calibrate_all_experts": True}, "looks at no data"),
        ({"algorithm": "gptq", "activation_dtype": "float8"}, "float32 or bfloat16"),
    ],
)
def test_wishes_without_sense(wish: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match=message):
        roundel.quantize(model, tmp_path / "out", **wish)
    assert not (tmp_path / "out").exists()


def test_tokens_of_another_model_are_refused(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match=r"holds token 100000, and model\.embed_tokens\.weight .* rows for 0 to"):
        roundel.quantize(model, tmp_path / "out", algorithm="gptq", dataset=[[1, 100_000] * 8], nsamples=1, seqlen=16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sym", [True, False])
def test_groups_by_activation_move_to_formats_that_hold_them(sym: bool, tmp_path: Path, data: Path) -> None:
    """GPTQ's act_order goes from version 1 to 2 and back without rounding, and is decoded for what cannot hold it."""
    kind = {"scheme": "W4A16G32", "sym": sym}
    wish = options("gptq", data, format="auto_gptq", options={"act_order": True}, **kind)
    roundel.quantize(build("llama", tmp_path / "model"), tmp_path / "v1", **wish)
    moved = roundel.quantize(tmp_path / "v1", tmp_path / "v2", format="gptq_v2", **kind)
    assert any("moved over without rounding" in note for note in moved.plan.notes)
    roundel.quantize(tmp_path / "v2", tmp_path / "again", format="auto_gptq", **kind)
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("v1", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    rounded = roundel.quantize(tmp_path / "v1", tmp_path / "rounded", format="auto_round", **kind)
    assert not any("moved over" in note for note in rounded.plan.notes)
    one, other = open_checkpoint(tmp_path / "v1"), open_checkpoint(tmp_path / "v2")
    assert any(one.unpack(layer).group_index is not None for layer in one.layers.values())
    assert all(torch.equal(one.decode(name), other.decode(name)) for name in one.layers)
    one.close()
    other.close()


def test_experts_of_a_block_go_to_one_tensor(tmp_path: Path, data: Path) -> None:
    source = build("qwen3_moe", tmp_path / "model")
    roundel.quantize(source, tmp_path / "out", **options("gptq", data, format="mlx,auto_round"))
    one, other = open_checkpoint(tmp_path / "out" / "mlx"), open_checkpoint(tmp_path / "out" / "auto_round")
    assert any(".experts." in name for name in one.layers)
    assert set(one.layers) == set(other.layers)
    assert all(torch.equal(one.decode(name), other.decode(name)) for name in one.layers)
    one.close()
    other.close()
