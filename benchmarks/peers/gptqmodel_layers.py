"""GPTQModel's own GPTQ on layers and inputs that are given, timed. Started in its own environment.

    python gptqmodel_layers.py JOB.json

JOB.json: `folder` with .npy files of each group's inputs [samples, tokens, in] and each layer's weight [out, in],
float32; `groups`, lists of layers that share the inputs named after the first of them; `bits`, `group_size`, `sym`,
`threads`, `batch` (samples), and `options` for its QuantizeConfig. As its looper does by default, one layer of a group
collects the Hessian, the others adopt it, and its factors are shared.

Prints one line of JSON: a group's first layer -> [seconds, processor seconds] of collecting its Hessian, the same of
rounding its layers, and their output error relative to the output, on average.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its loader asks for two workers of a pool that has one on two cores

import numpy as np
import torch
from gptqmodel import QuantizeConfig
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.quantization.gptq import GPTQ, SharedHessianFactorCache


def task_of(name: str, weight: torch.Tensor, config: QuantizeConfig) -> GPTQ:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    task = GPTQ(NamedModule(linear, name=name, full_name=name, layer_index=0), config)
    task.quantizer.configure(perchannel=True)
    return task


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    now = clock()
    return now[0] - start[0], now[1] - start[1]


@torch.inference_mode()
def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    torch.set_num_threads(job["threads"])
    folder, found = Path(job["folder"]), {}
    config = QuantizeConfig(
        bits=job["bits"], group_size=job["group_size"], sym=job["sym"], device="cpu", offload_to_disk=False,
        **job["options"],
    )  # fmt: skip
    for group in job["groups"]:
        x = torch.from_numpy(np.load(folder / f"{group[0]}.inputs.npy"))
        weights = {name: torch.from_numpy(np.load(folder / f"{name}.npy")) for name in group}
        tasks = {name: task_of(name, weights[name].clone(), config) for name in group}
        leader = tasks[group[0]]
        start = clock()
        for batch in x.split(job["batch"]):
            leader.add_batch(batch, batch)
        leader.materialize_global_hessian()
        collecting, start = since(start), clock()
        if len(group) > 1:
            cache = SharedHessianFactorCache(0, group[0], leader=group[0])
            for name in group[1:]:
                tasks[name].adopt_hessian_from(leader)
                tasks[name].attach_shared_hessian_cache(cache)
            leader.attach_shared_hessian_cache(cache)
        rounded = {name: task.quantize()[0].float() for name, task in tasks.items()}
        rounding = since(start)
        rows = x.flatten(0, 1)[:: x.shape[0]]
        errors = [
            float((rows @ (weights[name] - rounded[name]).T).square().sum())
            / float((rows @ weights[name].T).square().sum())
            for name in group
        ]
        found[group[0]] = [collecting, rounding, sum(errors) / len(errors)]
    print("RESULT " + json.dumps(found), flush=True)
    os._exit(0)  # it leaves threads behind that never end


if __name__ == "__main__":
    main(sys.argv[1])
