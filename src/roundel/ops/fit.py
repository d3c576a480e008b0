"""The range of each block of weights -> its scale and zero point. Definitions, in float32.

Sources: the symmetric and asymmetric integer rules are auto-round's plain rounding in float32 (its model-free mode);
powers of two follow the OCP Microscaling Formats specification 1.0, section 6.3. What is fitted here knows nothing of
codes; `encode` rounds to them. FP8's rule is the one that llm-compressor and auto-round share.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from roundel.scheme import Grid
from roundel.tensor import torch_dtype

__all__ = [
    "SMALLEST_SCALE",
    "blocked",
    "fit_asymmetric",
    "fit_float_zero",
    "fit_largest",
    "fit_power_of_two",
    "fit_symmetric",
    "grouped",
]

SMALLEST_SCALE = 1e-5  # auto-round's q_scale_thresh; in float16 this is 1.00136e-5


def grouped(weight: Tensor, columns: int) -> Tensor:
    """[out, in] -> [out, groups, columns], the last group filled with zeros."""
    out, width = weight.shape
    groups = -(-width // columns)
    padded = functional.pad(weight, (0, groups * columns - width))
    return padded.view(out, groups, columns)


def blocked(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """[out, in] -> [out / rows, in / columns, rows * columns], blocks cut short by the matrix filled with zeros."""
    rows, columns = block
    out, width = weight.shape
    down, across = -(-out // rows), -(-width // columns)
    padded = functional.pad(weight, (0, across * columns - width, 0, down * rows - out))
    return padded.view(down, rows, across, columns).transpose(1, 2).flatten(2)


def fit_largest(groups: Tensor, grid: Grid) -> Tensor:
    """Scales of floats: the weight of largest magnitude becomes the element's largest value.

    groups   [..., n] float32
    returns  [...] in the grid's dtype of scales, max|w| / hi, at least 1 / (512 * hi) as auto-round has it
    """
    smallest = 1.0 / (512.0 * grid.element.hi)
    assert isinstance(grid.scale, str), "a scale that is quantized itself is fitted with its grid"
    return (groups.abs().amax(-1) / grid.element.hi).clamp(min=smallest).to(torch_dtype(grid.scale))


def fit_symmetric(groups: Tensor, bits: int) -> Tensor:
    """Full-range symmetric scales: the weight of largest magnitude lands exactly on the lowest code.

    groups   [..., n] float32
    returns  [...] float16, signed: negative where the positive side is the larger (and on ties),
             scale = ±max|w| / 2^(bits-1), at least SMALLEST_SCALE in magnitude
    """
    highest = groups.amax(-1).clamp(min=0)
    lowest = -groups.amin(-1).clamp(max=0)
    extreme = torch.where(lowest > highest, lowest, -highest)
    scale = (extreme / 2 ** (bits - 1)).to(torch.float16)
    smallest = torch.tensor(SMALLEST_SCALE, dtype=torch.float16, device=scale.device)
    return torch.where(scale < 0, torch.minimum(scale, -smallest), torch.maximum(scale, smallest))


def fit_asymmetric(groups: Tensor, bits: int, lowest_zero: int = 0) -> tuple[Tensor, Tensor]:
    """Scales and zero points for unsigned codes: the range, widened to hold 0, is spread over all codes.

    groups   [..., n] float32
    returns  scale [...] float16 = (max - min) / (2^bits - 1), at least SMALLEST_SCALE;
             zero [...] uint8 = round(-min / scale), half to even. Where it would be below lowest_zero (nothing in the
             group is clearly negative), it is lowest_zero and the range is spread over the codes above it
    """
    highest = groups.amax(-1).clamp(min=0)
    lowest = groups.amin(-1).clamp(max=0)
    largest_code = 2**bits - 1
    smallest = torch.tensor(SMALLEST_SCALE, dtype=torch.float16).item()
    scale = ((highest - lowest) / largest_code).to(torch.float16).clamp(min=smallest)
    zero = torch.round(-lowest / scale.float())
    narrow = ((highest - lowest) / (largest_code - lowest_zero)).to(torch.float16).clamp(min=smallest)
    scale = torch.where(zero < lowest_zero, narrow, scale)
    return scale, zero.clamp(lowest_zero, largest_code).to(torch.uint8)


def fit_float_zero(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points that are no codes, both float16: `fit_asymmetric`'s range with zero = -min / scale.

    One bit has the mean and, on each side of it, the mean distance from it (Rastegari et al. 2016, arXiv:1603.05279,
    equation 6, about the mean): of a range's two ends most weights are far. What fills a short last group counts there.
    """
    smallest = torch.tensor(SMALLEST_SCALE, dtype=torch.float16).item()
    if bits == 1:
        middle = groups.mean(-1)
        size = (groups - middle[..., None]).abs().mean(-1)
        lowest, highest = middle - size, middle + size
    else:
        lowest, highest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((highest - lowest) / (2**bits - 1)).to(torch.float16).clamp(min=smallest)
    return scale, (-lowest / scale.float()).to(torch.float16)


def fit_power_of_two(groups: Tensor, grid: Grid) -> Tensor:
    """Shared exponents of the MX formats as E8M0 bytes (exponent + 127).

    groups   [..., n] float32
    returns  [...] uint8. With "floor", exponent = floor(log2 max|w|) - emax, emax being the exponent of the element's
             largest value; with "rceil", ceil(log2(max|w| / largest value)). An all-zero block takes the exponent
             that max|w| = 2 would ("floor") or 1 ("rceil"), as auto-round writes it.
    """
    largest = groups.abs().amax(-1)
    if grid.exponent == "rceil":
        mantissa, exponent = torch.frexp(largest / grid.element.hi)
        found = torch.where(mantissa == 0.5, exponent - 1, exponent)
        found = torch.where(largest == 0, torch.ones_like(found), found)
    else:
        emax = int(torch.frexp(torch.tensor(grid.element.hi, dtype=torch.float32)).exponent) - 1
        found = torch.where(largest == 0, torch.full_like(largest, 2.0), largest)
        found = torch.frexp(found).exponent - 1 - emax
    return (found.clamp(-127, 127) + 127).to(torch.uint8)
