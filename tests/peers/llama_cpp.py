"""Run by the environment of llama.cpp's source: its converter and its quantizer.

llama_cpp.py convert FOLDER OUT.gguf TYPE      convert_hf_to_gguf.py; TYPE is f32, f16, bf16, q8_0 or auto
llama_cpp.py quantize IN OUT IMPORTANCE TYPE …  llama_model_quantize, for each number of a file type, to OUT with its {}
                                               as that number; IMPORTANCE is "none", "ones" for a matrix of ones, or an
                                               importance-matrix file in GGUF
llama_cpp.py see FILE.gguf …                   what is in files, as JSON

A tokenizer that the converter does not know is called "gpt-2": it would refuse the tokenizers of small test models.
"""

import ctypes
import hashlib
import json
import sys
from pathlib import Path

SOURCE = Path(sys.executable).parents[1] / "llama.cpp"
LIBRARY = Path(sys.executable).parents[1] / "build" / "bin" / "libllama.so"
sys.path[1:1] = [str(SOURCE), str(SOURCE / "gguf-py")]


def convert(folder: str, out: str, kind: str) -> None:
    import convert_hf_to_gguf
    from conversion.base import TextModel

    name_of = TextModel.get_vocab_base_pre

    def known_or_plain(self, tokenizer):
        try:
            return name_of(self, tokenizer)
        except NotImplementedError:
            return "gpt-2"

    TextModel.get_vocab_base_pre = known_or_plain
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", kind]
    convert_hf_to_gguf.main()


class Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class Parameters(ctypes.Structure):
    """llama_model_quantize_params of include/llama.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *((name, ctypes.c_bool) for name in ("requantize", "output", "only_copy", "pure", "keep_split", "dry_run")),
        ("imatrix", ctypes.POINTER(Importance)),
        *((name, ctypes.c_void_p) for name in ("kv_overrides", "tt_overrides", "prune_layers")),
        ("max_buf_size", ctypes.c_size_t),
    )


def quantize(path: str, out: str, importance: str, *file_types: str, threads: int = 1) -> None:
    library = ctypes.CDLL(str(LIBRARY))
    library.llama_model_quantize_default_params.restype = Parameters
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    for file_type in file_types:
        parameters = library.llama_model_quantize_default_params()
        parameters.nthread, parameters.ftype = threads, int(file_type)
        if importance != "none":
            parameters.imatrix = ones(path) if importance == "ones" else told(importance)
        code = library.llama_model_quantize(path.encode(), out.format(file_type).encode(), ctypes.byref(parameters))
        print(json.dumps({"file_type": int(file_type), "failed": code}))


def ones(path: str) -> ctypes.Array:
    """An importance matrix that finds every column of every tensor as important."""
    import gguf

    entries = []
    for tensor in gguf.GGUFReader(path).tensors:
        shape = [int(axis) for axis in tensor.shape]
        size = shape[0] * (shape[2] if len(shape) > 2 else 1)
        entries.append(Importance(tensor.name.encode(), (ctypes.c_float * size)(*[1.0] * size), size))
    return (Importance * (len(entries) + 1))(*entries)


def told(path: str) -> ctypes.Array:
    """What llama-quantize makes of a file of importances: means, and ones where there was no token."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(path)
    kind = reader.fields["general.type"].contents()
    assert kind == "imatrix" and "imatrix.chunk_count" in reader.fields, kind
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    entries = []
    for name in (name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")):
        sums, counts = tensors[f"{name}.in_sum2"].data, tensors[f"{name}.counts"].data.reshape(-1, 1)
        assert sums.shape[0] == counts.shape[0], name
        values = (
            np.where(counts > 0, sums / np.maximum(counts, np.float32(1)), np.float32(1)).astype(np.float32).ravel()
        )
        entries.append(Importance(name.encode(), (ctypes.c_float * len(values))(*values), len(values)))
    return (Importance * (len(entries) + 1))(*entries)


def see(*paths: str) -> None:
    import gguf

    found = {}
    for path in paths:
        reader = gguf.GGUFReader(path)
        values = {
            key: [[kind.name for kind in field.types], field.contents()]
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        }
        tensors = {
            each.name: [
                each.tensor_type.name,
                [int(axis) for axis in reversed(each.shape.tolist())],
                hashlib.sha256(each.data.tobytes()).hexdigest(),
            ]
            for each in reader.tensors
        }
        found[path] = {"values": values, "tensors": tensors}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    {"convert": convert, "quantize": quantize, "see": see}[sys.argv[1]](*sys.argv[2:])
