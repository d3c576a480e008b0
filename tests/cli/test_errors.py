"""What the command line says when something is wrong, and with which exit code; and that saying so is cheap."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import roundel
from commands import command, process
from models.pico import build
from models.raw import plant, poke
from roundel import errors, pipeline
from roundel.cli import main as main_module
from roundel.cli.main import COMMANDS
from roundel.errors import GridError, QuantizationError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build("llama", tmp_path / "model")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


SENSELESS = [
    ("--scheme W4A15", "Unknown scheme 'W4A15'. Did you mean 'W4A16'? Known are W2A16"),
    ("--scheme XY", "Unknown scheme 'XY'. Known are W2A16"),
    ("--format auto_gtpq", "Unknown format 'auto_gtpq'. Did you mean 'auto_gptq'? Known are auto_round"),
    ("--format ,", "No format is asked for. Name at least one"),
    ("--format auto_gptq,auto_gptq", "Format auto_gptq is asked for twice. Name each format once"),
    ("--algorithm rnt", "Unknown algorithm 'rnt'. Did you mean 'rtn'?"),
    ("--bits 9", "bits=9 is not possible: integer schemes have 2 to 8 bits"),
    ("--bits many", "Invalid value for '--bits': 'many' is not a valid integer"),
    ("--group-size 0", "group_size=0 is not possible: use a positive number of weights, or -1"),
    ("--group-size -2", "group_size=-2 is not possible"),
    ("--scheme MXFP4 --bits 3", "MXFP4 has a fixed grid (4 bits, group of 32, symmetric)"),
    ("--scheme W4A16_MIXED --bits 3", "bits=3 does not go with W4A16_MIXED, which mixes widths itself. Drop one"),
    ("--layer-config {k_proj", "layer_config is not a mapping in JSON or YAML: '{k_proj'. Write {k_proj: {bits: 8}}"),
    ("--layer-config " + "[" * 1500, "layer_config is not a mapping in JSON or YAML"),
    ("--layer-config {a:{bits:" + "9" * 5000 + "}}", "layer_config is not a mapping in JSON or YAML"),
    ("--layer-config {k_proj:{bit:8}}", "layer_config 'k_proj': A scheme has no field 'bit'. Allowed are scheme, bits"),
    ("--layer-config {k_proj:8}", "layer_config 'k_proj': 8 is neither a preset's name nor a mapping"),
    ("--layer-config {k_proj:{bits:true}}", "bits=True is not possible: bits is a whole number"),
    ('--layer-config {"(k":W8A16}', "Layer pattern '(k' is not a regular expression: missing )"),
    ("--layer-config @/nowhere.json", "/nowhere.json cannot be read"),
    ("--ignore-layers (k", "Layer pattern '(k' is not a regular expression"),
    ("--recipe-file /nowhere.json", "/nowhere.json cannot be read: [Errno 2] No such file"),
    ("--recipe-file /", "/ cannot be read"),
    ("--shard-size 5parsecs", "'5parsecs' is not a size. Write bytes, or a number with KB, MB, GB"),
    ("--shard-size 0", "'0' is too small a size"),
    ("--device tpu", "Unknown device 'tpu'. Known are cpu and cuda"),
    ("--workers 0", "Invalid value for '--workers': 0 is not in the range x>=1"),
    ("--algorithm ,", "algorithm ',' names nothing. Name what chooses the codes, such as rtn or gptq"),
    ("--algorithm gptq --damping x", "gptq: damping='x' is not possible: it takes a number."),
    ("--algorithm gptq --trials 2.5", "gptq: trials='2.5' is not possible: it takes a whole number."),
    ("--algorithm signround --lr x", "signround: lr='x' is not possible: it takes a number or none."),
    ("--schem W4A16", "No such option '--schem'. (Did you mean"),
]


@pytest.mark.parametrize("name", ["quantize", "plan"])
@pytest.mark.parametrize(("options", "message"), SENSELESS, ids=[o[:30] for o, _ in SENSELESS])
def test_2_makes_no_sense(name: str, options: str, message: str, model: Path, out: Path) -> None:
    arguments = [name, model, out] if name == "quantize" else [name, model]
    found = command(*arguments, *options.split(" "))
    assert found.code == 2 and message in found.error and "Traceback" not in found.error
    assert not out.exists() and len(found.error) < 1000


DATA = [
    ("none.txt", 5, "Dataset none.txt: there is no such file in"),
    ("pile-11k", 2, "There is no dataset 'pile-11k'. Did you mean 'pile-10k'?"),
    ("bundled:nun=3", 2, "Dataset bundled has the option 'nun=3'. Did you mean 'num'?"),
    ("bundled:split=train", 2, "Dataset bundled has no splits"),
    ("CCI3-HQ:split=tarin", 2, "BAAI/CCI3-HQ has no split 'tarin'. Did you mean 'train'?"),
    ("bundled:num=4,bundled:num=8", 2, "num= ask for 12 samples, nsamples is 4"),
]


@pytest.mark.parametrize(("dataset", "code", "message"), DATA, ids=[d for d, _, _ in DATA])
def test_a_plan_names_what_is_wrong_with_a_dataset(dataset: str, code: int, message: str, model: Path) -> None:
    options = ("--algorithm", "gptq", "--nsamples", "4", "--dataset", dataset)
    for found in (command("plan", model, *options), command("plan", model, "--no-probe", *options)):
        assert found.code == code and message in found.error, found
    with pytest.raises(QuantizationError, match=re.escape(message)):
        roundel.plan(model, algorithm="gptq", nsamples=4, dataset=dataset)


def test_activations_lie_where_they_can(model: Path, out: Path) -> None:
    with pytest.raises(errors.RecipeError, match="offload='dsik' is not possible: auto, ram, disk"):
        roundel.quantize(model, out, algorithm="gptq", dataset=[[1] * 8], offload="dsik")  # type: ignore[arg-type]


def test_rows_in_memory_go_with_a_recipe(model: Path) -> None:
    recipe = roundel.Recipe(algorithm="gptq", nsamples=4)
    found = roundel.plan(model, recipe=recipe, dataset=["a text", "another"])
    assert found.recipe == roundel.Recipe(algorithm="gptq", nsamples=4, dataset="(a list of 2)")


def test_2_recipes_that_make_no_sense(model: Path, tmp_path: Path) -> None:
    for text, message in (
        (
            '{"shcheme": "W4A16"}',
            "A recipe has no field 'shcheme'. Did you mean 'scheme'? Fields are activation_dtype, algorithm",
        ),
        ('{"scheme": 4}', "Recipe field scheme is 4; it takes str"),
        ('{"formats": [1]}', "Recipe field formats is [1]; it takes a list of names"),
        ("scheme", "is not a mapping in JSON or YAML"),
        ("\0", "is not a mapping in JSON or YAML"),
    ):
        (tmp_path / "recipe.json").write_text(text)
        found = command("plan", model, "--recipe-file", tmp_path / "recipe.json")
        assert found.code == 2 and message in found.error


def test_2_commands_that_make_no_sense(model: Path) -> None:
    found = command("quantise", model)
    assert found.code == 2 and "No such command 'quantise'. Did you mean 'quantize'?" in found.error
    assert "No such command 'zzz'." in command("zzz").error
    assert command("plan").code == 2 and "Missing argument 'MODEL'" in command("plan").error
    found = command("list", "scheme")
    assert found.code == 2 and "'scheme' is not one of 'schemes', 'formats', 'algorithms', 'families'" in found.error
    assert command().code == 2 and "Commands" in command().error + command().output


UNFIT = [
    (
        "--algorithm hqq --scheme MXFP4",
        [
            "hqq fits scales and zero points of integers, not MXFP4. Use algorithm rtn, gptq, opt-rtn or signround, or "
            "change these layers with --layer-config"
        ],
    ),
    (
        "--algorithm gptq --dataset bundled --scheme NVFP4 --format llm_compressor",
        ["gptq rounds to integers and MX floats, not to NVFP4. Use algorithm rtn or opt-rtn, or change"],
    ),
    (
        "--ignore-layers k_porj",
        ["ignore_layers 'k_porj' matches no layer. Did you mean 'k_proj'? Layers end in down_proj, gate_proj"],
    ),
    ("--layer-config {layers.7:W8A16}", ["layer_config 'layers.7' matches no layer"]),
    (
        "--layer-config {embed:W8A16}",
        ["layer_config 'embed' matches only matrices that are kept, such as model.embed_tokens"],
    ),
    (
        "--bits 3 --format auto_awq,llm_compressor",  # the model's layers have 64 and 128 inputs
        [
            "2 problems:",
            "model.layers.0.mlp.down_proj [64, 128] (and 13 more): auto_awq stores 4-bit only, W3A16 asks for 3. "
            "Use format auto_round, auto_gptq or gptq_v2, or change these layers",
            "llm_compressor needs whole groups, 64 inputs are not divisible by 128",
        ],
    ),
    (
        "--layer-config {kproj:W8A16,v_proj:MXFP4} --ignore-layers zz",
        [
            "3 problems:",
            "'kproj' matches no layer. Did you mean 'k_proj'?",
            "'zz' matches no layer",
            "One file holds integers, MXINT4, FP8 or other floats",
        ],
    ),
]


@pytest.mark.parametrize("name", ["quantize", "plan"])
@pytest.mark.parametrize(("options", "messages"), UNFIT, ids=[o for o, _ in UNFIT])
def test_3_does_not_fit_the_model(name: str, options: str, messages: list[str], model: Path, out: Path) -> None:
    arguments = [name, model, out] if name == "quantize" else [name, model]
    found = command(*arguments, *options.split(" "))
    assert found.code == 3 and all(message in found.error for message in messages), found.error
    assert not out.exists()


def test_4_cannot_be_written(model: Path, out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").touch()
    found = command("quantize", model, out)
    assert found.code == 4 and f"{out} is not empty" in found.error and "pass --overwrite" in found.error
    assert command("quantize", model, out, "--overwrite").code == 0
    found = command("quantize", model, out)
    assert found.code == 0 and "is complete already: same recipe, same source" in found.output
    assert command("quantize", model, model).code == 4


def test_5_broken_or_out_of_reach(model: Path, out: Path) -> None:
    for name in ("quantize", "plan", "inspect", "verify"):
        found = command(name, model / "nothing")
        assert found.code == 5 and "does not exist. Pass a model folder, or a Hub id" in found.error
    (model / "model.safetensors").write_bytes(b"\0" * 100)
    for name in ("quantize", "plan", "inspect", "verify"):
        found = command(name, model)
        assert found.code == 5 and "model.safetensors cannot be read: its header is not JSON" in found.error
    assert command("verify", model, "--against", model / "x").code == 5


def test_6_not_finite(model: Path, out: Path) -> None:
    plant(model, "model.layers.1.mlp.up_proj.weight", 65, float("nan"))
    found = command("quantize", model, out, "--strict")
    assert found.code == 6
    assert "Error: model.layers.1.mlp.up_proj [128, 64]: weight [1, 1] is nan." in found.error
    assert "--ignore-layers model.layers.1.mlp.up_proj" in found.error
    found = command("quantize", model, out, "--overwrite")
    assert found.code == 0
    assert "model.layers.1.mlp.up_proj stays in full precision: weights that cannot be rounded" in found.output


def test_7_verification_failed(model: Path, out: Path) -> None:
    command("quantize", model, out)
    assert command("verify", out, "--against", model).code == 0
    poke(out, "model.layers.1.mlp.up_proj.scales", 0, b"\x00\x7e")
    found = command("verify", out)
    assert found.code == 7 and "- model.layers.1.mlp.up_proj: weight [0, 0] is nan" in found.error
    assert "Quantize again with --overwrite, or copy the files again" in found.error


def test_other_codes(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, code, message in (
        (QuantizationError("something else"), 1, "Error: something else"),
        (OSError(5, "Input/output error", "shard"), 1, "Input/output error: 'shard'. The system refused this"),
        (GridError("codes reach 9..9"), 70, "Error: codes reach 9..9"),
        (KeyboardInterrupt(), 130, "Interrupted. What is finished is kept: repeat the same command"),
    ):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(pipeline, "open_shards", fail)
        found = command("quantize", model, out)
        assert found.code == code and message in found.error and "Traceback" not in found.error


def test_every_code_is_documented() -> None:
    text = str(main_module.__doc__).partition("Exit codes:")[2]
    documented = {int(code) for code in re.findall(r"(?<![\w.])\d+(?=\s[a-z])", text)}
    classes = [getattr(errors, name) for name in errors.__all__ if name[0].isupper()]
    assert documented == {cls.exit_code for cls in classes} | {0, 130}


def test_a_closed_pipe_is_no_crash(model: Path) -> None:
    line = f"{sys.executable} -m roundel plan {model} --json | head -c 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stdout == "{" and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["[bold]", "a[/b]c", "[/]", "x y", "ü"])
def test_names_are_not_markup(name: str, tmp_path: Path) -> None:
    model, out = build("llama", tmp_path / name), tmp_path / f"out{name}".replace("/", "")
    for arguments in (["plan", model], ["quantize", model, out], ["quantize", model, out], ["inspect", model]):
        found = command(*arguments)
        assert found.code == 0, found.error
        assert Path(name).name.replace(" ", "") in found.output.replace(" ", "")
    assert command("verify", out, "--against", model).code == 0


# Cheap

HEAVY = ("torch", "numba", "transformers", "huggingface_hub")
WATCHED = """
import sys
sys.argv[0] = "roundel"
try:
    {run}
