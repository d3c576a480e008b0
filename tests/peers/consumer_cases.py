"""Our files that consumers load: which model, scheme and format, by which loader, and what is known not to work.

A *cell* is a scheme in a format that stores it, as the support matrix has it (`roundel.support`). Each is loaded at
least once: those that no case is written for get a plain one here, or have their reason in `support.NOT_LOADED`, or
are loaded by the tests named in ELSEWHERE.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from roundel.scheme import MIXES, Scheme
from roundel.support import NOT_LOADED, support_rows

__all__ = [
    "CASES",
    "CONSUMERS",
    "CONTROLS",
    "ELSEWHERE",
    "LIMITS",
    "LOADED",
    "MODELS",
    "SPOILERS",
    "WRITTEN",
    "Case",
    "cell_of",
    "cells",
]

CONSUMERS = {
    "auto_round": "auto-round",
    "llm_compressor": "auto-round",
    "auto_gptq": "gptqmodel",
    "gptq_v2": "gptqmodel",
    "auto_awq": "gptqmodel",
    "fp8": "auto-round",
    "fake": "auto-round",
    "mlx": "mlx",
    "auto_round:mlx": "mlx",
    "bnb": "bnb",
    "hqq": "hqq",
}
ELSEWHERE: Mapping[str, str] = {"gguf": "test_gguf_files.py"}  # formats whose cells another file of tests loads
LLAMA = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "vocab_size": 512}
GPT_OSS = {"vocab_size": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama_tied": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "llama_odd": ("llama", {"hidden_size": 192, "intermediate_size": 352, "head_dim": 48, "vocab_size": 512}),
    "opt": ("opt", {"hidden_size": 256, "ffn_dim": 512, "word_embed_proj_dim": 256, "vocab_size": 512}),
    "opt_narrow": ("opt", {"hidden_size": 256, "ffn_dim": 512, "word_embed_proj_dim": 128, "vocab_size": 512}),
    "qwen3": ("qwen3", LLAMA),
    "qwen3_moe": ("qwen3_moe", LLAMA | {"moe_intermediate_size": 128, "norm_topk_prob": False}),
    "gpt_oss": ("gpt_oss", GPT_OSS),
    "gpt_oss_bf16": ("gpt_oss", GPT_OSS | {"quantization_config": None}),
    "mixtral": ("mixtral", LLAMA | {"intermediate_size": 256}),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint of ours and a loader.

    loader, dtype   as in `load_checkpoint.py`
    spoilt          what is done to the file before it is loaded; one of SPOILERS
    limit           why the consumer does not load it, or not as it is
    """

    model: str = "llama"
    scheme: str = "W4A16"
    format: str = "auto_round"
    options: Mapping[str, Any] = field(default_factory=dict)
    loader: str = "transformers"
    dtype: str = "float32"
    spoilt: str | None = None
    limit: str | None = None

    @property
    def name(self) -> str:
        parts = [self.format, self.model, self.scheme, *(f"{key}={value}" for key, value in self.options.items())]
        parts += [self.loader] * (self.loader != "transformers") + ([self.spoilt] if self.spoilt else [])
        return re.sub(r"[^\w.=-]+", "_", "-".join([*parts, self.dtype] if self.dtype != "float32" else parts))


