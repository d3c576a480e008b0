"""Load quantized checkpoints as their users do, and save what the models say.

Executed by the interpreter of a consumer's own environment.

Usage: python load_checkpoint.py JOBS.json

JOBS.json is a list of objects. Of a job, `folder` is a checkpoint, `prompt` is a list of token ids, `logits` is the
file to write (.npy, float32 [tokens, vocab]), `dtype` is the dtype to ask for, and `loader` is one of

    transformers   AutoModelForCausalLM, which hands the checkpoint to whatever its config names
    dequantize     the same, with compressed-tensors told to decode the weights and to leave inputs alone
    gptqmodel      GPTQModel's own loader
    hqq            a model of transformers with HQQ's own layers in it: transformers 5 itself does not load them
    gptq_torch     AutoModelForCausalLM, with GPTQModel told to use plain torch instead of its fastest kernel

Prints one line of JSON for each job as it ends: name, ok, and `error`, or else `modules` (class of a leaf module -> how
many there are), the model's `dtype`, and 8 greedily chosen `tokens`. Everything else goes to standard error.

Jobs that follow each other with the same `process` share a fork, others have their own: loaders change what
transformers knows of an architecture, and kernels may crash; but to import GPTQModel anew takes longer than to load a
model.
"""

import json
import multiprocessing
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # on two cores its pools ask for more workers than it counts
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers

FORK = multiprocessing.get_context("fork")


def with_transformers(folder: str, dtype: torch.dtype, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **options)


def dequantized(folder: str, dtype: torch.dtype) -> Any:
    return with_transformers(folder, dtype, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))


def with_gptqmodel(folder: str, dtype: torch.dtype) -> Any:
    from gptqmodel import GPTQModel

    return GPTQModel.load(folder, device="cpu", dtype=dtype).model


def with_gptq_torch(folder: str, dtype: torch.dtype) -> Any:
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    kind, backend = {"gptq": (transformers.GPTQConfig, "torch"), "awq": (transformers.AwqConfig, "torch_awq")}[
        config["quant_method"]
    ]
    return with_transformers(folder, dtype, quantization_config=kind(bits=config["bits"], backend=backend))


def with_hqq(folder: str, dtype: torch.dtype) -> Any:
    from hqq.core.quantize import HQQLinear
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = load_file(Path(folder) / "model.safetensors")
    for module in [name.removesuffix(".W_q") for name in tensors if name.endswith(".W_q")]:
        parts = [name for name in tensors if name.startswith(module + ".")]
        layer = HQQLinear(None, None, compute_dtype=dtype, device="cpu")
        layer.load_state_dict({name.removeprefix(module + "."): tensors.pop(name) for name in parts})
        layer.compute_dtype = layer.meta["compute_dtype"] = dtype
        layer.meta |= {name: layer.meta[name].to(dtype) for name in ("scale", "zero")}
        model.set_submodule(module, layer)
    lost = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    assert not lost.unexpected_keys, lost.unexpected_keys
    return model.to(dtype)


LOADERS: dict[str, Callable[[str, torch.dtype], Any]] = {
    "transformers": with_transformers,
    "dequantize": dequantized,
    "gptqmodel": with_gptqmodel,
    "gptq_torch": with_gptq_torch,
    "hqq": with_hqq,
}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load one checkpoint, write its logits, and tell about it."""
    model = LOADERS[job["loader"]](job["folder"], getattr(torch, job["dtype"])).eval()
    modules = Counter(type(module).__name__ for module in model.modules() if not any(module.children()))
    ids = torch.tensor([job["prompt"]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        mask = torch.ones_like(ids)
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    np.save(job["logits"], logits.numpy())
    return {"modules": modules, "dtype": str(model.dtype), "tokens": tokens[0, len(job["prompt"]) :].tolist()}


def run_all(jobs: list[dict[str, Any]], sender: Connection) -> None:
    """Carry out jobs and send the result of each, whatever it is."""
    for job in jobs:
        try:
            result = {"ok": True} | run(job)
        except Exception as error:
            traceback.print_exc()
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        sender.send(result)
    sender.close()
    os._exit(0)  # GPTQModel leaves threads behind that never end


def main(jobs: str) -> None:
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    transformers.logging.set_verbosity_error()
    if find_spec("auto_round"):
        import auto_round  # noqa: F401  every fork inherits this import, which takes seconds
    for _, group in groupby(json.loads(Path(jobs).read_text()), key=lambda job: job["process"]):
        together = list(group)
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=run_all, args=(together, sender))
        process.start()
        sender.close()
        for job in together:
            try:
                result = receiver.recv()
            except EOFError:
                result = {"ok": False, "error": "the process died"}
            print(json.dumps({"name": job["name"]} | result), file=lines, flush=True)
        process.join()


if __name__ == "__main__":
    main(sys.argv[1])
