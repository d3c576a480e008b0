"""Our files in the hands of those who load them: the loaded model says what our own dequantized weights say.

Consumers live in environments of their own (`.peers/NAME`, or `$ROUNDEL_PEERS/NAME`) and only ever run as programs, one
for each; without its environment a consumer's tests skip. The reference is the float model with our decoded weights in
it, in the dtype the consumer computes in. MX schemes round the inputs of a layer as well; so does the reference.

Beside the cases that load stand controls (a file spoilt in one place must not pass) and limits (what a consumer cannot
load, or loads wrong, and why): an entry of these goes when the consumer mends it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

import roundel
from models.pico import build
from peers.consumer_cases import CASES, CONSUMERS, CONTROLS, LIMITS, LOADED, MODELS, SPOILERS, Case
from peers.make_models import write_tokenizer
from roundel.checkpoint import Checkpoint, open_checkpoint
from roundel.data.bundled import bundled_model
from roundel.evaluation.models import decoded_model
from roundel.ops.encode import encode
from roundel.ops.minifloat import decode_e8m0, round_e2m1, round_e4m3
from roundel.scheme import ELEMENTS, MIXES, PRESETS, Grid, Scheme

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("ROUNDEL_PEERS", HERE.parents[1] / ".peers"))
LOADER_OF = {"mlx": "load_mlx.py"}  # of a consumer, where it is not load_checkpoint.py
NEAR = 2e-4  # KL of arithmetic alone, in nats; most cases are exact, kernels in float16 come to 1.1e-4
FAR = 1e-2  # KL that a control has at least

PROMPT = torch.randint(3, 500, (20,), generator=torch.Generator().manual_seed(1)).tolist()
GAIN = 4  # linear weights are made larger, so that the models are sure of what they say and mistakes show
CALIBRATED = {"dataset": [PROMPT, PROMPT[::-1]], "nsamples": 2, "seqlen": len(PROMPT)}  # where a scheme asks for data

Result = dict[str, Any]


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """What `load_checkpoint.py` said of each case that is asked for, with the file of its logits and a folder that is
    not spoilt."""
    work = tmp_path_factory.mktemp("consumers")
    asked = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    cases = [case for case in CASES if case in asked]
    sources = {name: make_model(name, work / name) for name in {case.model for case in cases}}
    found: dict[str, Result] = {}
    for consumer in dict.fromkeys(CONSUMERS.values()):
        if python_of(consumer).exists() and any(CONSUMERS[case.format] == consumer for case in cases):
            jobs = [make_job(c, sources[c.model], work / c.name) for c in cases if CONSUMERS[c.format] == consumer]
            (work / "jobs.json").write_text(json.dumps(sorted(jobs, key=lambda job: str(job["process"]))))
            command = [python_of(consumer), HERE / LOADER_OF.get(consumer, "load_checkpoint.py"), work / "jobs.json"]
            with (work / f"{consumer}.log").open("w") as log:  # GPTQModel writes files where it is started
                lines = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, check=True, cwd=work
                ).stdout
            said = {result["name"]: result for result in map(json.loads, lines.splitlines())}
            found |= {job["name"]: job | said[job["name"]] for job in jobs}
    return found


def python_of(consumer: str) -> Path:
    return PEERS / consumer / "bin" / "python"


def make_model(name: str, folder: Path) -> Path:
    if name == "tinybook":
        return bundled_model()
    kind, options = MODELS[name]
    build(kind, folder, dtype="float16" if kind == "opt" else "bfloat16", **options)
    tensors = load_file(folder / "model.safetensors")
    larger = {name: t * GAIN if t.ndim == 2 else t for name, t in tensors.items()}
    save_file(larger, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)  # GPTQModel does not load a model without one
    return folder


def make_job(case: Case, source: Path, folder: Path) -> Result:
    """Quantize, and say what is to be loaded and how."""
    measured = "kv_cache" in case.options or (case.scheme not in MIXES and Scheme.parse(case.scheme).stores_input_scale)
    options = {**case.options, **(CALIBRATED if measured else {})}
    for kind in ("ours", "spoilt") if case.spoilt else ("ours",):
        roundel.quantize(source, folder / kind, scheme=case.scheme, format=case.format, **options)
    if case.spoilt:
        SPOILERS[case.spoilt](folder / "spoilt")
    return {
        "name": case.name,
        "process": case.loader if CONSUMERS[case.format] == "gptqmodel" else case.name,
        "folder": str(folder / ("spoilt" if case.spoilt else "ours")),
        "ours": str(folder / "ours"),
        "prompt": PROMPT,
        "logits": str(folder / "logits.npy"),
        "loader": case.loader,
        "dtype": case.dtype,
    }


def result_of(case: Case, results: Mapping[str, Result]) -> Result:
    if case.name not in results:
        pytest.skip(f"{CONSUMERS[case.format]} is not installed: no {python_of(CONSUMERS[case.format])}")
    return results[case.name]


@pytest.mark.parametrize("case", LOADED, ids=lambda case: case.name)
def test_says_what_our_weights_say(case: Case, results: dict[str, Result]) -> None:
    result = result_of(case, results)
    assert result["ok"], result["error"]
    expected = reference(case, result)
    assert divergence(expected, np.load(result["logits"])) < NEAR
    assert result["tokens"][0] == int(expected[-1].argmax())


@pytest.mark.parametrize("case", CONTROLS, ids=lambda case: case.name)
def test_a_spoilt_file_does_not(case: Case, results: dict[str, Result]) -> None:
    result = result_of(case, results)
    assert result["ok"], result["error"]
    assert not divergence(reference(case, result), np.load(result["logits"])) < FAR


@pytest.mark.parametrize("case", LIMITS, ids=lambda case: case.name)
def test_limits_are_real(case: Case, results: dict[str, Result]) -> None:
    result = result_of(case, results)
    assert not result["ok"] or not divergence(reference(case, result), np.load(result["logits"])) < FAR


def divergence(expected: Tensor, logits: np.ndarray[Any, Any]) -> float:
    """Mean KL(expected || logits) over positions, in nats."""
    p, q = expected.double().log_softmax(-1), torch.from_numpy(logits).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def reference(case: Case, result: Result) -> Tensor:
    """Logits [tokens, vocab] of the float model with our decoded weights, in the dtype the consumer computed in."""
    checkpoint = open_checkpoint(result["ours"])
    layers = checkpoint.layers
    weights = {name: decoded(case, checkpoint, name) for name in layers}
    if case.model.startswith("gpt_oss"):
        model: Any = gpt_oss(weights, Path(result["ours"]).parent / "float")
    else:
        model = decoded_model(Path(result["ours"]), weights)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, result["dtype"].removeprefix("torch.")))
    modules, grids = dict(model.named_modules()), {}
    weights_only = case.loader == "dequantize" or case.format == "fp8"  # on CPU transformers decodes fp8 at loading
    for name, layer in layers.items():
        if layer.scheme.input is None or weights_only:
            continue
        if name in modules:
            measured = checkpoint.unpack(layer).input_scale if layer.scheme.stores_input_scale else None
            grids[modules[name].weight.data_ptr()] = (layer.scheme.input, measured)
        elif case.format == "auto_round":  # transformers decodes the experts of an llm_compressor file, and no more
            experts = modules[name.rpartition(".experts.")[0] + ".experts"]
            grids |= {weight.data_ptr(): (layer.scheme.input, None) for weight in experts.parameters()}
    checkpoint.close()
    if grids:
        model.set_experts_implementation("eager")  # its experts go through `linear`
    rule = rounded if case.format == "auto_round" else rounded_by_compressed_tensors
    cache = RoundedCache(Path(result["ours"])) if "kv_cache" in case.options else None
    with torch.no_grad(), RoundedInputs(grids, rule):
        output = model(input_ids=torch.tensor([PROMPT]), use_cache=False, past_key_values=cache)
        logits: Tensor = output.logits[0].float()
    return logits


def gpt_oss(weights: Mapping[str, Tensor], folder: Path) -> torch.nn.Module:
    """GPT-OSS with these weights, experts by themselves, in the tensors [experts, in, out] that transformers has."""
    apart = {name: weight for name, weight in weights.items() if ".experts." not in name}
    model = decoded_model(make_model("gpt_oss_bf16", folder), apart)
    for name, parameter in model.named_parameters():
        block, _, part = name.rpartition(".")
        if part in ("gate_up_proj", "down_proj"):
            several = [
                torch.stack([weights[f"{block}.{expert}.{each}"].T for expert in range(len(parameter))])
                for each in (("down_proj",) if part == "down_proj" else ("gate_proj", "up_proj"))
            ]
            parameter.data = torch.stack(several, -1).flatten(-2)
    return model


def decoded(case: Case, checkpoint: Checkpoint, name: str) -> Tensor:
    """The weights of a layer as the consumer computes them before it casts them to the model's dtype."""
    weight, scheme = checkpoint.decode(name), checkpoint.layers[name].scheme
    in_half = case.format == "llm_compressor" and case.loader == "dequantize" and scheme.weight.scale == "F16"
    return weight.half() if in_half else weight


