"""llm-compressor on one job: plain rounding, GPTQ, or AWQ followed by plain rounding.

    python llm_compressor_oneshot.py JOB.json

Options: `modifier` is rtn, gptq or awq; the rest goes to GPTQModifier (`actorder`: "static" without being told, columns
by activations in groups that stay; null, none) or AWQModifier (`duo_scaling`, `n_grid`; true and 20 without being told;
it has no clip search). Damping is 0.01, a group's range its least and greatest weight.

Symmetric scales are the greatest magnitude / (2^(b-1) - 1/2); asymmetric ranges contain 0, zero points are integers.
The model is run in float32, and its scales are stored as float32 then, which is finer than anybody else's: this
processor has no instructions for bfloat16.

AWQ pins memory for a device that a machine may not have, and stops; the pinning is left out here, which changes no
number.
"""

import sys

import torch
from datasets import Dataset
from exchange import Job, Timer, finish
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, set_seed
from transformers.utils.quantization_config import CompressedTensorsConfig

IGNORED = ["lm_head"]


def recipe(job: Job) -> list[Modifier]:
    options = dict(job.options)
    modifier = options.pop("modifier")
    weights = {
        "num_bits": job.bits,
        "type": "int",
        "symmetric": job.symmetric,
        "strategy": "group",
        "group_size": job.group_size,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if modifier == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=IGNORED, **options)]
    rounding = QuantizationModifier(config_groups=groups, ignore=IGNORED)
    return [AWQModifier(**options), rounding] if modifier == "awq" else [rounding]


def main(path: str) -> None:
    job = Job.read(path)
    set_seed(job.seed)
    IntermediatesCache.pin_memory = lambda self, batch_index: None
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job.samples()]
    modifiers = recipe(job)
    data = {"dataset": Dataset.from_list(samples), "num_calibration_samples": len(samples)}
    data["max_seq_length"] = len(samples[0]["input_ids"])
    with Timer() as timer:
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
        oneshot(model=model, recipe=modifiers, **({} if job.options["modifier"] == "rtn" else data))
        model.save_pretrained(job.work(), save_compressed=True)
    settings = {
        n: v for n, v in modifiers[0].model_dump().items() if n in ("actorder", "dampening_frac", "duo_scaling")
    }
    decoded = AutoModelForCausalLM.from_pretrained(
        job.work(), dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    names = {name for name, _ in model.named_parameters() if not name.endswith(("_scale", "_zero_point", "_packed"))}
    names |= {f"{name}.weight" for name, module in decoded.named_modules() if isinstance(module, torch.nn.Linear)}
    tensors = decoded.state_dict()
    finish(
        job,
        {name: tensors[name] for name in names if name in tensors and not name.endswith("weight_shape")},
        seconds=timer.seconds,
        scale_bits=32,
        zero_bits=0 if job.symmetric else job.bits,
        settings=settings,
        packages=("llmcompressor", "compressed-tensors", "torch", "transformers"),
    )


if __name__ == "__main__":
    main(sys.argv[1])
