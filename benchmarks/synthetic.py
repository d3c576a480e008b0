"""Synthetic checkpoints for speed and memory: real layout and names, seeded random weights with a few outlier columns.

    python benchmarks/synthetic.py OUT [--layers 28] [--shard-mb 500]

The shape is Qwen3-0.6B's (28 layers, 1.2 GB of bf16, tied head). The weights carry no accuracy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY = 1024, 3072, 16, 8, 128, 151936


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, in file order."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (HIDDEN,)
        yield at + "self_attn.q_proj.weight", (HEADS * HEAD, HIDDEN)
        yield at + "self_attn.k_proj.weight", (KV_HEADS * HEAD, HIDDEN)
        yield at + "self_attn.v_proj.weight", (KV_HEADS * HEAD, HIDDEN)
        yield at + "self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD)
        yield at + "self_attn.q_norm.weight", (HEAD,)
        yield at + "self_attn.k_norm.weight", (HEAD,)
        yield at + "post_attention_layernorm.weight", (HIDDEN,)
        yield at + "mlp.gate_proj.weight", (INNER, HIDDEN)
        yield at + "mlp.up_proj.weight", (INNER, HIDDEN)
        yield at + "mlp.down_proj.weight", (HIDDEN, INNER)
    yield "model.norm.weight", (HIDDEN,)


def config(layers: int) -> dict[str, object]:
    """A config.json that transformers builds a Qwen3 from."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": HEAD,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "max_position_embeddings": 32768,
        "model_type": "qwen3",
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vocab_size": VOCABULARY,
    }


def make(folder: Path, layers: int = 28, shard_bytes: int = 500_000_000, seed: int = 0) -> Path:
    """Write a checkpoint, one shard in memory at a time; an existing one of the same make is kept."""
    stamp = folder / "config.json"
    if stamp.exists() and json.loads(stamp.read_text()) == config(layers):
        return folder
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes(layers):
        count = 2 * torch.Size(shape).numel()
        if shards[-1] and filled + count > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += count
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in shard.items():
            weight = torch.ones(shape)
            if len(shape) == 2:
                weight.normal_(0, 0.02, generator=generator)
                weight[:, torch.randint(0, shape[1], (max(1, shape[1] // 256),), generator=generator)] *= 8
            tensors[name] = weight.to(torch.bfloat16)
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    stamp.write_text(json.dumps(config(layers)))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--shard-mb", type=int, default=500)
    arguments = parser.parse_args()
    print(make(arguments.out, arguments.layers, arguments.shard_mb * 1_000_000))
