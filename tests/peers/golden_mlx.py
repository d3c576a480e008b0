"""A checkpoint made by mlx-lm itself in all its modes, and what MLX decodes it to.

Executed by the interpreter of the environment `.peers/mlx`, started by `make_golden.py`.

Usage: python golden_mlx.py SOURCE OUT ROWS

OUT gets config.json, model.safetensors as `mlx_lm.convert` saves them, and decoded.safetensors: the first ROWS rows of
every quantized matrix, float32, by module name.
"""

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

MODES: dict[str, Any] = {
    "self_attn.q_proj": {"bits": 2, "group_size": 32, "mode": "affine"},
    "self_attn.k_proj": {"bits": 3, "group_size": 64, "mode": "affine"},
    "self_attn.v_proj": {"bits": 5, "group_size": 64, "mode": "affine"},
    "self_attn.o_proj": {"bits": 6, "group_size": 32, "mode": "affine"},
    "mlp.gate_proj": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "mlp.up_proj": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    "mlp.down_proj": {"bits": 8, "group_size": 128, "mode": "affine"},
    "lm_head": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
    "embed_tokens": {"bits": 4, "group_size": 64, "mode": "affine"},
}


def main(source: str, out: str, rows: int) -> None:
    model, config = load_model(Path(source))
    model, config = quantize_model(model, config, 64, 4, quant_predicate=lambda path, _: mode_of(path))
    save_model(Path(out), model, donate_model=False)
    save_config(config, Path(out) / "config.json")
    (Path(out) / "model.safetensors.index.json").unlink()
    decoded = {}
    for path, module in tree_flatten(model.leaf_modules(), is_leaf=lambda found: hasattr(found, "parameters")):
        if hasattr(module, "scales"):
            scales, biases = module["scales"], module.get("biases")
            if biases is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode, "dtype": mx.float32}
            decoded[path] = mx.dequantize(module["weight"], scales, biases, **how)[:rows]
    mx.save_safetensors(str(Path(out) / "decoded.safetensors"), decoded)


def mode_of(path: str) -> Any:
    return next(mode for ending, mode in MODES.items() if path.endswith(ending))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
