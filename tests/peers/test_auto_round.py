"""Our plain rounding against auto-round's, bit for bit, on pico models of real architectures.

auto-round lives in an environment of its own (`.peers/auto-round`, or `$ROUNDEL_PEERS/auto-round`) and only ever runs
as a program. Without it these tests skip. All its jobs run in one subprocess before the first comparison.

auto-round rounds integers in two ways. Compiled, which is its default, codes and zero points come from the float32
scale and the file holds that scale in fp16; uncompiled, they come from the fp16 scale that is in the file. Its regular
route, the only one that writes auto_gptq and auto_awq, is never compiled. It computes in bfloat16 where the device can
and in float32 where it cannot. Here it is held to one arithmetic: uncompiled, in float32.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import roundel
from roundel.errors import PlanError

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("ROUNDEL_PEERS", HERE.parents[1] / ".peers"))
PYTHON = PEERS / "auto-round" / "bin" / "python"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"auto-round is not installed: no {PYTHON}")

Options = dict[str, object]
Config = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of both tools. `options` are spelled as both spell them; `route` is auto-round's affair only."""

    model: str
    scheme: str = "W4A16"
    format: str = "auto_round"
    options: Options = field(default_factory=dict)
    route: str = "auto"

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def name(self) -> str:
        parts = [self.model, self.scheme, self.format]
        parts += [f"{key}={value}" for key, value in self.options.items()] + [self.route] * (self.route != "auto")
        return re.sub(r"[^\w.=-]+", "_", "-".join(parts))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where we differ on purpose: why, and what our output must be instead.

    like     the output must be that of this job: the tensors that one has, and its config if the format is the same
    more     layers (a regular expression) that we round and auto-round keeps; everything else must agree
    refused  we raise a PlanError with these words
    """

    reason: str
    like: Job | None = None
    more: str | None = None
    refused: str | None = None


ASYM: Options = {"sym": False}
HEAD: Options = {"quant_lm_head": True}
IGNORE: Options = {"ignore_layers": ["mlp.down_proj", "layers.1.self_attn"]}
OVERRIDES: Options = {
    "layer_config": {
        "model.layers.0.self_attn.q_proj": {"bits": 8},
        "down_proj": {"bits": 2, "group_size": 32},
        "model.layers.1.mlp.up_proj": {"bits": 16},
    }
}
MX_OVERRIDES: Options = {"layer_config": {"down_proj": {"scheme": "MXFP8"}, "model.layers.1.mlp.up_proj": {"bits": 16}}}

REGULAR = ("llama_bf16", "llama_fp32", "qwen3_moe", "opt")  # models both routes of auto-round can take
SOURCES = (*REGULAR, "llama_fp16", "llama_tied", "llama_shards", "mixtral", "llama_fp8")
HALF_BLOCKS = "llama_fp8_bf16_scale"  # its last blocks of scales are half full; 448 inputs, which 64 divides

EQUAL: tuple[Job, ...] = (
    *(Job(model=model) for model in SOURCES),
    Job(model=HALF_BLOCKS, options={"group_size": 64}),
    *(Job(model="llama_bf16", scheme=scheme) for scheme in ("W2A16", "W2A16G32", "W2A16G64", "W8A16", "W4A16G32")),
    *(Job(model=model, scheme="W8A16") for model in ("llama_fp32", "llama_fp16", "opt")),
    *(Job(model=model, scheme="W2A16", options=ASYM) for model in SOURCES),
    *(Job(model="llama_bf16", scheme="W2A16", options=ASYM | {"group_size": size}) for size in (32, 64)),
    *(Job(model=model, scheme="W3A16", options=options) for model in REGULAR for options in ({}, ASYM)),
    *(Job(model="llama_bf16", options={"group_size": size}) for size in (64, 256)),
    Job(model="llama_bf16", options={"bits": 8, "group_size": 32}),
    *(Job(model="llama_bf16", options=options) for options in (HEAD, IGNORE, OVERRIDES)),
    # MX floats
    *(Job(model=model, scheme=scheme) for model in (*SOURCES, "llama_odd") for scheme in ("MXFP4", "MXFP8")),
    *(
        Job(model=model, scheme=scheme, format="llm_compressor")
        for model in ("llama_bf16", "llama_tied", "qwen3_moe", "opt", HALF_BLOCKS)
        for scheme in ("MXFP4", "MXFP8")
    ),
    *(
        Job(model="llama_bf16", scheme=scheme, format=format_)
        for scheme in ("MXFP4_RCEIL", "MXFP8_RCEIL")
        for format_ in ("auto_round", "llm_compressor")
    ),
    *(Job(model=model, scheme="MXFP4", options=HEAD) for model in ("llama_bf16", "qwen3_moe")),
    *(
        Job(model="llama_bf16", scheme="MXFP4", format=format_, options=options)
        for format_ in ("auto_round", "llm_compressor")
        for options in (IGNORE, MX_OVERRIDES)
    ),
    Job(model="llama_ragged", scheme="MXFP4", options={"ignore_layers": ["down_proj"]}),
    # the formats of AutoGPTQ and AutoAWQ
    *(Job(model=model, format=format_) for model in REGULAR for format_ in ("auto_gptq", "auto_awq")),
    *(Job(model=model, format="auto_awq", options=ASYM) for model in REGULAR),
    *(Job(model=model, format="auto_gptq") for model in ("llama_fp16", "llama_tied", "llama_shards", "llama_odd")),
    *(Job(model="llama_bf16", scheme=scheme, format="auto_gptq") for scheme in ("W2A16", "W3A16", "W8A16")),
    *(
        Job(model="llama_bf16", format=format_, options={"group_size": size})
        for format_ in ("auto_gptq", "auto_awq")
        for size in (32, 64, -1)
    ),
    *(Job(model="llama_bf16", format=format_, options=IGNORE) for format_ in ("auto_gptq", "auto_awq")),
    Job(model="llama_bf16", format="auto_gptq", options=OVERRIDES),
    Job(model="llama_bf16", format="auto_gptq", options={"group_size": 96}),
    Job(model="llama_ragged", format="auto_gptq", options={"ignore_layers": ["mlp"]}),
)


def by_regular_route(reason: str, *jobs: Job) -> dict[Job, Difference]:
    """Jobs whose output must be that of auto-round's regular route, although it would not take that by itself."""
    return {job: Difference(reason=reason, like=replace(job, route="regular")) for job in jobs}


