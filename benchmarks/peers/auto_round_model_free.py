"""auto-round's model-free mode on one checkpoint, as its users run it. Started in the peer's own environment.

python auto_round_model_free.py MODEL OUT SCHEME
"""

import sys

from auto_round import AutoRound

if __name__ == "__main__":
    model, out, scheme = sys.argv[1:]
    rounder = AutoRound(model, scheme=scheme, iters=0, disable_opt_rtn=True, model_free=True)
    rounder.quantize_and_save(out, format="auto_round")
