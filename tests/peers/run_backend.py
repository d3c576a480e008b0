"""Run where a backend's package is installed: how far its products are from those of decoded weights.

    python run_backend.py ark|triton [--all]

Prints JSON: for each case its largest error as a share of what is stated. Triton's kernels run in its interpreter, on
CPU tensors: its products of bfloat16 are mended here (it multiplies their bits), programs are made few, and every fifth
case is run unless all are asked for.
"""

import json
import os
import sys
from pathlib import Path

BACKEND = sys.argv[1]
if BACKEND == "triton":
    os.environ["TRITON_INTERPRET"] = "1"
HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2] / "src"), str(HERE.parents[1])]

import torch  # noqa: E402

from inference.cases import (  # noqa: E402
    CELLS,
    FLOATS,
    drawn,
    floats,
    gradient_share_of_allowed,
    layer_of,
    permuted,
    share_of_allowed,
)


def interpreted() -> None:
    """Triton's interpreter, with bfloat16 widened before it is multiplied, and one program for all rows."""
    from triton.runtime import interpreter

    from roundel.inference.triton import product

    dot, product.ROWS, tiles = interpreter.InterpreterBuilder.create_dot, 64, product.tiles

    def one_tile(out, tokens, *rest):
        constants, launch = tiles(out, tokens, *rest)
        return constants | ({"ROWS": 64, "TOKENS": 64} if tokens > 1 else {}), launch

    product.tiles = one_tile

    def create_dot(self, a, b, *rest):
        return dot(
            self, *(self.create_fp_ext(v, interpreter.tl.float32) if v.dtype.is_bf16() else v for v in (a, b)), *rest
        )

    interpreter.InterpreterBuilder.create_dot = create_dot


def main() -> None:
    found, dtypes = {}, list(FLOATS)
    if BACKEND == "triton":
        interpreted()
    some = BACKEND == "triton" and "--all" not in sys.argv
    for number, cell in enumerate(CELLS[::5] if some else CELLS):  # the interpreter takes a second for a product
        tried = {"biases": (bool(number % 2),), "batches": (1, 7)} if some else {}
        for dtype in [dtypes[number % 3]] if some else dtypes:
            given = layer_of(cell.scheme, cell.shape), drawn(cell.scheme, cell.shape), dtype
            found[f"{cell.name} {dtype}"] = share_of_allowed(BACKEND, *given, **tried)
    tried = {"biases": (True,), "batches": (1, 7)} if some else {}
    found["permuted"] = share_of_allowed(BACKEND, *permuted(), torch.float32, **tried)
    found["gradients"] = gradient_share_of_allowed(BACKEND, *permuted(), torch.float32)
    if BACKEND == "triton":
        for (name, layer, quantized), dtype in zip(floats("MXFP4"), dtypes, strict=True):
            found[f"{name} {dtype}"] = share_of_allowed(BACKEND, layer, quantized, dtype, **tried)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
