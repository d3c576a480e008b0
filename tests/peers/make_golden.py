"""Write the golden files of `tests/data/golden` anew: checkpoints made by other tools, and what these decode them to.

Usage: PYTHONPATH=src:tests python tests/peers/make_golden.py [NAME ...]

Each comes from a picoscopic model and the program `golden_NAME.py`, run in the environment of that tool. GGUF files,
written by llama.cpp's converter and quantizer, are in `tests/data/golden_gguf`.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from formats.gguf_golden import GGUF, gguf_source
from models.pico import build
from peers.make_models import write_tokenizer
from roundel.formats.gguf.mixtures import FILE_TYPES

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "data" / "golden"
PEERS = HERE.parents[1] / ".peers"
ENVIRONMENTS = {"mlx": "mlx", "bnb": "bnb", "gptq": "gptqmodel", "hqq": "hqq", "gguf": "llama-cpp"}
ROWS = 16  # of each decoded matrix
MODEL = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 32, "num_hidden_layers": 1}


def gguf() -> None:
    out = GOLDEN.with_name("golden_gguf")
    out.mkdir(exist_ok=True)
    for model_type, hidden, mixtures in GGUF:
        with tempfile.TemporaryDirectory() as folder:
            source = gguf_source(model_type, hidden, Path(folder) / "pico")
            wishes = [f"{mixture}={FILE_TYPES[mixture]}" for mixture in mixtures.split()]
            python = PEERS / ENVIRONMENTS["gguf"] / "bin" / "python"
            subprocess.run([python, HERE / "golden_gguf.py", source, out, "4", *wishes], check=True)


def main(names: list[str]) -> None:
    for name in names or ENVIRONMENTS:
        if name == "gguf":
            gguf()
            continue
        out = GOLDEN / name
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            source = build("llama", Path(folder), dtype="float16", **MODEL)
            write_tokenizer(source)  # GPTQModel does not load a model without one
            python = PEERS / ENVIRONMENTS[name] / "bin" / "python"
            subprocess.run([python, HERE / f"golden_{name}.py", source, out, str(ROWS)], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
