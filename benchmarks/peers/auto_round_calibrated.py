"""auto-round with calibration data, on one job: SignRound, its optimized rounding, or its plain rounding.

    python auto_round_calibrated.py JOB.json

Options: `iters` (0: rounding), `opt_rtn` (with iters 0: search the scales, or not), `bf16` (what auto-round is to
believe of this processor: it casts the model to bfloat16 where there are instructions for that, as on a GPU, and to
float32 where there are none). Everything else is auto-round's default: batches of 8, lr and minmax lr 1/iters, best
loss kept, quantized inputs. Its `torch.compile` stays off: on a model of this size it compiles for longer than it runs.

auto-round's symmetric grids span -2^(b-1) .. 2^(b-1)-1 with scales of either sign; its asymmetric ones contain 0, with
integer zero points. There is no optimized rounding for the latter: `opt_rtn` makes no difference then.
"""

import sys

import torch
from auto_round import AutoRound
from auto_round.utils.device_manager import CpuARDevice
from exchange import Job, Timer, decode_gptq_layout, finish

BATCH = 8


def main(path: str) -> None:
    job = Job.read(path)
    iters, bf16 = job.options["iters"], job.options["bf16"]
    CpuARDevice.supports_bf16 = lambda self: bf16
    samples = torch.tensor(job.samples())
    settings = {"iters": iters, "enable_torch_compile": False}
    if iters == 0:
        settings = {"iters": 0, "disable_opt_rtn": not job.options["opt_rtn"], "disable_model_free": True}
    with Timer() as timer:
        rounder = AutoRound(
            job.model,
            bits=job.bits,
            group_size=job.group_size,
            sym=job.symmetric,
            dataset=list(samples.split(BATCH)),
            nsamples=len(samples),
            seqlen=samples.shape[1],
            batch_size=BATCH,
            seed=job.seed,
            device_map="cpu",
            **settings,
        )
        _, folder = rounder.quantize_and_save(job.work(), format="auto_round:gptqmodel")
    tensors, groups = decode_gptq_layout(folder, job.bits, job.group_size, zero_offset=0)
    assert not groups
    finish(
        job,
        tensors,
        seconds=timer.seconds,
        scale_bits=16,
        zero_bits=0 if job.symmetric else job.bits,
        settings=settings | {"model_dtype": "bfloat16" if bf16 else "float32"},
        packages=("auto-round", "torch", "transformers"),
    )


if __name__ == "__main__":
    main(sys.argv[1])