DIFFERENT: dict[Job, Difference] = {
    **by_regular_route(
        "model-free fails on every layer, warns, and saves the model unrounded",
        Job(model="llama_bf16", options={"group_size": -1}),
    ),
    **by_regular_route(
        "model-free forgets the mix and rounds everything to 4 bits",
        *(Job(model=model, scheme="W4A16_MIXED") for model in ("llama_bf16", "qwen3_moe")),
    ),
    **by_regular_route(
        "model-free stores 4-bit asymmetric layers in words vLLM does not read; the regular route takes AWQ's",
        *(Job(model=model, options=ASYM) for model in (*REGULAR, "llama_tied", "llama_shards")),
    ),
    **by_regular_route(
        "model-free pads inputs to whole groups, which makes more words than any reader expects",
        *(Job(model="llama_odd", scheme=scheme) for scheme in ("W4A16", "W8A16")),
        Job(model="llama_odd", scheme="W2A16", options=ASYM),
        *(Job(model="llama_bf16", options={"group_size": size}) for size in (96, 512)),
    ),
    **{
        Job(model="llama_ragged", scheme=scheme, format=format_): Difference(
            reason="340 inputs fill no whole words or groups; they are padded or silently kept, we ask what to do",
            refused="340 inputs",
        )
        for scheme, format_ in (("W4A16", "auto_round"), ("W4A16", "auto_gptq"), ("MXFP4", "auto_round"))
    },
    Job(model="llama_odd", format="auto_awq"): Difference(
        reason="AWQ's order holds whole groups only; auto-round fails as it packs", refused="192 inputs"
    ),
    Job(model="mixtral", format="auto_gptq"): Difference(
        reason="the regular route cannot load its experts; model-free rounds them, into the same words",
        like=Job(model="mixtral"),
    ),
    Job(model="llama_bf16", format="auto_gptq", options=HEAD): Difference(
        reason="the regular route declares a rounded head and writes a float one; model-free writes it",
        like=Job(model="llama_bf16", options=HEAD),
    ),
    Job(model="llama_fp8", format="auto_gptq"): Difference(
        reason="without a GPU the regular route loses the scales of an FP8 source and rounds its bare codes",
        like=Job(model="llama_fp8"),
    ),
    **{
        Job(model=model, options=HEAD): Difference(
            reason="model-free silently ignores quant_lm_head where the head is tied; we untie it", more=r"^lm_head$"
        )
        for model in ("llama_tied", "opt")
    },
    Job(model="rwkv"): Difference(
        reason="model-free takes every name with 'output' or 'head' in it for the output head",
        more=r"\.attention\.output$",
    ),
    Job(model="qwen3_moe", options={"ignore_layers": ["gate"]}): Difference(
        reason="model-free keeps every layer with 'gate' anywhere in its name, gate_proj too; we mean the module",
        like=Job(model="qwen3_moe"),
    ),
}

