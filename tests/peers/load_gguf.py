"""Run by the environment of xllamacpp: load GGUF files as their users do, and save what the models say.

Usage: python load_gguf.py JOBS.json

JOBS.json is a list of objects. Of a job, `path` is a GGUF file, `prompt` a list of token ids, `text` (it may be left
out) a text to tokenize, and `output` the file to write: .npy, float32 [tokens, vocabulary], row i the log-probabilities
of the token after the first i + 1 of the prompt.

Prints one line of JSON for each job as it ends: path, ok, and `error`, or else 8 greedily chosen `tokens` and, of a
text, its `ids` as the file's own tokenizer makes them. Everything else goes to standard error. Every job has a process
of its own, since a bad file may end it.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp


def answers(server: Any, prompt: list[int], **options: Any) -> dict[str, Any]:
    request = {"prompt": prompt, "temperature": 0.0, "cache_prompt": False, "return_tokens": True} | options
    answer = server.handle_completions(request)
    return answer if isinstance(answer, dict) else json.loads(answer)


def log_probabilities(server: Any, prompt: list[int], vocabulary: int) -> np.ndarray:
    """Of the token after `prompt`, [vocabulary]."""
    answer = answers(server, prompt, n_predict=1, n_probs=vocabulary)
    found = np.full(vocabulary, -np.inf, np.float32)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


class Parameters(ctypes.Structure):
    """llama_model_params, whose fields are not needed: room enough for all of them."""

    _fields_ = (("all", ctypes.c_byte * 1024),)


def tokenized(path: str, text: str) -> list[int]:
    """The ids that the file's tokenizer makes of a text, with the special tokens it puts around it."""
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.llama_model_default_params.restype = Parameters
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Parameters]
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    library.llama_model_get_vocab.restype = ctypes.c_void_p
    library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    library.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    model = library.llama_model_load_from_file(path.encode(), library.llama_model_default_params())
    raw = text.encode()
    ids = (ctypes.c_int32 * (len(raw) + 8))()
    count = library.llama_tokenize(library.llama_model_get_vocab(model), raw, len(raw), ids, len(ids), True, False)
    return list(ids[:count])


def run(job: dict[str, Any]) -> dict[str, Any]:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = job["path"]
    parameters.n_ctx, parameters.n_parallel = 256, 1
    parameters.cpuparams.n_threads = 1
    parameters.warmup = False
    server = xllamacpp.Server(parameters)
    vocabulary, prompt = job["vocabulary"], job["prompt"]
    rows = [log_probabilities(server, prompt[: end + 1], vocabulary) for end in range(len(prompt))]
    np.save(job["output"], np.stack(rows))
    tokens, sequence = [], list(prompt)
    for _ in range(8):
        sequence.append(int(log_probabilities(server, sequence, vocabulary).argmax()))
        tokens.append(sequence[-1])
    found: dict[str, Any] = {"tokens": tokens}
    if "text" in job:
        found["ids"] = tokenized(job["path"], job["text"])
    return found


def main(jobs: str) -> None:
    for job in json.loads(Path(jobs).read_text()):
        done = subprocess.run(
            [sys.executable, __file__, "one"], input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=False
        )
        lines = done.stdout.splitlines()
        result = json.loads(lines[-1]) if done.returncode == 0 and lines else {"ok": False, "error": "it ended"}
        print(json.dumps({"path": job["path"]} | result), flush=True)


def one() -> None:
    """The job that comes in on standard input."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        result = {"ok": True} | run(json.load(sys.stdin))
    except Exception as error:
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), file=out, flush=True)
    os._exit(0)


if __name__ == "__main__":
    one() if sys.argv[1] == "one" else main(sys.argv[1])
