"""Seeded pico checkpoints of real architectures, for comparisons with other quantizers.

Every checkpoint is written tensor by tensor under the names a published one has, so it does not depend on any version
of a modelling library. A tensor's values depend on its name alone, so checkpoints of different dtypes agree up to
rounding. The first rows of every linear weight hold the groups that quantizers get wrong: all zero, a tie between the
extremes, values so small that the scale reaches its floor, one lone outlier, one sign only.

Usage: python make_models.py DIRECTORY [NAME ...]
"""

import json
import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
Config = dict[str, object]

VOCAB = 512
BLOCK = 128  # rows and columns that share one scale in an FP8 source


def noise(name: str, shape: tuple[int, ...]) -> Tensor:
    """Float32 values that depend on `name` and `shape` only."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def linear_weight(name: str, shape: tuple[int, int]) -> Tensor:
    """A weight `[out, in]` whose first five rows begin with the hard groups."""
    weight = noise(name, shape) * 0.04
    if len(weight) < 8:  # a router
        return weight
    weight[0, :128] = 0.0
    weight[1, :128] = weight[1, :128].clamp(-0.03, 0.03)
    weight[1, 3], weight[1, 5] = 0.0625, -0.0625
    weight[2, :128] *= 1e-5
    weight[3, 7] = 3.0
    weight[4, :128] = weight[4, :128].abs() + 0.01
    return weight


def values(name: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor called `name`."""
    if len(shape) == 1:
        return noise(name, shape) * 0.02 + (0.0 if name.endswith("bias") else 1.0)
    rows, columns = shape
    return noise(name, shape) * 0.1 if "embed" in name else linear_weight(name, (rows, columns))


