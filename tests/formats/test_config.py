"""What `config` tells readers of layers that are no rule: kept in one block, outside the blocks, a tied head."""

from __future__ import annotations

import pytest

from roundel.formats import Contents, format_named
from roundel.scheme import PRESETS
from roundel.unit import Layer, Piece, Stored


def contents(*names: str, kept: tuple[str, ...] = (), scheme: str = "W4A16") -> Contents:
    layers = [
        Layer(
            name=name,
            shape=(64, 128),
            dtype="BF16",
            scheme=PRESETS[scheme],
            stored=Stored(parts={"weight": Piece(tensor=f"{name}.weight")}),
        )
        for name in names
    ]
    return Contents(layers=layers, kept=kept, default=PRESETS[scheme])


def test_gptq_names_a_layer_wholly_where_another_block_keeps_it() -> None:
    gptq = format_named("auto_gptq")
    both = ("model.layers.0.mlp.up", "model.layers.1.mlp.up")
    some = gptq.config(contents(*both, "model.layers.0.q", kept=("lm_head", "model.layers.1.q")))
    assert some["modules_in_block_to_quantize"] == [["mlp.up"], ["model.layers.0.q"]]
    assert some["dynamic"] == {r"-:^model\.layers\.1\.q$": {}}
    assert "modules_in_block_to_quantize" not in gptq.config(contents(*both, kept=("lm_head",)))


def test_auto_round_names_layers_outside_the_blocks() -> None:
    format = format_named("auto_round").settle(contents("model.layers.0.q", "model.project_in").layers)
    extra = format.config(contents("model.layers.0.q", "model.project_in"))["extra_config"]
    assert extra == {"model.project_in": {"bits": 4, "group_size": 128, "sym": True, "data_type": "int"}}


def test_compressed_tensors_ignores_a_tied_head() -> None:
    format = format_named("llm_compressor")
    kept = ("model.embed_tokens",)
    assert format.config(contents("model.layers.0.q", kept=kept, scheme="MXFP4"))["ignore"] == [*kept, "lm_head"]
    assert format.config(contents("model.layers.0.q", "lm_head", kept=kept, scheme="MXFP4"))["ignore"] == [*kept]


@pytest.mark.parametrize("scheme", PRESETS)
def test_compressed_tensors_ignores_all_that_is_kept(scheme: str) -> None:
    """auto-round's FP8_STATIC ignores nothing, so that readers wait for scales of the head."""
    format = format_named("llm_compressor")
    asked = contents("model.layers.0.q", kept=("lm_head", "model.layers.1.q"), scheme=scheme)
    if format.refuse(asked.layers[0]) is None:
        assert format.config(asked)["ignore"] == ["lm_head", "model.layers.1.q"]
