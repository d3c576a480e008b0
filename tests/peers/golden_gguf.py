"""GGUF files made by llama.cpp's own converter and quantizer, and what its reader decodes them to.

Executed by the interpreter of the environment `.peers/llama-cpp` (llama.cpp's source and its library, built), started
by `make_golden.py`.

Usage: python golden_gguf.py SOURCE OUT ROWS MIXTURE=NUMBER ...

SOURCE is a model's folder. OUT gets MIXTURE.gguf, and MIXTURE.npz: the first ROWS rows of every quantized tensor,
float32, by its name in the file.
"""

import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main(source: str, out: str, rows: int, mixtures: list[str]) -> None:
    import gguf

    whole = str(Path(source) / "f32.gguf")
    llama_cpp.convert(source, whole, "f32")
    for mixture in mixtures:
        name, _, number = mixture.partition("=")
        path = Path(out) / f"{name}.gguf"
        llama_cpp.quantize(whole, str(path), "none", number)
        decoded = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)[:rows]
            for tensor in gguf.GGUFReader(path).tensors
            if tensor.tensor_type.name not in ("F32", "F16", "BF16")
        }
        np.savez_compressed(path.with_suffix(".npz"), **decoded)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
