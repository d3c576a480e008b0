"""The picoscopic models of which `tests/data/golden_gguf` holds files, and in which of llama.cpp's mixtures."""

from __future__ import annotations

from pathlib import Path

from formats.test_gguf import tokenized
from models.pico import build

__all__ = ["GGUF", "gguf_source"]

GGUF = (  # model type, columns of most matrices, mixtures
    ("llama", 32, "q4_0 q4_1 q5_0 q5_1 q8_0 iq4_nl"),
    ("llama", 256, "q2_k q3_k_m q5_k_m iq4_xs tq1_0 tq2_0"),
    ("qwen3_moe", 32, "mxfp4_moe"),
    ("deepseek_v3", 32, "q4_k_m"),
)
DEEPSEEK = {"num_key_value_heads": 2, "first_k_dense_replace": 0, "head_dim": 32, "scoring_func": "sigmoid"}
SIZES = {"intermediate_size": 32, "moe_intermediate_size": 32, "head_dim": 16, "num_attention_heads": 2}


def gguf_source(model_type: str, hidden: int, folder: Path) -> Path:
    """The model itself."""
    more = {"num_key_value_heads": 1, "vocab_size": 32, "num_hidden_layers": 1, "norm_topk_prob": True}
    more |= DEEPSEEK if model_type == "deepseek_v3" else {}
    return tokenized(build(model_type, folder, **{"hidden_size": hidden, **SIZES, **more}))
