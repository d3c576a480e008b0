"""auto-round's search for scales, on matrices. Executed by the interpreter of auto-round's own environment.

Usage: python run_auto_round_search.py IN.safetensors OUT.safetensors

IN holds matrices "NAME" [out, in] and, for some, "NAME.imatrix" [in]. OUT holds for each matrix and each of JOBS
"NAME/JOB" [out, in]: the weights that a reader of auto-round's file would compute, float32.
"""

import sys

import torch
from auto_round.data_type import QUANT_FUNC_WITH_DTYPE
from safetensors.torch import load_file, save_file

JOBS = {
    "W2A16G32": ("opt_rtn_int_sym", {"bits": 2, "group_size": 32}),
    **{f"W{bits}A16G64": ("opt_rtn_int_sym", {"bits": bits, "group_size": 64}) for bits in (2, 3, 4, 5)},
    "MXFP4": ("opt_rtn_mx_fp", {"bits": 4, "group_size": 32, "data_type": "mx_fp4"}),
    "MXFP8": ("opt_rtn_mx_fp", {"bits": 8, "group_size": 32, "data_type": "mx_fp8"}),
    "NVFP4": ("opt_rtn_nv_fp4", {"bits": 4, "group_size": 16}),
}


def stored(job: str, weight: torch.Tensor, imatrix: torch.Tensor | None) -> torch.Tensor:
    """What is read back of a weight: of integers, codes times the float16 scale."""
    function, options = JOBS[job]
    known = {} if imatrix is None else {"imatrix": imatrix}
    made, scale, _ = QUANT_FUNC_WITH_DTYPE[function](weight.clone(), **options, **known)
    if not job.startswith("W"):
        return made.float()
    groups = made.reshape(scale.numel(), -1).float()
    scale = scale.reshape(-1, 1)
    return (torch.round(groups / scale.float()) * scale.half().float()).reshape(weight.shape)


def main(source: str, target: str) -> None:
    torch.set_num_threads(1)
    tensors = load_file(source)
    found = {}
    for name, weight in tensors.items():
        if not name.endswith(".imatrix"):
            for job in JOBS:
                found[f"{name}/{job}"] = stored(job, weight, tensors.get(f"{name}.imatrix")).contiguous()
    save_file(found, target)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