finally:
    print("loaded:", *[name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


def loaded(*arguments: object) -> list[str]:
    """Which heavy modules a command imports."""
    run = "from roundel.cli.main import main; main()" if arguments else "import roundel; roundel.__version__"
    found = process("-c", WATCHED.format(run=run, heavy=HEAVY), *arguments)
    assert found.code == 0, found.error
    return found.error.rpartition("loaded:")[2].split()


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_has_an_example(name: str) -> None:
    found = command(name, "--help")
    assert found.code == 0 and re.search(rf"Examples?: roundel {name}", found.output)
    assert "Usage: roundel" in found.output


def test_help_and_import_load_nothing_heavy(model: Path) -> None:
    assert loaded() == loaded("--help") == loaded("quantize", "--help") == loaded("--version") == []


def test_what_reads_no_weight_loads_no_torch(model: Path) -> None:
    assert "torch" not in loaded("plan", model) + loaded("inspect", model)


def test_plain_rounding_loads_no_torch(model: Path, out: Path) -> None:
    assert loaded("quantize", model, out) == ["numba"]


@pytest.mark.parametrize("arguments", [["-c", "import roundel"], ["-m", "roundel", "--help"]])
def test_half_a_second(arguments: list[str]) -> None:
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process(*arguments).code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5


def test_public_names() -> None:
    assert {name for name in roundel.__all__ if getattr(roundel, name)} == set(roundel.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        roundel.nothing  # noqa: B018