# Asymmetric GPTQ files store a zero point minus one, so they cannot hold a zero point of 0.
UNSTORABLE_ZERO = (
    *(Job(model=model, format="auto_gptq", options=ASYM) for model in (*REGULAR, "llama_odd")),
    *(Job(model="llama_bf16", scheme=scheme, format="auto_gptq", options=ASYM) for scheme in ("W2A16", "W3A16")),
)
# One layer asymmetric, the others symmetric.
MIXED_SYMMETRY = Job(model="llama_bf16", options={"layer_config": {"k_proj": {"sym": False}}})

# What the readers of each kind of config look at, besides the treatment of single layers.
READ_KEYS = {
    "auto-round": (
        *("bits", "group_size", "sym", "data_type", "packing_format", "block_name_to_quantize"),
        *("act_bits", "act_group_size", "act_sym", "act_data_type", "act_dynamic"),
    ),
    "gptq": ("bits", "group_size", "sym", "desc_act", "lm_head"),
    "awq": ("bits", "group_size", "zero_point", "version"),
    "compressed-tensors": ("format", "quantization_status", "kv_cache_scheme"),
}
SUFFIXES = re.compile(
    r"(.+)\.(?:qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_shape|weight_zero_point)$"
)


@dataclass(frozen=True)
class Checkpoint:
    """What a tool wrote."""

    tensors: dict[str, Tensor]
    config: Config

    @property
    def rounded(self) -> set[str]:
        """The layers that are stored in few bits."""
        return {found[1] for name in self.tensors if (found := SUFFIXES.match(name))}


