"""Synthetic checkpoints for speed and memory: real layout and names, seeded random weights with a few outlier columns.

    python benchmarks/synthetic.py OUT [--shape qwen3-0.6b] [--layers N] [--vocabulary N] [--shard-mb 500]

The shape is Qwen3-0.6B's unless another is named (28 layers, 1.2 GB of bf16, tied head). The weights carry no accuracy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a model of the Llama or Qwen3 layout is made of."""

    model_type: str = "qwen3"
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int = 128
    layers: int
    vocabulary: int
    tied: bool = True

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape, in file order."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            yield at + "input_layernorm.weight", (self.hidden,)
            yield at + "self_attn.q_proj.weight", (self.heads * self.head, self.hidden)
            yield at + "self_attn.k_proj.weight", (self.kv_heads * self.head, self.hidden)
            yield at + "self_attn.v_proj.weight", (self.kv_heads * self.head, self.hidden)
            yield at + "self_attn.o_proj.weight", (self.hidden, self.heads * self.head)
            if self.model_type == "qwen3":
                yield at + "self_attn.q_norm.weight", (self.head,)
                yield at + "self_attn.k_norm.weight", (self.head,)
            yield at + "post_attention_layernorm.weight", (self.hidden,)
            yield at + "mlp.gate_proj.weight", (self.inner, self.hidden)
            yield at + "mlp.up_proj.weight", (self.inner, self.hidden)
            yield at + "mlp.down_proj.weight", (self.hidden, self.inner)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, object]:
        """A config.json that transformers builds the model from."""
        return {
            "architectures": [{"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[self.model_type]],
            "attention_bias": False,
            "dtype": "bfloat16",
            "head_dim": self.head,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "max_position_embeddings": 32768,
            "model_type": self.model_type,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocabulary,
        }


SHAPES = {
    "qwen3-0.6b": Shape(hidden=1024, inner=3072, heads=16, kv_heads=8, layers=28, vocabulary=151936),
    "qwen3-1.7b": Shape(hidden=2048, inner=6144, heads=16, kv_heads=8, layers=28, vocabulary=151936),
    "llama-1b": Shape(
        model_type="llama", hidden=2048, inner=8192, heads=32, kv_heads=8, head=64, layers=16, vocabulary=128256
    ),
    "llama-8b": Shape(
        model_type="llama", hidden=4096, inner=14336, heads=32, kv_heads=8, layers=32, vocabulary=128256, tied=False
    ),
}


def make(folder: Path, made: Shape, shard_bytes: int = 500_000_000, seed: int = 0) -> Path:
    """Write a checkpoint, one shard in memory at a time; an existing one of the same make is kept."""
    stamp = folder / "config.json"
    if stamp.exists() and json.loads(stamp.read_text()) == made.config():
        return folder
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in made.tensors():
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
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    stamp.write_text(json.dumps(made.config()))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--layers", type=int, help="in place of the shape's own")
    parser.add_argument("--vocabulary", type=int, help="in place of the shape's own")
    parser.add_argument("--shard-mb", type=int, default=500)
    arguments = parser.parse_args()
    wished = {name: getattr(arguments, name) for name in ("layers", "vocabulary") if getattr(arguments, name)}
    print(make(arguments.out, replace(SHAPES[arguments.shape], **wished), arguments.shard_mb * 1_000_000))
