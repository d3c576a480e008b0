"""A checkpoint rounded and saved by GPTQModel, columns by activation and with zero points, and what it decodes it to.

Executed by the interpreter of the environment `.peers/gptqmodel`, started by `make_golden.py`.

Usage: python golden_gptq.py SOURCE OUT ROWS

OUT gets config.json and model.safetensors as GPTQModel saves them, and decoded.safetensors: the first ROWS rows of
every quantized matrix, by module name, from the modules that its plain torch backend loads, their scales in float32.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its loader asks for two workers of a pool that has one on two cores

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import save_file

VOCABULARY = 32


def main(source: str, out: str, rows: int) -> None:
    torch.manual_seed(0)
    samples = [
        {"input_ids": torch.randint(3, VOCABULARY, (32,)).tolist(), "attention_mask": [1] * 32} for _ in range(16)
    ]
    config = QuantizeConfig(
        bits=4, group_size=32, sym=False, desc_act=True, act_group_aware=False, device="cpu", offload_to_disk=False
    )
    model = GPTQModel.load(source, config, dtype=torch.float32)
    model.quantize(samples, batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(Path(folder) / name, out)
        # anew: a process that has quantized does not get done with loading
        subprocess.run([sys.executable, __file__, folder, out, str(rows), "decode"], check=True)
    os._exit(0)  # GPTQModel leaves threads behind that never end


def decode(folder: str, out: str, rows: int) -> None:
    loaded = GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=BACKEND.TORCH).model
    decoded = {}
    for name, module in loaded.named_modules():
        if hasattr(module, "qweight"):
            module.scales.data = module.scales.data.float()  # else it multiplies in float16
            decoded[name] = module.dequantize_weight().T[:rows].float().contiguous()
    save_file(decoded, Path(out) / "decoded.safetensors")
    os._exit(0)


if __name__ == "__main__":
    (decode if sys.argv[4:] else main)(sys.argv[1], sys.argv[2], int(sys.argv[3]))
