"""Files that llama.cpp's own converter and quantizer wrote decode to what its reader decodes them to.

Files and numbers were made by `tests/peers/make_golden.py gguf`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from formats.gguf_golden import GGUF, gguf_source
from roundel.checkpoint import open_checkpoint
from roundel.formats.gguf.architectures import settings_of
from roundel.formats.gguf.names import expert_of, row_order, rows_permuted, tensor_name
from roundel.scheme import BLOCK_GRIDS
from roundel.verification import verify

GOLDEN = Path(__file__).parents[1] / "data" / "golden_gguf"
ARCHITECTURES = {"llama": "llama", "qwen3_moe": "qwen3moe", "deepseek_v3": "deepseek2"}
FILES = [(kind, hidden, mixture) for kind, hidden, mixtures in GGUF for mixture in mixtures.split()]


@pytest.mark.parametrize(("model_type", "hidden", "mixture"), FILES, ids=[mixture for _, _, mixture in FILES])
def test_decodes_to_the_same_numbers(model_type: str, hidden: int, mixture: str, tmp_path: Path) -> None:
    path, known = GOLDEN / f"{mixture}.gguf", ARCHITECTURES[model_type]
    checkpoint = open_checkpoint(path)
    settings = settings_of(checkpoint.source.config)
    seen = set()
    with np.load(path.with_suffix(".npz")) as decoded:
        for name in checkpoint.layers:
            theirs = tensor_name(f"{name}.weight", known)
            assert theirs is not None
            expert, heads = expert_of(f"{name}.weight"), rows_permuted(f"{name}.weight", settings, known)
            expected = torch.from_numpy(decoded[theirs])
            if expert is not None and expert >= len(expected):
                continue
            found, cut = checkpoint.decode(name), checkpoint.matrices[name].cut
            if cut is not None:
                expected = expected.flatten(0, 1)
            found = found if heads is None else found[torch.from_numpy(row_order(*heads))]
            wanted = expected if expert is None else expected[expert]
            assert torch.equal(found[: len(wanted)], wanted), name
            seen.add(theirs)
        assert seen == set(decoded.files)
    checkpoint.close()
    against = verify(path, gguf_source(model_type, hidden, tmp_path))
    assert against.passed and (against.mean_sqnr or 0) > 5


def test_every_type_is_in_a_file() -> None:
    found = set()
    for _, _, mixture in FILES:
        checkpoint = open_checkpoint(GOLDEN / f"{mixture}.gguf")
        found |= {layer.scheme.name.removeprefix("GGUF:") for layer in checkpoint.layers.values()}
        checkpoint.close()
    assert found == set(BLOCK_GRIDS)
