"""GPTQModel on one job.

    python gptqmodel_gptq.py JOB.json

Options are handed to its QuantizeConfig; without any it orders columns group-aware (GAR), damps by 0.05 and takes the
range of a group from its least and greatest weight. `desc_act` orders them by activations, groups follow that order;
`act_group_aware: false` leaves them as they are; `mse` searches the range for the least error to that power.

Symmetric scales are the greatest magnitude / (2^(b-1) - 1/2); zero points are integers, stored less one. The model is
run in float32 here, where GPTQModel by itself would take the checkpoint's bfloat16: this processor has no instructions
for that.
"""

import os
import sys

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its loader asks for two workers of a pool that has one on two cores

import torch
from exchange import Job, Timer, decode_gptq_layout, finish
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import set_seed

BATCH = 8


def main(path: str) -> None:
    job = Job.read(path)
    set_seed(job.seed)
    torch.set_num_threads(1)
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job.samples()]
    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        device="cpu",
        offload_to_disk=False,
        **job.options,
    )
    with Timer() as timer:
        model = GPTQModel.load(job.model, config, dtype=torch.float32)
        model.quantize(samples, batch_size=BATCH)
        model.save(job.work())
    tensors, groups = decode_gptq_layout(job.work(), job.bits, job.group_size, zero_offset=1)
    names = ("desc_act", "act_group_aware", "static_groups", "damp_percent", "mse", "true_sequential")
    finish(
        job,
        tensors,
        seconds=timer.seconds,
        scale_bits=16,
        zero_bits=0 if job.symmetric else job.bits,
        settings={name: getattr(config, name) for name in names},
        packages=("gptqmodel", "torch", "transformers"),
        groups=groups,
    )


if __name__ == "__main__":
    main(sys.argv[1])
