"""Run by the environment of llama.cpp's source: its quantizer with a number of threads.

llama_cpp_quantize.py IN.gguf OUT.gguf FILE_TYPE THREADS
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "peers"))
from llama_cpp import quantize

if __name__ == "__main__":
    quantize(sys.argv[1], sys.argv[2], "none", sys.argv[3], threads=int(sys.argv[4]))
