"""The second moment of what enters a layer, and its factors. Definitions; plain torch on any device, float32.

H = X^T X / tokens, [in, in], is the Hessian of a layer's squared output error in each of its rows (GPTQ, Frantar et al.
2022, arXiv:2210.17323, section 3). Rounding with feedback needs it as U D U^T with U unit upper triangular (QuIP, Chee
et al. 2023, arXiv:2307.13304, equation 4): a third of the work of the inverse's Cholesky factor that GPTQ's text asks
for, and the same rounding (QuIP, theorem 6).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Factors", "add_outer", "factorize", "fitting_damping", "mirror", "proxy_loss"]

PARTS = 8  # column blocks of the accumulation: with 8 of them 9/16 of the products of the full matrix are computed
BLOCK = 256  # columns factored at a time
FLOORS = 6  # rungs of the ladder's second part


def add_outer(total: Tensor, x: Tensor) -> None:
    """total += x^T x, in blocks on and above the diagonal; `mirror` completes it.

    total   [in, in] float32, changed in place
    x       [tokens, in], any float dtype; multiplied as float32
    """
    x = x.float()
    width = x.shape[1]
    step = max(BLOCK, -(-width // PARTS))
    for start in range(0, width, step):
        total[start : start + step, start:].addmm_(x[:, start : start + step].T, x[:, start:])


def mirror(total: Tensor) -> None:
    """Copy what is above the diagonal below it, in place."""
    width = total.shape[0]
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        total[end:, start:end] = total[start:end, end:].T
        corner = total[start:end, start:end]
        total[start:end, start:end] = corner.triu() + corner.triu(1).T


def fitting_damping(hessian: Tensor, fourth: float, tokens: int) -> float:
    """The damping that brings a Hessian of few tokens nearest to that of all tokens there could be, in expectation.

    Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", section 3: the best
    mixture  (1 - r) H + r m I,  m the mean diagonal, has  r = b / d  with  b  the expected square of H's own error and
    d  the squared distance of H from m I. A factor on the Hessian changes nothing, so r is damping by  r / (1 - r).

    hessian   [in, in], the mean of x x^T over `tokens` tokens
    fourth    sum of |x|^4 over them
    returns   a share of the mean diagonal, 0 to 1000
    """
    mean = float(hessian.diagonal().mean(dtype=torch.float64))
    slabs = (hessian[start : start + BLOCK] for start in range(0, len(hessian), BLOCK))
    square = float(sum(slab.square().sum(dtype=torch.float64) for slab in slabs))
    distance = square - len(hessian) * mean * mean
    own_error = (fourth / tokens - square) / max(1, tokens - 1)
    if not 0 < own_error < distance * 0.999:
        return 0.0 if own_error <= 0 else 1000.0
    return own_error / (distance - own_error)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """H[order][:, order] + diag(added) = U diag(strength) U^T.

    order      [in] int64: the columns in the order they are rounded in
    upper      [in, in] float32: U above its diagonal of ones; what stands on and below the diagonal means nothing
    strength   [in] float32: what a squared rounding error of each column costs, once later columns have answered it
    added      [in] float32: damping, and what stands in for columns that saw nothing
    damping    the share of the mean diagonal that was added
    """

    order: Tensor
    upper: Tensor
    strength: Tensor
    added: Tensor
    damping: float


def factorize(hessian: Tensor, order: Tensor, damping: float, step: float) -> Factors | None:
    """The factors of a Hessian whose columns are taken in `order`; None where no damping makes it positive definite.

    hessian   [in, in] float32, symmetric; its memory becomes that of the factors
    damping   the share of the mean diagonal added to every entry of it (GPTQ: percdamp). Where that is not enough,
              step, 2 * step, 4 * step ... are added on top, up to 1; then small entries are also raised to 1e-6,
              1e-5 ... of the largest
    Columns that saw nothing (diagonal 0) count as average ones: they neither take nor give feedback.
    """
    for start in range(0, len(order), BLOCK):  # a slab at a time, so that the matrix is not held twice
        hessian[:, start : start + BLOCK] = hessian[:, start : start + BLOCK][order]
    for start in range(0, len(order), BLOCK):
        hessian[start : start + BLOCK] = hessian[start : start + BLOCK][:, order]
    diagonal = hessian.diagonal().clone()
    dead = diagonal <= 0
    if not bool(torch.isfinite(diagonal).all()) or bool(dead.all()):
        return None
    filled = torch.where(dead, diagonal[~dead].mean(), diagonal)
    for share, floor in _rungs(damping, step):
        damped = filled.clamp(min=floor * float(filled.max())) + share * filled.mean()
        if _factor(hessian, damped):
            roots = hessian.diagonal().clone()
            hessian /= roots
            return Factors(
                order=order,
                upper=hessian,
                strength=roots.square(),
                added=torch.where(dead, damped, damped - diagonal),
                damping=share,
            )
    return None


def proxy_loss(error: Tensor, factors: Factors) -> Tensor:
    """e^T (H + diag(added)) e of each row, [rows] float64, for errors [in, rows] in rounding order."""
    upper, total = factors.upper, torch.zeros(error.shape[1], dtype=torch.float64, device=error.device)
    for start in range(0, len(error), BLOCK):
        end = min(start + BLOCK, len(error))
        corner = upper[start:end, start:end].triu(1).T
        fed = torch.addmm(error[start:end], corner, error[start:end])
        fed.addmm_(upper[:start, start:end].T, error[:start])
        total += (factors.strength[start:end, None] * fed.square()).sum(0, dtype=torch.float64)
    return total


def _rungs(damping: float, step: float) -> Iterator[tuple[float, float]]:
    """(share of the mean, floor as a share of the largest), from the gentlest on."""
    yield damping, 0.0
    more = step
    while damping + more < 1:
        yield damping + more, 0.0
        more *= 2
    yield from ((max(1.0, damping), 10.0 ** (rung - FLOORS) if rung else 0.0) for rung in range(FLOORS))


def _factor(matrix: Tensor, diagonal: Tensor) -> bool:
    """Turn the upper triangle into R with R R^T = matrix, from the last column to the first; False if it has none.

    What stands below the diagonal is the matrix itself and is kept, so that another diagonal can be tried.
    """
    width = matrix.shape[0]
    for end in range(width, 0, -BLOCK):
        start = max(0, end - BLOCK)
        matrix[:start, start:end] = matrix[start:end, :start].T
        corner = matrix[start:end, start:end].tril(-1)
        corner = corner + corner.T + torch.diag(diagonal[start:end])
        if end < width:
            matrix[:start, start:end].addmm_(matrix[:start, end:], matrix[start:end, end:].T, alpha=-1)
            corner.addmm_(matrix[start:end, end:], matrix[start:end, end:].T, alpha=-1)
        lower, bad = torch.linalg.cholesky_ex(corner.flip(0, 1))
        if int(bad) or not bool(torch.isfinite(lower.diagonal()).all()):
            return False
        root = lower.flip(0, 1)
        matrix[start:end, start:end].tril_(-1).add_(root)
        matrix[:start, start:end] = torch.linalg.solve_triangular(
            root.T, matrix[:start, start:end], upper=False, left=False
        )
    return True
