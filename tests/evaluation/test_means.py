"""Means and their errors against the spread that repeated draws show."""

from __future__ import annotations

import pytest
import torch

from roundel.evaluation.means import Mean, mean_of, percentile_of


def test_the_error_is_the_spread_of_repeated_draws() -> None:
    """Windows with something in common: positions taken as independent would claim an error four times smaller."""
    generator = torch.Generator().manual_seed(1)
    means, errors = [], []
    for _ in range(300):
        common = torch.randn(40, 1, generator=generator)
        found = mean_of(list(common + torch.randn(40, 16, generator=generator)))
        means.append(found.value)
        assert found.error is not None
        errors.append(found.error)
    assert sum(errors) / len(errors) == pytest.approx(float(torch.tensor(means).std()), rel=0.1)


def test_windows_of_different_lengths_weigh_as_their_positions() -> None:
    found = mean_of([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])])
    assert found.value == 4.0
    assert found.error == pytest.approx((2 * ((6 - 12) ** 2 + (10 - 4) ** 2)) ** 0.5 / 4)


def test_one_window_has_no_error() -> None:
    assert mean_of([torch.tensor([1.0, 2.0])]) == Mean(1.5, None)


def test_exp_moves_the_error_by_its_slope() -> None:
    assert Mean(2.0, 0.01).exp().error == pytest.approx(
        (Mean(2.01, None).exp().value - Mean(1.99, None).exp().value) / 2, rel=1e-4
    )


def test_percentile_and_its_error() -> None:
    generator, values, errors = torch.Generator().manual_seed(2), [], []
    for _ in range(200):
        found = percentile_of(list(torch.rand(50, 100, generator=generator)), 0.9)
        values.append(found.value)
        errors.append(found.error or 0.0)
    assert sum(values) / 200 == pytest.approx(0.9, abs=0.001)
    assert sum(errors) / 200 == pytest.approx(float(torch.tensor(values).std()), rel=0.2)
    assert percentile_of([torch.arange(100.0)], 0.999) == Mean(99.0, None)
