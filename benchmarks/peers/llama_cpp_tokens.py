"""Run by the environment of xllamacpp: tokens a second of llama.cpp on a model of random Q4_0 weights.

    python llama_cpp_tokens.py SHAPE.json FILE.gguf --threads 2 --tokens 32 --prompt 512 --head q4_0|f16

SHAPE.json holds a config.json of the Llama layout. The file is written when it is not there. Prints JSON: seconds of a
token that is written after a prompt of 16, the mean and that of the better run, and of reading the prompt; two runs.
"""

import argparse
import json
import time
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

GENERATOR = np.random.default_rng(0)


def q4_0(rows: int, columns: int) -> np.ndarray:
    """Random blocks of 32 weights: a float16 scale, and 16 bytes of codes."""
    blocks = GENERATOR.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
    blocks[:, :, :2] = np.array([0.003], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write(path: Path, config: dict, head: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv, vocabulary = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{n}" for n in range(vocabulary)])
    writer.add_token_merges(["t 0"])
    kind = gguf.GGMLQuantizationType.Q4_0
    if head == "f16":
        embedding = GENERATOR.standard_normal((vocabulary, hidden), np.float32).astype(np.float16)
        writer.add_tensor("token_embd.weight", embedding)
    else:
        writer.add_tensor("token_embd.weight", q4_0(vocabulary, hidden), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(config["num_hidden_layers"]):
        at = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{at}{name}.weight", np.ones(hidden, np.float32))
        shapes = {
            "attn_q": (heads * size, hidden), "attn_k": (kv * size, hidden), "attn_v": (kv * size, hidden),
            "attn_output": (hidden, heads * size), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }  # fmt: skip
        for name, shape in shapes.items():
            writer.add_tensor(f"{at}{name}.weight", q4_0(*shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--head", choices=("q4_0", "f16"), default="q4_0")
    arguments = parser.parse_args()
    if not arguments.file.exists():
        write(arguments.file, json.loads(arguments.config.read_text()), arguments.head)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(arguments.file)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 1024, 1, True
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = arguments.threads
    server = xllamacpp.Server(parameters)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter

    def seconds(length: int, tokens: int) -> float:
        """Of writing so many tokens after a prompt, which is another one each time, so that nothing is kept of it."""
        prompt = [int(t) for t in GENERATOR.integers(100, 30000, length)]
        wish = {"prompt": prompt, "n_predict": tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        started = clock()
        server.handle_completions(wish)
        return clock() - started

    tokens = [(seconds(16, arguments.tokens + 1) - seconds(16, 1)) / arguments.tokens for _ in range(2)]
    prompt = min(seconds(arguments.prompt, 1) for _ in range(2))
    print(json.dumps({"token": sum(tokens) / len(tokens), "best": min(tokens), "prompt": prompt}))


if __name__ == "__main__":
    main()
