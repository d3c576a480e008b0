"""Run by the environment of xllamacpp: GGUF files as others read and write them.

gguf_files.py read FILE      what the gguf package, and llama.cpp itself, see in a file, as JSON
gguf_files.py write FILE     a file by the gguf package
"""

import ctypes
import hashlib
import json
import sys

import gguf
import numpy as np
import xllamacpp


class Parameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def seen_by_llama(path: str) -> dict[str, object]:
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, Parameters]
    context = library.gguf_init_from_file(path.encode(), Parameters(True, None))
    if not context:
        return {}
    found = {}
    for name in ("n_tensors", "n_kv", "alignment", "data_offset"):
        function = library[f"gguf_get_{name}"]
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_void_p]
        found[name] = function(context)
    return found


def read(path: str) -> None:
    reader = gguf.GGUFReader(path)
    values = {}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            content = field.contents()
            values[key] = [[kind.name for kind in field.types], content]
    tensors = {
        each.name: [
            each.tensor_type.name,
            [int(axis) for axis in reversed(each.shape.tolist())],
            hashlib.sha256(each.data.tobytes()).hexdigest(),
        ]
        for each in reader.tensors
    }
    json.dump({"values": values, "tensors": tensors, "llama": seen_by_llama(path)}, sys.stdout)


def write(path: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "ü"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.0, -2.5])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    values = np.arange(512, dtype=np.float32).reshape(2, 256)
    writer.add_tensor("float.weight", values)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blocks.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    {"read": read, "write": write}[sys.argv[1]](sys.argv[2])
