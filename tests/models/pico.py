"""Picoscopic checkpoints in the layout of published ones: two blocks, a few hundred kilobytes, seeded, no network.

`build` writes config.json and safetensors for one of PICO_TYPES. `build_fp8`, `build_mxfp4` and `build_nvfp4` write a
Llama whose decoder linears are packed as other tools pack them. A tensor's values depend on its name, its shape and
the seed alone; they are drawn in float32 and then rounded, so checkpoints of different dtypes agree.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models import packed
from models.layout import Config, Shapes
from models.table import PICO

__all__ = [
    "FOREIGN",
    "PICO_TYPES",
    "build",
    "build_foreign",
    "build_fp8",
    "build_mxfp4",
    "build_nvfp4",
    "config_of",
    "shapes_of",
    "weight_of",
]

FOREIGN = ("fp8 block", "fp8 channel", "fp8 tensor", "mxfp4", "nvfp4", "modelopt", "gpt_oss")

PICO_TYPES: tuple[str, ...] = tuple(PICO)
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what loaders put in one matrix
MXFP4_CONFIG: Config = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def build(
    model_type: str,
    folder: Path,
    dtype: str = "bfloat16",
    shards: int = 1,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Write the pico checkpoint of a model type; `config_overrides` are fields of the language model's config.

    "gpt_oss" has its experts in MXFP4, as on the Hub, unless quantization_config=None asks for bf16.
    """
    config = config_of(model_type, dtype, **config_overrides)
    shapes = shapes_of(model_type, **config_overrides)
    tensors = {name: weight_of(name, shape, seed).to(_dtype(name, dtype)) for name, shape in shapes.items()}
    if "quantization_config" in config:
        tensors = _pack_gpt_oss(tensors)
    return save(folder, config, tensors, shards)


def build_fp8(
    folder: Path,
    kind: str = "block",
    *,
    block_size: int = 128,
    shards: int = 1,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """A Llama in FP8: "block" (DeepSeek's, block_size x block_size), "channel" or "tensor" (compressed-tensors)."""
    if kind == "block":
        quantization: Config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        quantization["weight_block_size"] = [block_size, block_size]
        return _build_packed(
            folder, quantization, lambda w, _: packed.fp8_block(w, block_size), shards, seed, config_overrides
        )
    pack = {"channel": packed.fp8_channel, "tensor": packed.fp8_tensor}[kind]
    weights = {"num_bits": 8, "type": "float", "strategy": kind, "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    quantization = _compressed_tensors("float-quantized", weights, inputs)
    return _build_packed(folder, quantization, lambda w, _: pack(w), shards, seed, config_overrides)


def build_mxfp4(folder: Path, *, shards: int = 1, seed: int = 0, **config_overrides: Any) -> Path:
    """A Llama in compressed-tensors' MXFP4."""
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    weights |= {"dynamic": False, "scale_dtype": "torch.uint8"}
    quantization = _compressed_tensors("mxfp4-pack-quantized", weights, weights | {"dynamic": True})
    return _build_packed(folder, quantization, lambda w, _: packed.mxfp4(w), shards, seed, config_overrides)


def build_nvfp4(
    folder: Path, naming: str = "compressed-tensors", *, shards: int = 1, seed: int = 0, **config_overrides: Any
) -> Path:
    """A Llama in NVFP4, weights only, under the names of "compressed-tensors" or of "modelopt"."""
    if naming == "modelopt":
        quantization: Config = {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "group_size": 16,
            "ignore": ["lm_head"],
            "producer": {"name": "modelopt"},
        }
        return _build_packed(folder, quantization, packed.nvfp4_modelopt, shards, seed, config_overrides)
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    weights |= {"dynamic": False, "scale_dtype": "torch.float8_e4m3fn"}
    quantization = _compressed_tensors("nvfp4-pack-quantized", weights, None)
    return _build_packed(folder, quantization, packed.nvfp4, shards, seed, config_overrides)


def build_foreign(kind: str, folder: Path) -> Path:
    """A checkpoint that another tool would have rounded, of one of the kinds of FOREIGN."""
    if kind.startswith("fp8"):
        return build_fp8(folder, kind.split()[1])
    if kind == "mxfp4":
        return build_mxfp4(folder)
    if kind == "gpt_oss":
        return build("gpt_oss", folder)
    return build_nvfp4(folder, "modelopt" if kind == "modelopt" else "compressed-tensors")


def config_of(model_type: str, dtype: str = "bfloat16", **overrides: Any) -> Config:
    """config.json of a pico checkpoint."""
    pico = PICO[model_type]
    head: Config = {"architectures": [pico.architecture], "model_type": model_type, "torch_dtype": dtype}
    text = pico.config | {k: v for k, v in overrides.items() if k != "quantization_config"}
    if pico.vision is not None:
        head["vision_config"] = pico.vision
    if model_type == "gpt_oss" and "quantization_config" not in overrides:
        head["quantization_config"] = MXFP4_CONFIG
    if pico.text is None:
        return head | text
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    return head | tied | {"text_config": text | {"model_type": pico.text}}


def shapes_of(model_type: str, **overrides: Any) -> Shapes:
    """Tensor name -> shape, before anything is packed."""
    return PICO[model_type].shapes(PICO[model_type].config | overrides)


def weight_of(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The float32 tensor called `name`: near 1 for norms, else normal with a deviation of 0.05."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    noise = torch.randn(shape, generator=generator) * 0.05
    return noise + 1.0 if len(shape) == 1 and name.endswith("weight") else noise


def save(folder: Path, config: Config, tensors: Mapping[str, Tensor], shards: int = 1) -> Path:
    """Write config.json and `shards` files of nearly equal numbers of tensors, with an index if there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, size = list(tensors), math.ceil(len(tensors) / shards)
    files = {name: f"model-{i // size + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def _dtype(name: str, dtype: str) -> torch.dtype:
    """The published dtype: these two are in float32 whatever the rest is in."""
    chosen: torch.dtype = getattr(torch, "float32" if name.endswith(("e_score_correction_bias", "A_log")) else dtype)
    return chosen


def _pack_gpt_oss(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    packed_tensors: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 3:
            packed_tensors |= {f"{name}_{part}": t for part, t in packed.gpt_oss_mxfp4(tensor.float()).items()}
        else:
            packed_tensors[name] = tensor
    return packed_tensors


def _compressed_tensors(name: str, weights: Config, inputs: Config | None) -> Config:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


def _build_packed(
    folder: Path,
    quantization: Config,
    pack: Callable[[Tensor, float], dict[str, Tensor]],
    shards: int,
    seed: int,
    overrides: Config,
) -> Path:
    """A Llama of bf16 weights whose `_proj` matrices are packed, given the largest magnitude of those fused with it."""
    shapes = shapes_of("llama", **overrides)
    weights = {name: weight_of(name, shape, seed).to(torch.bfloat16) for name, shape in shapes.items()}
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if "_proj." in name:
            fused = next((f for f in FUSED if name.split(".")[-2] in f), (name.split(".")[-2],))
            block = name.rsplit(".", 2)[0]
            largest = max(float(weights[f"{block}.{other}.weight"].abs().max()) for other in fused)
            layer = name.removesuffix(".weight")
            tensors |= {f"{layer}.{part}": tensor for part, tensor in pack(weight.float(), largest).items()}
        else:
            tensors[name] = weight
    return save(folder, config_of("llama", **overrides) | {"quantization_config": quantization}, tensors, shards)