class RoundedInputs(TorchFunctionMode):
    """While it lasts, inputs of `linear` are rounded to the grid of its weight, which is known by where it lies, with
    their scale where one is stored."""

    def __init__(
        self,
        grids: Mapping[int, tuple[Grid, Tensor | None]],
        rule: Callable[[Tensor, Grid, Tensor | None], Tensor],
    ) -> None:
        super().__init__()
        self.grids, self.rule = grids, rule

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear:
            found = self.grids.get(args[1].untyped_storage().data_ptr())
            if found is not None:
                inputs = args[0].reshape(-1, args[0].shape[-1])
                args = (self.rule(inputs, *found).to(args[0].dtype).view(args[0].shape), *args[1:])
        return func(*args, **(kwargs or {}))


class RoundedCache(DynamicCache):
    """Keys and values in FP8, with the scales that are stored."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.scales = load_file(folder / "model.safetensors")

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        scale = [self.scales[f"model.layers.{layer}.self_attn.{part}_scale"] for part in "kv"]
        grid = Grid(element=ELEMENTS["e4m3"], block=(0, 0), scale="F32")
        return rounded_by_stored_scale(keys, grid, scale[0]), rounded_by_stored_scale(values, grid, scale[1])


def rounded(inputs: Tensor, grid: Grid, measured: Tensor | None) -> Tensor:
    """As the scheme says, but for MXINT4: auto-round forgets to tell its rounding so, which then takes MXFP4."""
    if measured is not None:
        return rounded_by_stored_scale(inputs, grid, measured)
    return encode(inputs, PRESETS["MXFP4"].weight if grid == PRESETS["MXINT4"].weight else grid).decode()


def rounded_by_compressed_tensors(inputs: Tensor, grid: Grid, measured: Tensor | None) -> Tensor:
    """It computes in the dtype of the inputs. Powers of two are the floor of log2(max), and one more where max is at
    least 1.75 times that; a float scale makes max the middle of both ends of the element's range."""
    if measured is not None:
        return rounded_by_stored_scale(inputs, grid, measured)
    groups = inputs.unflatten(-1, (-1, grid.block_of((1, inputs.shape[-1]))[1]))
    largest = groups.abs().amax(-1, keepdim=True)
    if grid.scale == "E8M0":
        mantissa, exponent = torch.frexp(largest.float())
        power = exponent - 1 + (mantissa >= 0.875).int() - math.floor(math.log2(grid.element.hi))
        scale = decode_e8m0((power + 127).clamp(0, 254).to(torch.uint8)).to(inputs.dtype)
    else:
        scale = largest / ((grid.element.hi - grid.element.lo) / 2)
        scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    scaled = (groups / scale).clamp(grid.element.lo, grid.element.hi)
    if grid.element.is_integer:
        levels = scaled.round()
    elif grid.element.values is None:
        levels = round_e4m3(scaled.float()).to(inputs.dtype)
    else:
        levels = torch.tensor(grid.element.values, dtype=inputs.dtype)[round_e2m1(scaled.float()).long()]
    return (levels * scale).flatten(-2)


def rounded_by_stored_scale(inputs: Tensor, grid: Grid, measured: Tensor) -> Tensor:
    """One scale for all inputs, or the scale of what groups of them are scaled by (NVFP4)."""
    if not isinstance(grid.scale, Grid):
        scale = measured.to(inputs.dtype)
        return round_e4m3((inputs / scale).clamp(grid.element.lo, grid.element.hi).float()).to(inputs.dtype) * scale
    groups = inputs.unflatten(-1, (-1, grid.block[1]))
    largest = groups.abs().amax(-1, keepdim=True)  # divided by 6 in the dtype of the inputs, the rest is float32
    scale = round_e4m3((largest / grid.element.hi / measured).clamp(max=grid.scale.element.hi)).float() * measured
    scaled = torch.where(scale == 0, 0.0, groups / scale).clamp(grid.element.lo, grid.element.hi)
    levels = torch.tensor(grid.element.values, dtype=torch.float32)[round_e2m1(scaled).long()]
    return (levels * scale).flatten(-2).to(inputs.dtype)