def read(folder: Path) -> Checkpoint:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert json.loads((folder / "quantization_config.json").read_text()) == config
    return Checkpoint(read_tensors(folder), config)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def peer_job(job: Job, models: Path, out: Path) -> dict[str, object]:
    """A job as `run_auto_round.py` reads it."""
    options = dict(job.options)
    if isinstance(layers := options.get("ignore_layers"), list):
        options["ignore_layers"] = ",".join(layers)
    return options | {
        "name": job.name,
        "model": str(models / job.model),
        "out": str(out / job.name),
        "scheme": job.scheme,
        "format": job.format,
        "route": job.route,
        "bf16": False,
        "enable_torch_compile": False,
    }


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pico models."""
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, str(HERE / "make_models.py"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def peer(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    """Of every job, auto-round's folder, or the error it died of."""
    out = tmp_path_factory.mktemp("auto_round")
    also = [different.like for different in DIFFERENT.values() if different.like]
    wanted = (*EQUAL, *DIFFERENT, *also, *UNSTORABLE_ZERO, MIXED_SYMMETRY)
    jobs = {job.name: peer_job(job, models, out) for job in wanted}
    (out / "jobs.json").write_text(json.dumps(list(jobs.values())))
    command = [str(PYTHON), str(HERE / "run_auto_round.py"), str(out / "jobs.json")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    results = [json.loads(line) for line in ran.stdout.splitlines()]
    assert {result["name"] for result in results} == set(jobs)
    return {result["name"]: out / result["name"] if result["ok"] else result["error"] for result in results}


def quantize(job: Job, models: Path, out: Path) -> Checkpoint:
    """What we make of a job. Its config must say of each layer what the file holds."""
    roundel.quantize(models / job.model, out, scheme=job.scheme, format=job.format, **job.options)  # type: ignore[arg-type]
    made = read(out)
    layers = linear_layers(models / job.model) | made.rounded
    assert made.rounded == {layer for layer in layers if treatment(made.config, layer)}
    return made


def peer_checkpoint(job: Job, peer: dict[str, Path | str]) -> Checkpoint:
    folder = peer[job.name]
    assert isinstance(folder, Path), folder
    return read(folder)


@pytest.mark.parametrize("job", EQUAL, ids=lambda job: job.name)
def test_equal(job: Job, models: Path, peer: dict[str, Path | str], tmp_path: Path) -> None:
    ours, theirs = quantize(job, models, tmp_path), peer_checkpoint(job, peer)
    compare(ours.tensors, theirs.tensors)
    compare_configs(ours.config, theirs.config, linear_layers(models / job.model))


@pytest.mark.parametrize("job", DIFFERENT, ids=lambda job: job.name)
def test_different(job: Job, models: Path, peer: dict[str, Path | str], tmp_path: Path) -> None:
    different = DIFFERENT[job]
    if different.refused:
        with pytest.raises(PlanError, match=different.refused):
            quantize(job, models, tmp_path)
        return
    ours, theirs = quantize(job, models, tmp_path), peer_checkpoint(different.like or job, peer)
    more = {layer for layer in ours.rounded if different.more and re.search(different.more, layer)}
    assert not more & theirs.rounded
    assert ours.rounded == theirs.rounded | more
    shared = {name: tensor for name, tensor in theirs.tensors.items() if name.removesuffix(".weight") not in more}
    compare({name: ours.tensors[name] for name in shared}, shared)
    if different.like is None or different.like.format == job.format:
        compare_treatments(ours.config, theirs.config, linear_layers(models / job.model) - more)


@pytest.mark.parametrize("job", [job for job in DIFFERENT if DIFFERENT[job].like], ids=lambda job: job.name)
def test_difference_remains(job: Job, peer: dict[str, Path | str]) -> None:
    """An entry of DIFFERENT goes when auto-round mends its side."""
    like = DIFFERENT[job].like
    assert like
    if isinstance(peer[job.name], Path):  # else it still dies of an error
        wrong, right = peer_checkpoint(job, peer), peer_checkpoint(like, peer)
        shared = {name for name in wrong.tensors.keys() & right.tensors.keys() if SUFFIXES.match(name)}
        equal = all(torch.equal(wrong.tensors[name], right.tensors[name]) for name in shared)
        assert wrong.rounded != right.rounded or not equal


@pytest.mark.parametrize("job", UNSTORABLE_ZERO, ids=lambda job: job.name)
def test_unstorable_zero(job: Job, models: Path, peer: dict[str, Path | str], tmp_path: Path) -> None:
    """Where auto-round's zero point of 0 would be read as 1, we fit the group to zero point 1; the rest is equal."""
    ours, theirs = quantize(job, models, tmp_path), peer_checkpoint(job, peer)
    compare_configs(ours.config, theirs.config, linear_layers(models / job.model))
    assert ours.tensors.keys() == theirs.tensors.keys()
    source = read_tensors(models / job.model)
    refitted = 0
    for layer in sorted(ours.rounded):
        here, there = Words.of(ours, layer), Words.of(theirs, layer)
        groups = here.grouped(source[f"{layer}.weight"].float())
        extent = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / (2**here.bits - 1)
        scale = extent.to(torch.float16).clamp(min=1e-5).float()
        zero = torch.round(-groups.amin(-1).clamp(max=0) / scale) == 0
        refitted += int(zero.sum())
        same = ~zero
        for mine, other in zip(here.parts, there.parts, strict=True):
            assert torch.equal(mine[same], other[same]), layer
        assert (here.zeros[zero] == 0).all()
        decoded = (here.codes[zero] - 1) * here.scales[zero].float()[:, None]
        assert ((decoded - groups[zero]).abs() <= here.scales[zero].float()[:, None] * 0.51).all(), layer
    assert refitted


def test_mixed_symmetry(models: Path, peer: dict[str, Path | str], tmp_path: Path) -> None:
    """Its zero points follow two conventions in one file, its config names one: its k_proj is read one step off."""
    ours, theirs = quantize(MIXED_SYMMETRY, models, tmp_path), peer_checkpoint(MIXED_SYMMETRY, peer)
    assert theirs.config["packing_format"] == "auto_round:auto_gptq"
    assert ours.config["packing_format"] == "auto_round"
    assert ours.rounded == theirs.rounded
    for layer in sorted(ours.rounded):
        here, there = Words.of(ours, layer), Words.of(theirs, layer)
        assert torch.equal(here.codes, there.codes)
        assert torch.equal(here.scales, there.scales)
        assert torch.equal(here.zeros, there.zeros + (not layer.endswith("k_proj")))


@dataclass(frozen=True, kw_only=True)
class Words:
    """A layer of GPTQ words, unpacked: codes `[out, groups, in group]`, zeros and scales `[out, groups]`."""

    bits: int
    size: int
    codes: Tensor
    zeros: Tensor
    scales: Tensor

    @classmethod
    def of(cls, checkpoint: Checkpoint, layer: str) -> Words:
        treated = treatment(checkpoint.config, layer)
        assert treated is not None
        bits, size = int(str(treated["bits"])), int(str(treated["group_size"]))
        scales = checkpoint.tensors[f"{layer}.scales"].t()
        zeros = unpack(checkpoint.tensors[f"{layer}.qzeros"].t(), bits)
        codes = unpack(checkpoint.tensors[f"{layer}.qweight"], bits).t()
        return cls(bits=bits, size=size, codes=grouped(codes, size), zeros=zeros, scales=scales)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.codes, self.zeros, self.scales

    def grouped(self, weight: Tensor) -> Tensor:
        return grouped(weight, self.size)


def grouped(values: Tensor, size: int) -> Tensor:
    """`[out, in]` as `[out, groups, size]`, the last group repeating its last column."""
    missing = -values.shape[1] % size
    return torch.cat([values, values[:, -1:].expand(-1, missing)], dim=1).reshape(len(values), -1, size)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Words `[n, m]` as the codes of `bits` bits that follow one another in each column, lowest bit first."""
    stream = (words[:, None, :] >> torch.arange(32)[None, :, None]) & 1
    codes = stream.reshape(-1, bits, words.shape[1]) << torch.arange(bits)[None, :, None]
    return codes.sum(dim=1)


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in sorted(theirs):
        compare_tensors(name, ours[name], theirs[name])


def compare_tensors(name: str, ours: Tensor, theirs: Tensor) -> None:
    """The same bytes, except that auto-round's regular route widens what stays in full precision on a CPU."""
    if theirs.dtype == torch.float32 and ours.dtype in (torch.bfloat16, torch.float16):
        ours = ours.float()
    assert (name, ours.dtype, ours.shape) == (name, theirs.dtype, theirs.shape)
    differ = (ours.contiguous().view(torch.uint8) != theirs.contiguous().view(torch.uint8)).sum().item()
    assert differ == 0, f"{name}: {differ} of {ours.nbytes} bytes differ"


def compare_configs(ours: Config, theirs: Config, layers: set[str]) -> None:
    """The keys readers need, and how they would treat each layer."""
    method = theirs["quant_method"]
    assert ours["quant_method"] == method
    keys = READ_KEYS[str(method)]
    assert {key: ours.get(key) for key in keys} == {key: theirs.get(key) for key in keys}
    compare_treatments(ours, theirs, layers)


def compare_treatments(ours: Config, theirs: Config, layers: set[str]) -> None:
    for layer in sorted(layers):
        assert (layer, treatment(ours, layer)) == (layer, treatment(theirs, layer))


def linear_layers(model: Path) -> set[str]:
    """Names of the source's matrices, embeddings aside."""
    matrices = {name for name, tensor in read_tensors(model).items() if name.endswith(".weight") and tensor.ndim == 2}
    return {name.removesuffix(".weight") for name in matrices if "embed" not in name}


def treatment(config: Config, layer: str) -> dict[str, object] | None:
    """What a reader makes of a layer: its number format, or None when it is in full precision."""
    return {"auto-round": by_auto_round, "gptq": by_gptq, "awq": by_awq, "compressed-tensors": by_compressed_tensors}[
        str(config["quant_method"])
    ](config, layer)


def by_auto_round(config: Config, layer: str) -> dict[str, object] | None:
    keys = ("packing_format", "bits", "group_size", "sym", "data_type", "act_bits", "act_data_type")
    silent = {"act_bits": 16, "act_data_type": "float"}  # what a reader assumes of a config that does not say
    extra = mapping(config.get("extra_config", {}))
    found = extra.get(layer)
    if found is None:
        found = next((value for pattern, value in extra.items() if re.search(pattern, layer)), None)
    blocks = str(config.get("block_name_to_quantize", "")).split(",")
    if found is None and not any(block and layer.startswith(f"{block}.") for block in blocks):
        return None
    merged = silent | {key: config[key] for key in keys if key in config} | mapping(found or {})
    return None if int(str(merged["bits"])) >= 16 else {key: merged.get(key) for key in keys}


def by_gptq(config: Config, layer: str) -> dict[str, object] | None:
    keys = ("bits", "group_size", "sym")
    if not re.search(r"\.\d+\.", layer) and not config["lm_head"]:
        return None
    override: dict[str, object] = {}
    for pattern, value in mapping(config.get("dynamic", {})).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), layer):
            if pattern.startswith("-:"):
                return None
            override = mapping(value)
            break
    return {key: config[key] for key in keys} | override


def by_awq(config: Config, layer: str) -> dict[str, object] | None:
    kept = config.get("modules_to_not_convert") or []
    assert isinstance(kept, list)
    return None if any(name in layer for name in kept) else {key: config[key] for key in ("bits", "group_size")}


def by_compressed_tensors(config: Config, layer: str) -> dict[str, object] | None:
    if layer in list(config["ignore"]):  # type: ignore[call-overload]
        return None
    groups = [mapping(group) for group in mapping(config["config_groups"]).values()]
    named = [group for group in groups if layer in group["targets"]]  # type: ignore[operator]
    group = (named or [group for group in groups if group["targets"] == ["Linear"]])[0]
    return {"weights": group["weights"], "input_activations": group["input_activations"]}


def mapping(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    return value
