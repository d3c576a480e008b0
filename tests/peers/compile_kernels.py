"""Run where triton is installed, with no card: its kernels compiled for cards of 2020 (sm_80) and later.

Prints JSON: for each case the bytes of shared memory that a program takes.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from roundel.inference.triton import kernels, product

CASES = [  # card, tokens, bits, group, asymmetric, E2M1, inputs, scales
    (90, 1, 4, 128, False, False, "*bf16", "*fp16"),
    (90, 1, 4, 32, False, True, "*bf16", "*u8"),
    (80, 1, 8, 64, True, False, "*fp16", "*bf16"),
    (80, 1, 2, 48, True, False, "*fp32", "*fp32"),
    (90, 16, 4, 128, True, False, "*bf16", "*fp16"),
    (90, 512, 4, 128, False, False, "*bf16", "*fp16"),
    (80, 512, 4, 128, True, False, "*fp32", "*fp16"),
    (80, 512, 3, 128, True, False, "*bf16", "*fp16"),
    (89, 512, 4, 32, False, True, "*fp16", "*u8"),
    (89, 512, 8, 48, True, False, "*bf16", "*fp16"),
]


def shared(card: int, tokens: int, bits: int, group: int, asymmetric: bool, e2m1: bool, x: str, scales: str) -> int:
    constants, launch = product.tiles(4096, tokens, 16, bits, group, asymmetric, e2m1)
    kernel = kernels.multiply_one if tokens == 1 else kernels.multiply_many
    kinds = {"words": "*i32", "scales": scales, "zeros": "*u8", "x": x, "y": x}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*kinds, "out", "width")},
    )
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=launch).metadata.shared


print(json.dumps({" ".join(map(str, case)): shared(*case) for case in CASES}))
