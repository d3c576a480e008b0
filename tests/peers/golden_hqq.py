"""A checkpoint of HQQ's own layers, its zero points no whole numbers, and what HQQ decodes it to.

Executed by the interpreter of the environment `.peers/hqq`, started by `make_golden.py`.

Usage: python golden_hqq.py SOURCE OUT ROWS

transformers 5 cannot save HQQ models, so the layers are saved as transformers 4 does, by HQQLinear's own state_dict.
OUT gets config.json, model.safetensors, and decoded.safetensors: the first ROWS rows of every quantized matrix,
float32, by module name.
"""

import json
import sys
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import load_file, save_file

WIDTHS = {"q": (8, 64), "k": (6, 32), "v": (5, 32), "o": (4, 64), "gate": (3, 32), "up": (2, 16), "down": (1, 32)}


def main(source: str, out: str, rows: int) -> None:
    tensors, decoded = load_file(Path(source) / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        module, weight = name.removesuffix(".weight"), tensors.pop(name)
        bits, group = WIDTHS[module.rpartition(".")[2].removesuffix("_proj")]
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.float()
        config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
        layer = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        tensors |= {f"{module}.{part}": tensor for part, tensor in layer.state_dict().items()}
        decoded[module] = layer.dequantize()[:rows].float().contiguous()
    settings = json.loads((Path(source) / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "hqq",
        "quant_config": BaseQuantizeConfig(nbits=4, group_size=64, axis=1),
        "skip_modules": ["lm_head"],
    }
    (Path(out) / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(out) / "model.safetensors")
    save_file(decoded, Path(out) / "decoded.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
