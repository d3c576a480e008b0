"""Write tiny checkpoints with llm-compressor, and what compressed-tensors decodes them to: the golden files of
`tests/formats/test_golden.py`. Executed by the interpreter of llm-compressor's own environment.

Usage: python write_golden.py OUT

For each scheme OUT holds NAME.safetensors, the tensors of a layer, and in its metadata `config`, the
quantization_config; NAME.decoded.safetensors holds what the tool itself decodes it to, in bfloat16.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from make_models import VOCAB, write_tokenizer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

SCHEMES = (
    "W2A16", "W3A16", "W4A16", "W4A16_ASYM", "W8A16", "W8A8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16",
    "NVFP4", "MXFP4A16", "MXFP8A16",
)  # fmt: skip
LAYERS = ("model.layers.0.self_attn.k_proj",)  # [32, 128]
CALIBRATED = ("FP8", "NVFP4")


def write_model(folder: Path) -> None:
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1,
        head_dim=32, vocab_size=VOCAB, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)


def write(name: str, source: Path, out: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    ids = torch.randint(0, VOCAB, (16, 32), generator=torch.Generator().manual_seed(1)).tolist()
    rows = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * 32} for row in ids])
    data = {"dataset": rows, "num_calibration_samples": 16, "max_seq_length": 32} if name in CALIBRATED else {}
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=name, ignore=["lm_head"]), **data)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_compressed=True)
        tensors = load_file(Path(folder) / "model.safetensors")
        config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    scheme = next(iter(QuantizationConfig.model_validate(config).config_groups.values()))
    compressor = BaseCompressor.get_value_from_registry(scheme.format or config["format"])
    kept = {key: value for key, value in tensors.items() if key.startswith(tuple(f"{n}." for n in LAYERS))}
    decoded = {}
    for layer in LAYERS:
        parts = {key.removeprefix(f"{layer}."): value for key, value in kept.items() if key.startswith(f"{layer}.")}
        decoded[layer] = compressor.decompress(parts, scheme)["weight"].bfloat16().contiguous()
    save_file(kept, out / f"{name}.safetensors", metadata={"config": json.dumps(config)})
    save_file(decoded, out / f"{name}.decoded.safetensors")


def main(out: str) -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as source:
        write_model(Path(source))
        for name in SCHEMES:
            write(name, Path(source), folder)


if __name__ == "__main__":
    main(sys.argv[1])
