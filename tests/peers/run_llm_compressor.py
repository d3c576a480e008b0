"""Quantize folders with llm-compressor's model-free route. Executed by the interpreter of its own environment.

Usage: python run_llm_compressor.py SOURCE OUT SCHEME
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

from llmcompressor import model_free_ptq

if __name__ == "__main__":
    source, out, scheme = sys.argv[1:]
    model_free_ptq(source, out, scheme=scheme, ignore=["lm_head", "re:.*embed_tokens"], max_workers=1, device="cpu")
