"""auto-round's tuning loop on the first block of a checkpoint, timed step by step. Started in its own environment.

python auto_round_signround.py MODEL SCHEME STEPS SAMPLES TOKENS BATCH THREADS COMPILE

Prints one line of JSON: the seconds and the processor seconds between consecutive steps of its optimizer. COMPILE is 1
for its default (torch.compile), 0 without.
"""

import itertools
import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__":
    model, scheme = sys.argv[1:3]
    steps, samples, tokens, batch, threads, compiled = (int(each) for each in sys.argv[3:])
    torch.set_num_threads(threads)
    from auto_round import AutoRound
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer

    moments: list[tuple[float, float]] = []
    step = SignRoundQuantizer._step

    def timed(self: SignRoundQuantizer, *arguments: object) -> None:
        step(self, *arguments)
        moments.append((time.perf_counter(), time.process_time()))

    SignRoundQuantizer._step = timed
    generator = torch.Generator().manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    data = [torch.randint(0, loaded.config.vocab_size, (1, tokens), generator=generator) for _ in range(samples)]
    AutoRound(
        loaded, AutoTokenizer.from_pretrained(model), scheme=scheme, iters=steps, seqlen=tokens, nsamples=samples,
        batch_size=batch, dataset=data, device_map="cpu", enable_torch_compile=bool(compiled),
    ).quantize()  # fmt: skip
    gaps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(moments)]
    print(json.dumps({"seconds": [g[0] for g in gaps], "processor": [g[1] for g in gaps]}), flush=True)
