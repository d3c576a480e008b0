"""What models say of the token that came, from logits that are never whole: a slab of the vocabulary at a time.

For each position and model, over slabs: m = the largest logit, S = sum of exp(logit - m), and for every model but the
first, the reference, W = sum of exp(a - m_a) (a - b), a being the reference's logits and b the model's. Then
log p(token) = logit - m - log S, and KL(reference || model) = W / S_a - (m_a + log S_a) + (m_b + log S_b). Slabs are
float32, what is carried from slab to slab is float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roundel.errors import NumericsError

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One model over positions.

    surprise     -log p(the token that came), float64 [positions], in nats
    top          the likeliest token, int64 [positions]
    divergence   KL(reference || this model), float32 [positions], in nats, never negative; 0 for the reference itself
    """

    surprise: Tensor
    top: Tensor
    divergence: Tensor


def judge(slabs: Iterable[Sequence[Tensor]], tokens: Tensor) -> list[Verdict]:
    """One verdict for each model; the first is the reference.

    slabs    logits [positions, part of the vocabulary] of each model, float32, in the order of the vocabulary
    tokens   those that came, [positions]
    Raises NumericsError when logits are not numbers.
    """
    sums: list[_Sums] = []
    begin = 0
    for slab in slabs:
        sums = sums or [_Sums(len(tokens), slab[0].device) for _ in slab]
        reference = sums[0].add(slab[0], tokens, begin)
        for model, logits in zip(sums[1:], slab[1:], strict=True):
            model.add(logits, tokens, begin)
            model.cross = model.cross * sums[0].shrunk + _cross(reference, slab[0], logits)
        begin += slab[0].shape[1]
    whole = sums[0].logarithm
    found = []
    for model in sums:
        # Rounding may leave a divergence a little below 0, which none is.
        divergence = (model.cross / sums[0].total - whole + model.logarithm).clamp(min=0.0)
        surprise = model.logarithm - model.token
        if bool(torch.isnan(surprise).any()):
            raise NumericsError(
                "The model's logits are not numbers. Its weights or activations left the range of their type."
            )
        found.append(
            Verdict(
                surprise=surprise.cpu(),
                top=model.top.cpu(),
                divergence=(divergence if model is not sums[0] else torch.zeros_like(divergence)).float().cpu(),
            )
        )
    return found


class _Sums:
    """What is known of one model's logits at each position, from the slabs so far.

    largest, top   m, and where it stands
    total          S; `logarithm` is m + log S
    cross          W
    token          the logit of the token that came
    shrunk         exp(m before the last slab - m)
    """

    def __init__(self, positions: int, device: torch.device) -> None:
        self.largest = torch.full((positions,), -math.inf, dtype=torch.float64, device=device)
        self.total, self.cross = torch.zeros_like(self.largest), torch.zeros_like(self.largest)
        self.token, self.shrunk = self.largest.clone(), self.largest
        self.top = torch.zeros(positions, dtype=torch.int64, device=device)

    @property
    def logarithm(self) -> Tensor:
        return self.largest + self.total.log()

    def add(self, logits: Tensor, tokens: Tensor, begin: int) -> Tensor:
        """Take in a slab; exp(logits - m) is returned."""
        largest, top = logits.max(dim=1)
        now = torch.maximum(self.largest, largest.double())
        self.top = torch.where(largest.double() > self.largest, begin + top, self.top)
        at = now.nan_to_num(neginf=0.0)  # where nothing is possible yet, -inf - -inf would be no number
        shares = (logits - at.float()[:, None]).exp_()
        self.shrunk = (self.largest - at).exp()
        self.total = self.total * self.shrunk + shares.sum(dim=1).double()
        self.largest = now
        inside = (tokens >= begin) & (tokens < begin + logits.shape[1])
        place = (tokens - begin).clamp(0, logits.shape[1] - 1)[:, None]
        self.token = torch.where(inside, logits.gather(1, place)[:, 0].double(), self.token)
        return shares


def _cross(shares: Tensor, reference: Tensor, logits: Tensor) -> Tensor:
    """The sum of shares * (reference - logits); a token the reference excludes adds nothing."""
    terms = (reference - logits).mul_(shares)
    return terms.masked_fill_(shares == 0, 0.0).sum(dim=1).double()
