"""Quantize a folder with llm-compressor. Executed by the interpreter of its own environment.

Usage: python run_llm_compressor.py SOURCE OUT SCHEME              its model-free route
       python run_llm_compressor.py SOURCE OUT SCHEME TOKENS.json  on token ids, a list for each sample, with scales of
                                                                   keys and values in FP8
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

KEPT = ["lm_head", "re:.*embed_tokens"]
# Its default observer averages over samples; this one takes the largest of all, as it does itself for NVFP4's inputs.
CACHE = {
    "observer": "static_minmax",
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "dynamic": False,
    "symmetric": True,
}


def without_data(source: str, out: str, scheme: str) -> None:
    from llmcompressor import model_free_ptq

    model_free_ptq(source, out, scheme=scheme, ignore=KEPT, max_workers=1, device="cpu")


def calibrated(source: str, out: str, scheme: str, tokens: str) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    samples = json.loads(Path(tokens).read_text())
    recipe = QuantizationModifier(targets=["Linear"], scheme=scheme, ignore=KEPT, kv_cache_scheme=CACHE)
    oneshot(
        model=model,
        dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]),
        recipe=recipe,
        num_calibration_samples=len(samples),
        max_seq_length=len(samples[0]),
    )
    model.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    (calibrated if len(sys.argv) > 4 else without_data)(*sys.argv[1:])
