"""What the search of ggml's block types finds beside ggml's own: never worse, on real weights, on every type."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from roundel.checkpoint import open_checkpoint
from roundel.data.bundled import bundled_model
from roundel.formats.gguf.block_types import BLOCK_TYPES
from roundel.ops.encode import encode, encode_blocks
from roundel.ops.search import search
from roundel.ops.weighted_error import squared_error
from roundel.scheme import BLOCK_GRIDS

NAMES = ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj")


def real_weights() -> list[Tensor]:
    checkpoint = open_checkpoint(bundled_model())
    found = [checkpoint.tensor(f"model.layers.{i}.{name}.weight").float() for i, name in enumerate(NAMES)]
    checkpoint.close()
    return [weight[:, : weight.shape[1] // 256 * 256][:96].contiguous() for weight in found]


def importance_of(width: int) -> Tensor:
    return torch.exp(1.5 * torch.randn(width, generator=torch.Generator().manual_seed(width)))


@pytest.mark.parametrize("name", list(BLOCK_GRIDS))
def test_no_tensor_errs_more_than_ggml_s(name: str) -> None:
    grid = BLOCK_GRIDS[name]
    gained = False
    for weight in real_weights():
        for importance in (None, importance_of(weight.shape[1])):
            found = search(weight, grid, importance)
            ggml = [squared_error(weight, encode(weight, grid), importance)]
            if importance is not None:
                ggml.append(squared_error(weight, encode_blocks(weight, grid, importance), importance))
            assert found.error == squared_error(weight, found.tensor, importance)
            assert found.error <= min(ggml) * (1 + 1e-12)
            gained |= found.error < 0.99 * min(ggml)
            stored = BLOCK_TYPES[name].unpack(BLOCK_TYPES[name].pack(found.tensor))
            assert torch.equal(stored.decode(), found.tensor.decode())
    assert gained, "the search finds something"


@pytest.mark.parametrize("name", [n for n in BLOCK_GRIDS if n != "MXFP4"])
def test_blocks_of_every_kind_stay_sound(name: str) -> None:
    """Zeros, one value, one outlier, numbers that float16 cannot hold, and those below its least."""
    grid = BLOCK_GRIDS[name]
    drawn = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    one = torch.zeros(1, 256)
    one[0, 7] = -3.0
    weight = torch.cat([torch.zeros(1, 256), torch.full((1, 256), 0.25), one, drawn * 1e-7, drawn * 1e4, drawn])
    found = search(weight, grid)
    decoded = found.tensor.decode()
    assert bool(torch.isfinite(decoded).all()) and not decoded[0].any()
    plain = encode(weight, grid).decode()
    worse = (decoded.double() - weight).square().sum(1) > (plain.double() - weight).square().sum(1) * (1 + 1e-12)
    assert not worse.any()


@pytest.mark.parametrize("name", ["Q4_0", "Q2_K", "Q3_K", "Q4_K", "IQ4_XS"])
def test_rows_do_not_know_each_other(name: str) -> None:
    weight, grid = torch.randn(300, 512, generator=torch.Generator().manual_seed(2)), BLOCK_GRIDS[name]
    importance = importance_of(512)
    whole = search(weight, grid, importance, threads=2).tensor.decode()
    parts = [search(weight[i : i + 100], grid, importance).tensor.decode() for i in (0, 100, 200)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("name", [n for n in BLOCK_GRIDS if BLOCK_GRIDS[n].element.values is None])
def test_the_kernel_is_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = BLOCK_GRIDS[name]
    drawn = torch.randn(7, 768, generator=torch.Generator().manual_seed(4)) * 0.03
    drawn[1, :256], drawn[2, 32:64], drawn[3] = 0.0, 0.5, drawn[3] * 1e5
    for importance in (None, importance_of(768)):
        monkeypatch.delenv("ROUNDEL_REFERENCE", raising=False)
        fast = search(drawn, grid, importance).tensor
        monkeypatch.setenv("ROUNDEL_REFERENCE", "1")
        slow = search(drawn, grid, importance).tensor
        assert torch.equal(BLOCK_TYPES[name].pack(fast), BLOCK_TYPES[name].pack(slow))
