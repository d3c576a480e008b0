"""Perplexity of a model that is a function, and the divergence of one such model's predictions from another's.

Models are plain functions of token ids, `ids [batch, tokens] -> logits [batch, tokens, vocab]`: nothing here knows how
one is made. Every token of a window but the first is predicted from those before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from roundel.calibration.tokenizer import Tokenizer
from roundel.errors import RecipeError
from roundel.evaluation.judging import Verdict, judge
from roundel.evaluation.means import mean_of, percentile_of

__all__ = ["BATCH", "HIGH", "Comparison", "Logits", "compare", "perplexity", "windows"]

Logits = Callable[[Tensor], Tensor]
BATCH = 4  # windows in one call; what is held is their logits
HIGH = 0.999  # the percentile that is told beside the mean


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the candidate predicts where the reference predicts something else, over the same tokens.

    perplexity_reference, perplexity   exp of the mean of -log p(token), of the reference and of the candidate
    kl_mean, kl_p999   of KL(reference || candidate) over positions, in nats: its mean and 99.9th percentile
    top1_agreement     share of positions where both find the same token most likely, 0 to 1
    tokens             predicted tokens
    """

    perplexity_reference: float
    perplexity: float
    kl_mean: float
    kl_p999: float
    top1_agreement: float
    tokens: int


def windows(text: str, tokenizer: Tokenizer, length: int) -> Tensor:
    """Token ids [n, length], int64, consecutive and without special tokens; what does not fill a window is dropped.

    Raises RecipeError when the length is below 2 or the text does not fill one window.
    """
    if length < 2:
        raise RecipeError(f"A window of {length} tokens predicts nothing. Use 2 or more.")
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    count = len(ids) // length
    if count == 0:
        raise RecipeError(f"The text has {len(ids)} tokens, a window {length}. Use a longer text or shorter windows.")
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def perplexity(logits_of: Logits, windows: Tensor, batch: int = BATCH) -> float:
    """exp of the mean of -log p(token | tokens before it in its window), over windows [n, length].

    batch   windows in one call of `logits_of`
    Raises NumericsError when logits are not numbers.
    """
    verdicts = [found for (found,) in _verdicts((logits_of,), windows, batch)]
    return mean_of([verdict.surprise for verdict in verdicts]).exp().value


def compare(reference: Logits, candidate: Logits, windows: Tensor, batch: int = BATCH) -> Comparison:
    """Both models on windows [n, length], position by position: KL = sum over the vocabulary of p * (log p - log q).

    batch   windows in one call of either model
    Raises NumericsError when logits are not numbers.
    """
    pairs = _verdicts((reference, candidate), windows, batch)
    divergences = [ours.divergence for _, ours in pairs]
    return Comparison(
        perplexity_reference=mean_of([theirs.surprise for theirs, _ in pairs]).exp().value,
        perplexity=mean_of([ours.surprise for _, ours in pairs]).exp().value,
        kl_mean=mean_of(divergences).value,
        kl_p999=percentile_of(divergences, HIGH).value,
        top1_agreement=mean_of([theirs.top == ours.top for theirs, ours in pairs]).value,
        tokens=windows.shape[0] * (windows.shape[1] - 1),
    )


def _verdicts(models: tuple[Logits, ...], windows: Tensor, batch: int) -> list[list[Verdict]]:
    """Of each window, a verdict on each model; a window's logits are one slab."""
    found = []
    for ids in torch.split(windows, batch):
        with torch.no_grad():
            logits = [model(ids) for model in models]
        device = logits[0].device
        for number, window in enumerate(ids):
            slab = [each[number, :-1].to(device, torch.float32) for each in logits]
            found.append(judge([slab], window[1:].to(device)))
    return found
