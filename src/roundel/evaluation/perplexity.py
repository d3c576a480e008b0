"""Perplexity of a model on a text, and the divergence of one model's predictions from another's.

A text is cut into windows that do not overlap; in each, every token but the first is predicted from those before it.
Models are plain functions of token ids, `ids [batch, tokens] -> logits [batch, tokens, vocab]`: nothing here knows
how one is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from roundel.errors import NumericsError, RecipeError

__all__ = ["Comparison", "Logits", "Tokenizer", "compare", "perplexity", "windows"]

Logits = Callable[[Tensor], Tensor]
BATCH = 4  # windows in one call; what is held is their logits, and log-probabilities of one window


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]: ...
    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the candidate predicts where the reference predicts something else, over the same tokens.

    perplexity_reference, perplexity   exp of the mean of -log p(token), of the reference and of the candidate
    kl_mean, kl_p999                   of KL(reference || candidate) over positions, in nats: its mean and 99.9th
    percentile top1_agreement                     share of positions where both find the same token most likely, 0 to 1
    tokens                             predicted tokens
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
    total = 0.0
    for ids in torch.split(windows, batch):
        for log_p, tokens in _predictions(logits_of, ids):
            total += _surprise(log_p, tokens)
    return _exp(total / _predicted(windows))


def compare(reference: Logits, candidate: Logits, windows: Tensor, batch: int = BATCH) -> Comparison:
    """Both models on windows [n, length], position by position: KL = sum over the vocabulary of p * (log p - log q).

    batch   windows in one call of either model
    Raises NumericsError when logits are not numbers.
    """
    total_p = total_q = 0.0
    agreeing = 0
    divergences: list[Tensor] = []
    for ids in torch.split(windows, batch):
        for (log_p, tokens), (log_q, _) in zip(_predictions(reference, ids), _predictions(candidate, ids), strict=True):
            total_p += _surprise(log_p, tokens)
            total_q += _surprise(log_q, tokens)
            agreeing += int((log_p.argmax(-1).cpu() == log_q.argmax(-1).cpu()).sum())
            divergences.append(_divergence(log_p, log_q))
    count, kl = _predicted(windows), torch.cat(divergences)
    return Comparison(
        perplexity_reference=_exp(total_p / count),
        perplexity=_exp(total_q / count),
        kl_mean=float(kl.mean(dtype=torch.float64)),
        kl_p999=float(kl.kthvalue(math.ceil(0.999 * count)).values),
        top1_agreement=agreeing / count,
        tokens=count,
    )


def _predictions(logits_of: Logits, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each window: log-probabilities [length - 1, vocab], float32, and the tokens [length - 1] that came."""
    with torch.no_grad():
        logits = logits_of(ids)
    for window, tokens in zip(logits, ids.to(logits.device), strict=True):
        log_p = window[:-1].float().log_softmax(-1)
        if log_p.isnan().any():
            raise NumericsError(
                "The model's logits are not numbers. Its weights or activations left the range of their type."
            )
        yield log_p, tokens[1:]


def _surprise(log_p: Tensor, tokens: Tensor) -> float:
    """The sum of -log p over the tokens that came, in nats."""
    return -float(log_p.gather(-1, tokens[:, None]).sum(dtype=torch.float64))


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each position, float32 [positions]; a token that p excludes adds nothing."""
    terms = log_p.exp() * (log_p - log_q.to(log_p.device))
    # Rounding may leave a sum a little below 0, which no divergence is.
    return terms.masked_fill(log_p == -math.inf, 0.0).sum(-1).clamp(min=0.0).cpu()


def _predicted(windows: Tensor) -> int:
    return windows.shape[0] * (windows.shape[1] - 1)


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700.0 else math.inf
