"""Run by the environment of xllamacpp: ggml's rounding of a matrix, timed.

    ggml_rounding.py IN.npz OUT.npz TYPE

IN holds `weight` [out, in] and `importance` [in]; OUT `seconds` [plain, with importance], and the bytes of both.
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "peers"))
from run_ggml import quantize

ROUNDS = 3


def main() -> None:
    given = np.load(sys.argv[1])
    weight = given["weight"]
    found = {}
    seconds = []
    for key, importance in (("plain", None), ("known", given["importance"])):
        quantize(sys.argv[3], weight, importance)
        times = []
        for _ in range(ROUNDS):
            start = time.thread_time()
            found[key] = quantize(sys.argv[3], weight, importance)
            times.append(time.thread_time() - start)
        seconds.append(min(times))
    np.savez(sys.argv[2], seconds=np.array(seconds), **found)


if __name__ == "__main__":
    main()
