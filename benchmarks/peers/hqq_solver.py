"""HQQ on one job.

    python hqq_solver.py JOB.json

Groups lie along inputs (axis 1), its default; scales and zero points are stored in float16, not quantized, its default
as well. The zero points are floats, at every width, so integer formats cannot store them. Option `integer_zero`: round
them, bound them to 0 .. 2^b-1 and choose the codes anew, as such a format would need it; this step is ours, not HQQ's.
It has no symmetric grids and looks at no data.
"""

import sys

import torch
from exchange import Job, Timer, finish
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from torch import Tensor
from transformers import AutoModelForCausalLM, set_seed


def with_integer_zero(weight: Tensor, layer: HQQLinear, job: Job) -> Tensor:
    """The weight [out, in] on the layer's scales, its zero points rounded."""
    top = 2**job.bits - 1
    scale, zero = layer.meta["scale"].float(), layer.meta["zero"].float().round().clamp(0, top)  # [groups, 1]
    codes = (weight.float().view(-1, job.group_size) / scale + zero).round().clamp(0, top)
    return ((codes - zero) * scale).view_as(weight)


def main(path: str) -> None:
    job = Job.read(path)
    assert not job.symmetric, "HQQ has no symmetric grids"
    set_seed(job.seed)
    config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group_size)
    with Timer() as timer:
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float16)
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float16, device="cpu")
        AutoHQQHFModel.save_quantized(model, job.work())
    source = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).state_dict()
    loaded = AutoHQQHFModel.from_quantized(job.work(), compute_dtype=torch.float32, device="cpu")
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, HQQLinear)}
    tensors = {f"{name}.weight": layer.dequantize().float() for name, layer in layers.items()}
    if job.options["integer_zero"]:
        tensors = {f"{n}.weight": with_integer_zero(source[f"{n}.weight"], layer, job) for n, layer in layers.items()}
    finish(
        job,
        tensors,
        seconds=timer.seconds,
        scale_bits=16,
        zero_bits=job.bits if job.options["integer_zero"] else 16,
        settings=config["weight_quant_params"],
        packages=("hqq", "torch", "transformers"),
    )


if __name__ == "__main__":
    main(sys.argv[1])