def spoil_config(**values: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= values
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def spoil_tensors(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        changed = {name: change(t).contiguous() if name.endswith(f".{part}") else t for name, t in tensors.items()}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def swap_nibbles(words: Tensor) -> Tensor:
    octets = words.view(torch.uint8)
    return (octets << 4 | octets >> 4).view(words.dtype)


SPOILERS: dict[str, Callable[[Path], None]] = {
    "zeros_as_gptq": spoil_config(packing_format="auto_round:auto_gptq"),
    "zeros_as_gptq_v2": spoil_config(checkpoint_format="gptq_v2"),
    "inputs_by_floor": spoil_config(act_data_type="mx_fp"),
    "weight_nibbles": spoil_tensors("qweight", swap_nibbles),
    "mx_nibbles": spoil_tensors("weight_packed", swap_nibbles),
    "scales": spoil_tensors("scales", lambda t: t.flip(1)),
    "mlx_nibbles": spoil_tensors("weight", lambda t: swap_nibbles(t) if t.dtype == torch.uint32 else t),
    "mlx_biases": spoil_tensors("biases", lambda t: t * 0.75),
    "hqq_codes": spoil_tensors("W_q", swap_nibbles),
    "hqq_zeros": spoil_tensors("zero", lambda t: t - 1),
    "bnb_nibbles": spoil_tensors("weight", lambda t: swap_nibbles(t) if t.dtype == torch.uint8 else t),
    "bnb_scales": spoil_tensors("weight.absmax", lambda t: t.flip(0)),
    "input_floats": spoil_tensors("input_global_scale", lambda t: t * 8),
    "mx_scales": spoil_tensors("weight_scale", lambda t: t + 1),
    "scales_of_rows": spoil_tensors("weight_scale", lambda t: t.flip(0)),
    "scales_of_blocks": spoil_tensors("weight_scale_inv", lambda t: t * 2),
    "cache_scales": spoil_tensors("v_scale", lambda t: t / 4),
    "group_index": spoil_tensors("g_idx", torch.zeros_like),
}

ASYM = {"sym": False}
CACHED = {"kv_cache": "fp8"}
HEAD = {"quant_lm_head": True}
KEPT = {"ignore_layers": ["mlp.down_proj", "layers.1.self_attn"]}
MIXED = {
    "layer_config": {
        "model.layers.0.self_attn.q_proj": {"bits": 8},
        "down_proj": {"bits": 2, "group_size": 32},
        "model.layers.1.mlp.up_proj": {"bits": 16},
    }
}
WIDTHS_MIXED = {"layer_config": {"down_proj": {"bits": 8}, "model.layers.1.mlp.up_proj": {"bits": 16}}}
LAYOUTS_MIXED = {
    "layer_config": {
        "down_proj": "FP8_DYNAMIC",
        "q_proj": "NVFP4A16",
        "o_proj": "INT8_W8A8",
        "model.layers.1.mlp.up_proj": {"bits": 16},
    }
}
EMBEDDING = {"layer_config": {"model.embed_tokens": {"bits": 8}}}
MLX_OF_AUTO_ROUND: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("llama", MIXED | KEPT),
    ("llama", ASYM),
    ("qwen3_moe", {}),
)
MX_MIXED = {"layer_config": {"down_proj": {"scheme": "MXFP8"}, "model.layers.1.mlp.up_proj": {"bits": 16}}}


def auto_round() -> list[Case]:
    widths = [Case(scheme=f"W{bits}A16", options=o) for bits in range(2, 9) for o in ({}, ASYM)]
    groups = [Case(options={"group_size": size} | o) for size in (32, 64, -1) for o in ({}, ASYM)]
    options = [Case(options=o) for o in (MIXED, MIXED | ASYM, {"layer_config": {"down_proj": {"sym": False}}}, KEPT)]
    options += [Case(options=o) for o in (KEPT | ASYM, HEAD, HEAD | ASYM, {"layer_config": {"lm_head": {"bits": 8}}})]
    models = [Case(model=m, options=o) for m in ("opt", "opt_narrow", "qwen3_moe", "tinybook") for o in ({}, ASYM)]
    models += [Case(model="llama_tied", options=o) for o in ({}, HEAD)]
    models += [Case(model="qwen3_moe", scheme="W4A16_MIXED"), Case(model="tinybook", scheme="W2A16G32")]
    dtypes = [Case(dtype="float16"), *(Case(scheme="W3A16", dtype=d) for d in ("float16", "bfloat16"))]
    mx = [Case(scheme=s) for s in ("MXFP4", "MXFP8", "MXFP4_RCEIL", "MXFP8_RCEIL")]
    mx += [Case(scheme="MXFP4", options=o) for o in (MX_MIXED, KEPT, HEAD)]
    mx += [Case(scheme="MXFP4", model=m) for m in ("opt_narrow", "qwen3_moe", "tinybook")]
    mx += [Case(scheme="MXINT4", options=o) for o in ({}, KEPT)]
    mx += [Case(scheme="FP8_STATIC", dtype="bfloat16")]  # in which its layer computes, whatever the model does
    return widths + groups + options + models + dtypes + mx


def words(format_: str, schemes: tuple[str, ...]) -> list[Case]:
    """The cases that GPTQ and AWQ files share."""
    widths = [Case(format=format_, scheme=s, options=o) for s in schemes for o in ({}, ASYM)]
    groups = [Case(format=format_, options={"group_size": size}) for size in (32, 64, 256)]
    plain = [Case(format=format_, options=KEPT | o) for o in ({}, ASYM)] + [
        Case(format=format_, model=m) for m in ("opt", "llama_tied", "tinybook")
    ]
    own: dict[str, Any] = {"format": format_, "loader": "gptqmodel", "dtype": "float16"}
    return [
        *(*widths, *groups, *plain),
        Case(format=format_, loader="gptq_torch", options={"group_size": -1}),
        *(Case(**own, options=o) for o in ({}, HEAD)),
        *(Case(**own, model=m) for m in ("opt", "qwen3_moe", "tinybook")),
    ]


def llm_compressor() -> list[Case]:
    """transformers decodes these in bfloat16 whatever is asked for; told to dequantize, it does so for experts only."""
    mx: dict[str, Any] = {"format": "llm_compressor", "scheme": "MXFP4"}
    dense = ("llama", "llama_tied", "opt_narrow", "tinybook")
    return [
        *(Case(format="llm_compressor", scheme=s, dtype="bfloat16") for s in ("MXFP4_RCEIL", "MXFP8", "MXFP8_RCEIL")),
        *(Case(**mx, dtype="bfloat16", options=o) for o in (MX_MIXED, KEPT, HEAD)),
        *(Case(**mx, dtype="bfloat16", model=m) for m in (*dense, "qwen3_moe")),
        *(Case(**mx, loader="dequantize", model=m) for m in dense),
        *(Case(**mx, loader="dequantize", dtype="bfloat16", model=m) for m in ("qwen3_moe", "mixtral")),
        Case(format="llm_compressor", scheme="MXFP8", loader="dequantize"),
    ]


def compressed_layouts() -> list[Case]:
    """Every layout but MX. transformers keeps scales in the model's dtype, and decodes at loading in the scales': so
    models with float16 weights are asked for in float16, and what is dequantized in bfloat16."""
    own: dict[str, Any] = {"format": "llm_compressor", "dtype": "bfloat16"}
    integers = [Case(**own, scheme=f"W{bits}A16") for bits in range(2, 9)]
    schemes = ("W4A16G-1", "W4A16G32", "INT8_W8A8", "W4AFP8", "FP8_DYNAMIC", "FP8_BLOCK", "FPW8A16", "NVFP4A16")
    others = [Case(**own, scheme=s) for s in (*schemes, "MXFP4A16", "MXFP8A16")]
    single = [Case(format="llm_compressor", scheme=s) for s in ("W4A16", "W8A16", "INT8_W8A8", "FP8_DYNAMIC")]
    zeros = [Case(**own, scheme=f"W{bits}A16_ASYM", loader="dequantize") for bits in (2, 3, 4, 8)]
    decoded_at_once = [Case(**own, scheme=s, loader="dequantize") for s in ("FP8_DYNAMIC", "NVFP4A16", "INT8_W8A8")]
    mixed = [Case(**own, options=o) for o in (LAYOUTS_MIXED, WIDTHS_MIXED, KEPT, HEAD)]
    models = [Case(**own, model=m) for m in ("llama_tied", "tinybook")]
    models += [
        Case(**own, scheme=s, model=m, options=CACHED) for s, m in (("FP8_DYNAMIC", "llama"), ("W4A16", "qwen3"))
    ]
    models += [Case(format="llm_compressor", model="opt_narrow", dtype="float16")]
    models += [Case(format="llm_compressor", model=m) for m in ("qwen3_moe", "mixtral")]
    models += [Case(**own, model="qwen3_moe", scheme="FP8_DYNAMIC")]
    return integers + others + single + zeros + decoded_at_once + mixed + models


def fp8() -> list[Case]:
    own: dict[str, Any] = {"format": "fp8", "scheme": "FP8_BLOCK", "dtype": "bfloat16"}
    models = [Case(**own, model=m) for m in ("llama", "llama_tied", "tinybook", "qwen3_moe", "mixtral")]
    return [
        *models,
        *(Case(**own, options=o) for o in (KEPT, HEAD)),
        Case(**own | {"dtype": "float16"}, model="opt_narrow"),
    ]


def mlx() -> list[Case]:
    """mlx-lm, computing in float32 as our decode does; once with what the file holds."""
    own: dict[str, Any] = {"format": "mlx", "loader": "mlx"}
    widths = [Case(**own, scheme=f"W{bits}A16", options=o) for bits in (2, 3, 4, 5, 6, 8) for o in ({}, ASYM)]
    groups = [Case(**own, options={"group_size": size} | o) for size in (32, 64) for o in ({}, ASYM)]
    options = [Case(**own, options=o) for o in (MIXED, MIXED | ASYM, KEPT, HEAD, EMBEDDING)]
    models = [Case(**own, model=m) for m in ("llama_tied", "qwen3", "qwen3_moe", "mixtral", "tinybook")]
    models += [Case(**own, model="llama_tied", options=o) for o in (HEAD, EMBEDDING)]
    models += [Case(**own, model="gpt_oss", scheme="MXFP4A16"), Case(**own, model="gpt_oss_bf16", scheme="W4A16G32")]
    auto_round = [Case(**own | {"format": "auto_round:mlx"}, model=m, options=o) for m, o in MLX_OF_AUTO_ROUND]
    return [*widths, *groups, *options, *models, *auto_round]


def bnb() -> list[Case]:
    """bitsandbytes decodes to the dtype that the file names, the source's, whatever it computes in."""
    own: dict[str, Any] = {"format": "bnb", "scheme": "NF4"}
    schemes = [Case(**own | {"scheme": s}, dtype="bfloat16") for s in ("NF4", "FP4", "NF4_DQ", "FP4_DQ")]
    options = [Case(**own, dtype="bfloat16", options=o) for o in (KEPT, {"layer_config": {"down_proj": "FP4"}})]
    return [*schemes, *options, *(Case(**own, model=m, dtype="bfloat16") for m in ("llama_tied", "qwen3", "tinybook"))]


def hqq() -> list[Case]:
    own: dict[str, Any] = {"format": "hqq", "loader": "hqq"}
    widths = [Case(**own, scheme=f"W{bits}A16G64", options=o) for bits in (2, 3, 4, 5, 6, 8) for o in ({}, ASYM)]
    solved: dict[str, Any] = {"algorithm": "hqq"}
    floats = [Case(**own, scheme=f"W{bits}A16G64_HQQ", options=solved) for bits in (1, 2, 3, 4, 5, 6, 8)]
    floats += [
        Case(**own, scheme="W4A16_HQQ"),
        Case(**own, scheme="W4A16_HQQ", options={"layer_config": {"down_proj": {"bits": 1}}}),
    ]
    return [*widths, *floats, *(Case(**own, options=o) for o in (MIXED, KEPT, HEAD)), Case(**own, model="opt")]


OWN: dict[str, Any] = {"loader": "gptqmodel", "dtype": "float16"}
WRITTEN = (
    *auto_round(),
    *words("auto_gptq", ("W2A16", "W3A16", "W4A16", "W8A16")),
    *(Case(format="auto_gptq", **OWN, options=o) for o in (MIXED, KEPT)),
    Case(format="auto_gptq", **OWN, model="llama_tied", options=HEAD),
    Case(format="auto_gptq", model="llama_odd"),
    *words("auto_awq", ("W4A16",)),
    Case(format="auto_awq", **OWN, options=ASYM),
    Case(format="auto_awq", model="opt_narrow"),
    *llm_compressor(),
    *compressed_layouts(),
    *fp8(),
    *(Case(format="fake", scheme=s, dtype="bfloat16") for s in ("W4A16", "NVFP4A16")),
    *mlx(),
    *bnb(),
    *hqq(),
    *(Case(format="gptq_v2", scheme=s, options=o) for s in ("W2A16", "W3A16", "W4A16", "W8A16") for o in ({}, ASYM)),
    *(Case(format="gptq_v2", **OWN, options=o) for o in ({}, ASYM, MIXED)),
)
CONTROLS = (
    Case(scheme="W2A16", options=ASYM, spoilt="zeros_as_gptq"),
    Case(options=ASYM, spoilt="scales"),
    Case(scheme="W8A16", spoilt="scales"),
    Case(model="qwen3_moe", spoilt="weight_nibbles"),
    Case(scheme="MXFP4_RCEIL", spoilt="inputs_by_floor"),
    Case(scheme="MXFP4", spoilt="mx_nibbles"),
    *(Case(format="auto_gptq", options=ASYM, spoilt=s) for s in ("zeros_as_gptq_v2", "group_index")),
    *(Case(format=f, spoilt=s) for f in ("auto_gptq", "auto_awq") for s in ("weight_nibbles", "scales")),
    Case(format="llm_compressor", scheme="MXFP4", dtype="bfloat16", spoilt="mx_nibbles"),
    Case(format="llm_compressor", scheme="MXFP8", loader="dequantize", spoilt="mx_scales"),
    *(Case(format="llm_compressor", scheme=s, dtype="bfloat16", spoilt="mx_nibbles") for s in ("W4A16", "NVFP4A16")),
    Case(format="llm_compressor", scheme="FP8_DYNAMIC", dtype="bfloat16", spoilt="scales_of_rows"),
    Case(format="llm_compressor", scheme="FP8_DYNAMIC", dtype="bfloat16", options=CACHED, spoilt="cache_scales"),
    Case(format="llm_compressor", scheme="NVFP4", dtype="bfloat16", spoilt="input_floats"),
    Case(format="fp8", scheme="FP8_BLOCK", dtype="bfloat16", spoilt="scales_of_blocks"),
    *(Case(format="bnb", scheme="NF4", dtype="bfloat16", spoilt=s) for s in ("bnb_nibbles", "bnb_scales")),
    *(Case(format="hqq", loader="hqq", spoilt=s) for s in ("hqq_codes", "hqq_zeros")),
    *(Case(format="mlx", loader="mlx", spoilt=s) for s in ("mlx_nibbles", "scales", "mlx_biases")),
)
RENAMED = "its model has gate_proj, up_proj, down_proj and no way to find them under w1, w3, w2"
KERNEL = "its 4-bit CPU kernel takes whole groups of 32, 64, 128 or 256; `backend='torch'` does without it"
ROWS = "it takes the scales of 8-bit float experts for one a row"
UNPACKED_ZEROS = "transformers 5.23 expects zero points that are not packed, unless told to dequantize"
WHOLE_BLOCKS = "decoding, it divides a matrix evenly among its scales"
ONE = "it decodes all layers by one group of the config"
FUSED = "transformers holds the experts in one tensor, which optimum and its AWQ route leave uninitialised"
LIMITS = (
    Case(format="bnb", scheme="NF4", dtype="float16", model="opt", limit="it stops at an assertion"),
    Case(format="hqq", limit="transformers 5 has no HQQ"),
    Case(format="bnb", scheme="NF4", dtype="bfloat16", options=HEAD, limit="transformers keeps the head"),
    Case(format="bnb", scheme="NF4", dtype="bfloat16", model="qwen3_moe", limit=FUSED),
    Case(scheme="FP8_BLOCK", dtype="bfloat16", limit="it compares its own group size, a pair, with a number"),
    Case(scheme="FPW8A16", dtype="bfloat16", limit="it refuses its own group size, 0"),
    Case(model="mixtral", limit=RENAMED),
    Case(model="llama_odd", limit="without whole groups it falls to a class for simulation, which fails"),
    Case(format="auto_gptq", options=MIXED, limit="optimum does not read `dynamic`"),
    Case(format="auto_gptq", options=HEAD, limit="optimum looks into the blocks only"),
    Case(format="auto_gptq", model="opt_narrow", limit="optimum looks into the blocks only"),
    Case(format="auto_gptq", model="qwen3_moe", limit=FUSED),
    Case(format="auto_gptq", options={"group_size": -1}, limit=KERNEL),
    Case(format="auto_gptq", options={"group_size": 96}, limit="it knows no other group sizes than powers of two"),
    Case(format="auto_gptq", **OWN, options=ASYM, limit="it takes zero points from files of its own making only"),
    Case(format="auto_gptq", **OWN, model="mixtral", limit=RENAMED),
    Case(format="auto_gptq", **OWN, model="llama_odd", limit=KERNEL),
    Case(format="auto_awq", options=HEAD, limit="transformers always keeps the head"),
    Case(format="auto_awq", model="qwen3_moe", limit=FUSED),
    Case(format="auto_awq", options={"group_size": -1}, limit=KERNEL),
    Case(format="auto_awq", **OWN, options=KEPT, limit="it does not read `modules_to_not_convert`"),
    Case(format="llm_compressor", scheme="W4A16_ASYM", dtype="bfloat16", limit=UNPACKED_ZEROS),
    Case(format="llm_compressor", scheme="NVFP4A16", limit="it decodes to bfloat16, whatever dtype the model has"),
    Case(format="fp8", scheme="FP8_BLOCK", dtype="bfloat16", model="llama_odd", limit=WHOLE_BLOCKS),
    Case(format="llm_compressor", scheme="MXFP8", model="qwen3_moe", loader="dequantize", limit=ROWS),
    Case(format="llm_compressor", scheme="MXFP4", options=MX_MIXED, loader="dequantize", limit=ONE),
)
PLAIN: Mapping[str, dict[str, Any]] = {  # how plain cases of a format are loaded
    "llm_compressor": {"dtype": "bfloat16"},
    "fp8": {"dtype": "bfloat16"},
    "fake": {"dtype": "bfloat16"},
    "bnb": {"dtype": "bfloat16"},
    "mlx": {"loader": "mlx"},
    "auto_round:mlx": {"loader": "mlx"},
    "hqq": {"loader": "hqq"},
}


def cell_of(case: Case) -> tuple[str, str] | None:
    """(format, scheme) that a case is in; None where it is a mix."""
    if case.scheme in MIXES:
        return None
    fields = {key: value for key, value in case.options.items() if key in ("bits", "group_size", "sym")}
    return case.format, Scheme.parse(case.scheme).altered(**fields).name


def cells() -> list[tuple[str, str]]:
    """All cells of the support matrix that are no format's in ELSEWHERE."""
    stored = [(name, scheme) for scheme, formats in support_rows() for name, why in formats.items() if why is None]
    return [cell for cell in stored if cell[0] not in ELSEWHERE]


def plain() -> list[Case]:
    """Cells that no other case is in and that are not said to be out of reach."""
    done = {cell_of(case) for case in WRITTEN}
    left = [cell for cell in cells() if cell not in done and cell not in NOT_LOADED]
    return [Case(format=name, scheme=scheme, **PLAIN.get(name, {})) for name, scheme in left]


LOADED = (*WRITTEN, *plain())
CASES = (*LOADED, *CONTROLS, *LIMITS)

Result = dict[str, Any]
