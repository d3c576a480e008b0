"""Hessians: accumulation, factors, the ladder of dampings, and the loss they state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from roundel.ops import hessian as module
from roundel.ops.hessian import add_outer, factorize, fitting_damping, mirror, proxy_loss


def moments(width: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return x.T @ x / tokens


@pytest.fixture(params=[256, 16], ids=["one block", "several blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "BLOCK", request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulated_in_parts_it_is_the_product(block: int, dtype: torch.dtype) -> None:
    total, x = torch.zeros(70, 70), torch.randint(-9, 10, (3, 40, 70)).to(dtype)  # whole: sums in any order are equal
    for each in x:
        add_outer(total, each)
    mirror(total)
    whole = x.flatten(0, 1).float()
    assert torch.equal(total, whole.T @ whole)
    assert torch.equal(total, total.T)


def test_factors_are_the_hessian(block: int) -> None:
    hessian = moments(70, 300)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    factors = factorize(hessian.clone(), order, damping=0.02, step=0.01)
    assert factors is not None
    assert factors.damping == 0.02
    unit = factors.upper.triu(1) + torch.eye(70)
    permuted = hessian[order][:, order]
    torch.testing.assert_close(
        unit @ torch.diag(factors.strength) @ unit.T, permuted + torch.diag(factors.added), rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(factors.added, torch.full((70,), 0.02 * float(hessian.diagonal().mean())))


def test_the_loss_is_the_quadratic_form(block: int) -> None:
    hessian = moments(70, 300)
    hessian[7], hessian[:, 7] = 0, 0  # a column that saw nothing counts as an average one
    order = torch.randperm(70)
    factors = factorize(hessian.clone(), order, damping=0.3, step=0.01)
    assert factors is not None
    error = torch.randn(5, 70)
    mean = hessian.diagonal().sum() / 69
    damped = hessian + torch.diag(torch.where(hessian.diagonal() == 0, 1.3, 0.3) * mean)
    exact = ((error @ damped) * error).sum(1)
    torch.testing.assert_close(proxy_loss(error[:, order].T.contiguous(), factors).float(), exact, rtol=1e-4, atol=1e-3)


def test_damping_fits_the_number_of_tokens() -> None:
    """The damped Hessian of few tokens is nearest to the true one about where it is said to be."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(160, 160, generator=generator) @ torch.diag(torch.exp(torch.randn(160, generator=generator)))
    true = mixing.T @ mixing
    for tokens in (16, 48, 200):
        damped_so, undamped, best = 0.0, 0.0, 0.0
        for _ in range(10):
            x = torch.randn(tokens, 160, generator=generator) @ mixing
            few = x.T @ x / tokens

            def away(share: float, few: Tensor = few) -> float:
                """The distance from the true Hessian, at the best common factor."""
                damped = few + share * few.diagonal().mean() * torch.eye(160)
                return 1 - float((damped * true).sum() ** 2 / damped.square().sum() / true.square().sum())

            damped_so += away(fitting_damping(few, float(x.square().sum(1).square().sum()), tokens))
            undamped += away(0.0)
            best += min(away(share) for share in torch.logspace(-3, 2, 40).tolist())
        assert damped_so < 1.02 * best
        assert damped_so < undamped
    assert fitting_damping(torch.eye(48), 48.0 * 48 * 100, 100) == 1000.0  # nothing but noise
    assert fitting_damping(torch.eye(48) * 0, 0.0, 0 + 1) == 0.0


def test_columns_that_saw_nothing_take_and_give_no_feedback() -> None:
    hessian = moments(32, 100)
    hessian[[3, 9]], hessian[:, [3, 9]] = 0, 0
    factors = factorize(hessian, torch.arange(32), damping=0.01, step=0.01)
    assert factors is not None
    upper = factors.upper.triu(1)
    assert (upper[[3, 9]] == 0).all()
    assert (upper[:, [3, 9]] == 0).all()
    assert (factors.strength[[3, 9]] > 0).all()


def test_a_singular_hessian_is_damped(block: int) -> None:
    factors = factorize(moments(64, 5), torch.arange(64), damping=0.01, step=0.01)  # 5 tokens, 64 columns
    assert factors is not None
    assert factors.damping == 0.01
    undamped = factorize(torch.ones(64, 64), torch.arange(64), damping=0.0, step=0.01)
    assert undamped is not None
    assert undamped.damping > 0


def test_the_ladder_climbs_until_it_holds(block: int) -> None:
    """A matrix that no sum of squares makes: its smallest eigenvalue is -0.1 of the mean diagonal."""
    hessian = moments(48, 200)
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = -0.1 * hessian.diagonal().mean()
    broken = vectors @ torch.diag(values) @ vectors.T
    broken = (broken + broken.T) / 2
    factors = factorize(broken.clone(), torch.arange(48), damping=0.01, step=0.01)
    assert factors is not None
    assert 0.1 < factors.damping < 0.4  # 0.01 plus the first of .01, .02, .04 ... that is enough
    unit = factors.upper.triu(1) + torch.eye(48)
    made = unit @ torch.diag(factors.strength) @ unit.T
    torch.testing.assert_close(made, broken + torch.diag(factors.added), rtol=1e-3, atol=1e-3)


def test_floors_come_after_damping(block: int) -> None:
    hessian = torch.eye(48) * 1e-8
    hessian[0, 0] = 1.0
    hessian[1, 2] = hessian[2, 1] = 0.05  # far more than the geometric mean of its diagonal entries
    factors = factorize(hessian, torch.arange(48), damping=0.0, step=0.01)
    assert factors is not None
    assert factors.damping == 1.0
    assert factors.added[1] > 0.05


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_what_cannot_be_factored_is_told_not_raised(value: float) -> None:
    assert factorize(torch.full((16, 16), value), torch.arange(16), damping=0.01, step=0.01) is None
    hopeless = -1e6 * (torch.ones(16, 16) - torch.eye(16)) + torch.eye(16)
    assert factorize(hopeless, torch.arange(16), damping=0.01, step=0.01) is None