def write_tokenizer(directory: Path) -> None:
    """A word-level tokenizer of `VOCAB` words, for tools that insist on one."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{index}": index for index in range(3, VOCAB)}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": word, **special} for word, index in list(vocabulary.items())[:3]],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "model_max_length": 512,
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_checkpoint(directory: Path, config: Config, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Write config, tokenizer and `shards` safetensors files of nearly equal numbers of tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}, indent=2))
    write_tokenizer(directory)
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    size = math.ceil(len(names) / shards)
    files = {name: f"model-{i // size + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({n: tensors[n] for n in names if files[n] == file}, directory / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def attention_shapes(prefix: str, hidden: int, kv: int) -> Shapes:
    return {
        f"{prefix}.q_proj.weight": (hidden, hidden),
        f"{prefix}.k_proj.weight": (kv, hidden),
        f"{prefix}.v_proj.weight": (kv, hidden),
        f"{prefix}.o_proj.weight": (hidden, hidden),
    }


def mlp_shapes(prefix: str, hidden: int, inner: int, names: tuple[str, str, str]) -> Shapes:
    gate, up, down = names
    return {
        f"{prefix}.{gate}.weight": (inner, hidden),
        f"{prefix}.{up}.weight": (inner, hidden),
        f"{prefix}.{down}.weight": (hidden, inner),
    }


def decoder_shapes(hidden: int, tied: bool, layers: int) -> Shapes:
    """What llama-like decoders have besides attention and MLP."""
    shapes: Shapes = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
    return shapes if tied else shapes | {"lm_head.weight": (VOCAB, hidden)}


def decoder_config(architecture: str, model_type: str, hidden: int, inner: int, dtype: str, tied: bool) -> Config:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "hidden_act": "silu",
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
    }


def llama(hidden: int, inner: int, dtype: str, tied: bool) -> tuple[Config, Shapes]:
    shapes = decoder_shapes(hidden, tied, layers=2)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= attention_shapes(f"{prefix}.self_attn", hidden, hidden // 2)
        shapes |= mlp_shapes(f"{prefix}.mlp", hidden, inner, ("gate_proj", "up_proj", "down_proj"))
    return decoder_config("LlamaForCausalLM", "llama", hidden, inner, dtype, tied), shapes


def qwen3_moe() -> tuple[Config, Shapes]:
    hidden, inner, experts = 256, 128, 4
    config = decoder_config("Qwen3MoeForCausalLM", "qwen3_moe", hidden, 512, "bfloat16", tied=False)
    config |= {
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": inner,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-06,
    }
    shapes = decoder_shapes(hidden, tied=False, layers=2)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= attention_shapes(f"{prefix}.self_attn", hidden, hidden // 2)
        shapes |= {f"{prefix}.self_attn.{norm}.weight": (hidden // 4,) for norm in ("q_norm", "k_norm")}
        shapes[f"{prefix}.mlp.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            names = ("gate_proj", "up_proj", "down_proj")
            shapes |= mlp_shapes(f"{prefix}.mlp.experts.{expert}", hidden, inner, names)
    return config, shapes


def mixtral() -> tuple[Config, Shapes]:
    hidden, inner, experts = 256, 128, 4
    config = decoder_config("MixtralForCausalLM", "mixtral", hidden, inner, "bfloat16", tied=False)
    config |= {"num_local_experts": experts, "num_experts_per_tok": 2, "sliding_window": None}
    shapes = decoder_shapes(hidden, tied=False, layers=2)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= attention_shapes(f"{prefix}.self_attn", hidden, hidden // 2)
        shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            shapes |= mlp_shapes(f"{prefix}.block_sparse_moe.experts.{expert}", hidden, inner, ("w1", "w3", "w2"))
    return config, shapes


def opt() -> tuple[Config, Shapes]:
    hidden, inner = 256, 512
    config: Config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": hidden,
        "ffn_dim": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": hidden,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }
    shapes: Shapes = {
        "model.decoder.embed_tokens.weight": (VOCAB, hidden),
        "model.decoder.embed_positions.weight": (512 + 2, hidden),
    }
    norms = ["model.decoder.final_layer_norm"]
    linears: dict[str, tuple[int, int]] = {}
    for layer in range(2):
        prefix = f"model.decoder.layers.{layer}"
        norms += [f"{prefix}.self_attn_layer_norm", f"{prefix}.final_layer_norm"]
        linears |= {
            f"{prefix}.self_attn.{name}": (hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        }
        linears |= {f"{prefix}.fc1": (inner, hidden), f"{prefix}.fc2": (hidden, inner)}
    for norm in norms:
        shapes |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    for linear, (rows, columns) in linears.items():
        shapes |= {f"{linear}.weight": (rows, columns), f"{linear}.bias": (rows,)}
    return config, shapes


def rwkv() -> tuple[Config, Shapes]:
    """A decoder with a linear layer called `output` in every block."""
    hidden, inner = 256, 512
    config: Config = {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "hidden_size": hidden,
        "attention_hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "vocab_size": VOCAB,
        "context_length": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shapes: Shapes = {"rwkv.embeddings.weight": (VOCAB, hidden), "head.weight": (VOCAB, hidden)}
    norms = ["rwkv.ln_out", "rwkv.blocks.0.pre_ln"]
    for layer in range(2):
        prefix = f"rwkv.blocks.{layer}"
        norms += [f"{prefix}.ln1", f"{prefix}.ln2"]
        for name in ("key", "value", "receptance", "output"):
            shapes[f"{prefix}.attention.{name}.weight"] = (hidden, hidden)
        shapes[f"{prefix}.feed_forward.key.weight"] = (inner, hidden)
        shapes[f"{prefix}.feed_forward.receptance.weight"] = (hidden, hidden)
        shapes[f"{prefix}.feed_forward.value.weight"] = (hidden, inner)
        shapes |= {f"{prefix}.attention.{name}": (hidden,) for name in ("time_decay", "time_first")}
    for norm in norms:
        shapes |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    return config, shapes


def to_fp8_blocks(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes in float8_e4m3fn `[out, in]` and one scale per 128 x 128 block; weight is codes times scale."""
    rows, columns = weight.shape
    high, wide = math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)
    padded = torch.zeros(high * BLOCK, wide * BLOCK)
    padded[:rows, :columns] = weight
    blocks = padded.reshape(high, BLOCK, wide, BLOCK)
    scale = (blocks.abs().amax(dim=(1, 3)) / 448.0).clamp_min(1e-12).to(scale_dtype)
    codes = (blocks / scale.float()[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.float().reshape(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scale


def write_plain(directory: Path, built: tuple[Config, Shapes], shards: int = 1) -> None:
    config, shapes = built
    dtype = getattr(torch, str(config["torch_dtype"]))
    write_checkpoint(directory, config, {name: values(name, shape).to(dtype) for name, shape in shapes.items()}, shards)


def write_fp8(directory: Path, hidden: int, inner: int, scale_dtype: torch.dtype) -> None:
    """A llama whose decoder linears are stored as DeepSeek stores them."""
    config, shapes = llama(hidden, inner, "bfloat16", tied=False)
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if "_proj." in name:
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8_blocks(values(name, shape), scale_dtype)
        else:
            tensors[name] = values(name, shape).to(torch.bfloat16)
    write_checkpoint(directory, config, tensors)


MODELS: dict[str, Callable[[Path], None]] = {
    "llama_bf16": lambda path: write_plain(path, llama(256, 512, "bfloat16", tied=False)),
    "llama_fp16": lambda path: write_plain(path, llama(256, 512, "float16", tied=False)),
    "llama_fp32": lambda path: write_plain(path, llama(256, 512, "float32", tied=False)),
    "llama_tied": lambda path: write_plain(path, llama(256, 512, "bfloat16", tied=True)),
    "llama_shards": lambda path: write_plain(path, llama(256, 512, "bfloat16", tied=False), shards=3),
    # in features 192 and 352: multiples of 32, not of 128
    "llama_odd": lambda path: write_plain(path, llama(192, 352, "bfloat16", tied=False)),
    # intermediate 340: a multiple of 4 only
    "llama_ragged": lambda path: write_plain(path, llama(192, 340, "bfloat16", tied=False)),
    "qwen3_moe": lambda path: write_plain(path, qwen3_moe()),
    "mixtral": lambda path: write_plain(path, mixtral()),
    "opt": lambda path: write_plain(path, opt()),
    "rwkv": lambda path: write_plain(path, rwkv()),
    "llama_fp8": lambda path: write_fp8(path, 256, 512, torch.float32),
    # intermediate 448: the last block of rows or columns is half full
    "llama_fp8_bf16_scale": lambda path: write_fp8(path, 256, 448, torch.bfloat16),
}


def main(directory: str, *names: str) -> None:
    for name in names or tuple(MODELS):
        MODELS[name](Path(directory) / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
