"""What enters the readers: counted over all tokens, kept for some, through readers that all tokens reach."""

from __future__ import annotations

import torch

from algorithms.blocks import BLOCK
from roundel.transforms.inputs import Rows, columns_to_channels, enter
from transforms.units import named, spacious


def test_rows_are_spread_over_the_whole_stream() -> None:
    stream = torch.arange(1000.0)[:, None]
    for limit in (1, 7, 64, 5000):
        for size in (1, 3, 250, 1000):
            rows = Rows(limit)
            for part in stream.split(size):
                rows.add(part)
            assert rows.seen == 1000
            assert torch.equal(rows.kept(), stream[:: rows.step])
            assert limit / 2 < len(rows.kept()) <= limit or limit > 1000


def test_statistics_are_those_of_all_tokens() -> None:
    unit = spacious(experts=4, shared=True, inner=32, samples=6)
    seen = enter(unit, unit.spaces, "float", lambda space: 10 if space.parent in space.readers else 0)
    entering = unit.entering()
    whole: dict[str, list[torch.Tensor]] = {}
    entering.observe(lambda name, x: whole.setdefault(name, []).append(x), {}, stream="float")
    for space in unit.spaces:
        x = torch.cat(
            whole[next(r for r in space.readers if r in whole and (".experts." not in r or "experts" in space.name))]
        )
        entered = seen[space.name]
        assert entered.tokens == len(x)
        assert torch.allclose(entered.mean(), x.abs().mean(0))
        assert entered.peak is not None
        assert torch.equal(entered.peak, x.abs().amax(0))
        assert (entered.rows is None) == (space.parent not in space.readers)
        if entered.rows is not None:
            assert torch.equal(entered.rows.kept(), x[:: entered.rows.step])
    assert seen[f"{BLOCK}.post_attention_layernorm"].tokens == 6 * 32
    assert seen[f"{BLOCK}.mlp.experts.1.up_proj"].tokens < 6 * 32


def test_columns_of_repeated_heads_are_one_channel() -> None:
    space = named(spacious(), "self_attn.v_proj")
    channels = torch.arange(32.0)
    columns = space.columns(channels)
    assert torch.equal(columns_to_channels(space, columns, largest=True), channels)
    columns[16:32] += 10  # the second head of queries that reads the first head of values
    assert torch.equal(columns_to_channels(space, columns, largest=True)[:16], channels[:16] + 10)
    assert torch.equal(columns_to_channels(space, columns, largest=False)[:16], channels[:16] + 5)
