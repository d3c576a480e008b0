"""Perplexity and divergence against a re-implementation that is slow and obvious."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from roundel.errors import NumericsError, RecipeError
from roundel.evaluation.perplexity import compare, perplexity, windows

VOCAB = 11


class Letters:
    """A tokenizer whose tokens are letters."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        assert not add_special_tokens
        assert not verbose
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids)


def bigram(seed: int, sharpness: float = 2.0) -> Tensor:
    """Logits [previous, next] of a model that looks at one token only."""
    return sharpness * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


def some_windows(seed: int = 5, shape: tuple[int, int] = (9, 13)) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def probabilities(logits: list[float]) -> list[float]:
    total = math.fsum(math.exp(value) for value in logits)
    return [math.exp(value) / total for value in logits]


def slow(reference: Tensor, candidate: Tensor, ids: Tensor) -> tuple[float, float, list[float], float]:
    """Perplexity of both, every KL divergence, and top-1 agreement, by Python floats, position by position."""
    surprises: tuple[list[float], list[float]] = ([], [])
    divergences, agreeing = [], 0
    for window in ids.tolist():
        for previous, token in pairwise(window):
            p, q = probabilities(reference[previous].tolist()), probabilities(candidate[previous].tolist())
            surprises[0].append(-math.log(p[token]))
            surprises[1].append(-math.log(q[token]))
            divergences.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            agreeing += p.index(max(p)) == q.index(max(q))
    ours, theirs = (math.exp(math.fsum(s) / len(s)) for s in surprises)
    return ours, theirs, divergences, agreeing / len(divergences)


@pytest.mark.parametrize("batch", [1, 4, 9, 50])
def test_as_the_slow_definition(batch: int) -> None:
    reference, candidate, ids = bigram(1), bigram(1) + 0.3 * bigram(2), some_windows()
    ours, theirs, divergences, agreement = slow(reference, candidate, ids)
    found = compare(lambda i: reference[i], lambda i: candidate[i], ids, batch=batch)
    assert found.tokens == len(divergences) == 9 * 12
    assert found.perplexity_reference == pytest.approx(ours, rel=1e-5)
    assert found.perplexity == pytest.approx(theirs, rel=1e-5)
    assert found.kl_mean == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    assert found.kl_p999 == pytest.approx(max(divergences), rel=1e-4)
    assert found.top1_agreement == agreement
    assert perplexity(lambda i: candidate[i], ids, batch=batch) == pytest.approx(theirs, rel=1e-5)


def test_the_999th_of_1000_is_the_percentile() -> None:
    ids = torch.zeros(1, 1001, dtype=torch.int64)
    flat = torch.zeros(1, 1001, VOCAB)
    shifted = flat.clone()
    shifted[0, 7, 3], shifted[0, 500, 3] = 9.0, 4.0
    found = compare(lambda i: flat, lambda i: shifted, ids)
    second = math.log((math.exp(4.0) + VOCAB - 1) / VOCAB) - 4.0 / VOCAB
    assert found.kl_p999 == pytest.approx(second, rel=1e-5)


def test_a_model_does_not_diverge_from_itself() -> None:
    model = bigram(3, sharpness=20.0)
    found = compare(lambda i: model[i], lambda i: model[i], some_windows())
    assert (found.kl_mean, found.kl_p999, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.perplexity == found.perplexity_reference


def test_perplexity_of_the_uniform_distribution_is_the_vocabulary() -> None:
    assert perplexity(lambda i: torch.zeros(*i.shape, VOCAB), some_windows()) == pytest.approx(VOCAB)


def test_perplexity_of_certainty_is_one() -> None:
    ids = some_windows()
    certain = torch.nn.functional.one_hot(ids.roll(-1, dims=1), VOCAB).float() * 200.0
    assert perplexity(lambda i: certain[: len(i)], ids, batch=len(ids)) == pytest.approx(1.0)


def test_half_precision_logits_are_compared_in_float32() -> None:
    model = bigram(4)
    found = compare(lambda i: model.half()[i], lambda i: model.half().float()[i], some_windows())
    assert found.kl_p999 == 0.0


def test_excluded_tokens() -> None:
    """A token the reference excludes adds nothing; one that only the candidate excludes is infinitely far."""
    reference, ids = bigram(6), some_windows()
    reference[:, 0] = -math.inf
    found = compare(lambda i: reference[i], lambda i: reference[i], ids)
    assert found.kl_mean == 0.0
    assert math.isinf(found.perplexity)
    plain = bigram(6)
    assert math.isinf(compare(lambda i: plain[i], lambda i: reference[i], ids).kl_mean)


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = bigram(7)
    model[2, 2] = math.nan
    with pytest.raises(NumericsError, match="not numbers"):
        perplexity(lambda i: model[i], some_windows())


def test_windows_are_consecutive_and_whole() -> None:
    assert windows("abcdefgh", Letters(), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_windows_that_cannot_be_are_refused() -> None:
    with pytest.raises(RecipeError, match="predicts nothing"):
        windows("abc", Letters(), 1)
    with pytest.raises(RecipeError, match="has 3 tokens, a window 4"):
        windows("abc", Letters(), 4)
