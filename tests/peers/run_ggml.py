"""Run by the environment of xllamacpp: ggml's own rounding of matrices, and its own decoding.

    run_ggml.py IN.npz OUT.npz TYPE ...

IN holds matrices [out, in] float32, and for `NAME` perhaps `NAME.imatrix` [in]. OUT: `NAME/TYPE`, the bytes
[out, bytes of a row], and `NAME/TYPE/decoded`, what ggml reads in them.
"""

import ctypes
import sys

import gguf
import numpy as np
import xllamacpp

LIBRARY = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
FLOATS = ctypes.POINTER(ctypes.c_float)
LIBRARY.ggml_quantize_chunk.restype = ctypes.c_size_t
LIBRARY.ggml_quantize_chunk.argtypes = [
    ctypes.c_int, FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, FLOATS,
]  # fmt: skip


def pointer(values: np.ndarray) -> ctypes.POINTER(ctypes.c_float):
    return values.ctypes.data_as(FLOATS)


def quantize(name: str, weight: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, width = weight.shape
    packed = np.empty((rows, width // block * size), np.uint8)
    given = None if importance is None else pointer(importance)
    LIBRARY.ggml_quantize_init(int(kind))
    written = LIBRARY.ggml_quantize_chunk(int(kind), pointer(weight), packed.ctypes.data, 0, rows, width, given)
    assert written == packed.nbytes
    return packed


def decode(name: str, packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    function = "_".join(part if part == "K" else part.lower() for part in name.split("_"))
    values = np.empty(shape, np.float32)
    work = LIBRARY[f"dequantize_row_{function}"]
    work.restype = None
    work(ctypes.c_void_p(packed.ctypes.data), pointer(values), ctypes.c_int64(values.size))
    return values


def main() -> None:
    given = np.load(sys.argv[1])
    found = {}
    for key in given.files:
        if key.endswith(".imatrix"):
            continue
        weight = np.ascontiguousarray(given[key], np.float32)
        importance = given[f"{key}.imatrix"] if f"{key}.imatrix" in given.files else None
        for name in sys.argv[3:]:
            packed = quantize(name, weight, importance)
            found[f"{key}/{name}"] = packed
            found[f"{key}/{name}/decoded"] = decode(name, packed, weight.shape)
    np.savez_compressed(sys.argv[2], **found)


if __name__ == "__main__":
    main()
