"""One pass over a matrix: the kernels say what the definitions say."""

from __future__ import annotations

import pytest
import torch

from roundel.ops.losses import first_not_finite, squares

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("reference", [False, True])
def test_the_first_weight_that_is_not_finite(
    dtype: torch.dtype, value: float, reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUNDEL_REFERENCE", "1" if reference else "0")
    weight = torch.randn(37, 53, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3, 5] = torch.finfo(dtype).max
    weight[4, 5] = torch.finfo(dtype).min
    assert first_not_finite(weight) is None
    weight[31, 52] = value
    assert first_not_finite(weight) == (31, 52)
    weight[31, 7] = weight[36, 0] = value
    assert first_not_finite(weight) == (31, 7)
    assert first_not_finite(weight.T) == (0, 36)
    assert first_not_finite(weight[:0]) is None


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_squares_of_weights_and_errors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(101, 77, generator=torch.Generator().manual_seed(1)).to(dtype)
    decoded = weight.float() + 0.01 * torch.randn(101, 77, generator=torch.Generator().manual_seed(2))
    expected = weight.double().square().sum(), (weight.double() - decoded.double()).square().sum()
    for reference in ("0", "1"):
        monkeypatch.setenv("ROUNDEL_REFERENCE", reference)
        assert squares(weight, decoded) == pytest.approx(tuple(map(float, expected)), rel=1e-12)
    assert squares(weight.T, decoded.T) == pytest.approx(tuple(map(float, expected)), rel=1e-12)
