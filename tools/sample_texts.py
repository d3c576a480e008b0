"""Sample the package's own texts from its bundled model: data/text/calibration.txt and evaluation.txt.

Every passage is a paragraph that the model wrote by itself at temperature 1, nothing but a line's end before it. So on
evaluation.txt the model meets its own distribution: its perplexity is the lowest that any model can expect there, and
the logarithm of a rounded model's perplexity exceeds it by about the mean KL divergence between the two.

A candidate is kept when it ends by itself after 64 to 254 tokens, its text encodes to the very tokens that were drawn,
and chance (or an old novel) put no word into it that a package should not ship. Candidate number i of a text draws from
a random generator of its own, seeded by the text's seed and i, and the model computes in float64: so a text depends
neither on the size of a batch nor on the number of threads.

Usage: python tools/sample_texts.py [FOLDER]    default: src/roundel/data/text. About 8 minutes on one core.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from roundel.calibration.tokenizer import load_tokenizer
from roundel.data.bundled import bundled_model, bundled_text
from roundel.evaluation.models import draw, float_model
from roundel.evaluation.perplexity import Tokenizer

SEEDS = {"calibration": 20_001, "evaluation": 20_002}
TOKENS = {"calibration": 60_000, "evaluation": 25_600}  # at least; the second fills 100 windows of 256
SHORTEST, LONGEST = 64, 254  # tokens of a passage, without the line ends around it
BATCH = 64
UNWANTED = re.compile(r"negro|semen|slave|savage|chink|gyps|cock|\bfag|\bsex", re.IGNORECASE)


def writer() -> nn.Module:
    """The bundled model in float64."""
    return float_model(bundled_model()).double()


def candidates(model: nn.Module, line_end: int, seed: int, first: int, batch: int) -> Tensor:
    """Tokens [batch, LONGEST + 1] that follow a line's end, for the candidates first, first + 1, ... of a seed."""
    generators = [torch.Generator().manual_seed(seed * 1_000_000 + i) for i in range(first, first + batch)]
    uniform = torch.stack([torch.rand(LONGEST + 1, generator=g, dtype=torch.float64) for g in generators])
    entering, cache = torch.full((batch, 1), line_end), None
    drawn = torch.full((batch, LONGEST + 1), line_end)
    run: Any = model
    with torch.no_grad():
        for step in range(LONGEST + 1):
            output = run(input_ids=entering, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            drawn[:, step] = draw(output.logits[:, -1], uniform[:, step])
            entering = drawn[:, step : step + 1]
            if (drawn[:, : step + 1] == line_end).any(dim=1).all():
                break
    return drawn


def passages(model: nn.Module, tokenizer: Tokenizer, seed: int, batch: int = BATCH) -> Iterator[tuple[str, int]]:
    """The passages of a seed, each with the number of its tokens, line end included; without end."""
    (line_end,) = tokenizer.encode("\n", add_special_tokens=False, verbose=False)
    for first in count(0, batch):
        for row in candidates(model, line_end, seed, first, batch).tolist():
            if line_end not in row[SHORTEST:] or line_end in row[:SHORTEST]:
                continue
            tokens = row[: row.index(line_end)]
            text = tokenizer.decode(tokens)
            encoded = tokenizer.encode(f"\n{text}\n", add_special_tokens=False, verbose=False)
            # Token 0 is the special one; its text would read back as the same token.
            exact = encoded == [line_end, *tokens, line_end] and 0 not in tokens and len(text.splitlines()) == 1
            if exact and not UNWANTED.search(text):
                yield text, len(tokens) + 1


def sample(model: nn.Module, tokenizer: Tokenizer, seed: int, tokens: int) -> list[str]:
    """The first passages of a seed that together have `tokens` tokens or more."""
    texts, total = [], 0
    for text, length in passages(model, tokenizer, seed):
        texts.append(text)
        total += length
        if total >= tokens:
            break
    return texts


def main(folder: Path) -> None:
    model, tokenizer = writer(), load_tokenizer(bundled_model())
    for name, seed in SEEDS.items():
        texts = sample(model, tokenizer, seed, TOKENS[name])
        (folder / f"{name}.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8", newline="\n")
        print(f"{name}.txt: {len(texts)} passages, at least {TOKENS[name]} tokens, seed {seed}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else bundled_text("evaluation").parent)
