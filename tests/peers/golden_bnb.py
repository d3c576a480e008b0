"""A checkpoint saved by transformers with bitsandbytes, and what bitsandbytes decodes it to.

Executed by the interpreter of the environment `.peers/bnb`, started by `make_golden.py`.

Usage: python golden_bnb.py SOURCE OUT ROWS

OUT gets config.json and model.safetensors as `save_pretrained` writes them (NF4, scales in 8 bits too), and
decoded.safetensors: the first ROWS rows of every quantized matrix, float32, by module name.
"""

import sys
from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main(source: str, out: str, rows: int) -> None:
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=how, device_map="cpu", dtype=torch.float32)
    model.save_pretrained(out)
    (Path(out) / "generation_config.json").unlink(missing_ok=True)
    decoded = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            decoded[name] = dequantize_4bit(module.weight.data, module.weight.quant_state)[:rows].contiguous()
    save_file(decoded, Path(out) / "decoded.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
