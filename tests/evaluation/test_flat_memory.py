"""Memory of a model that is measured: that of a block."""

from __future__ import annotations

import json
from pathlib import Path

from models.pico import build
from peaks import SHAPE, run, where_peaks_are_told


@where_peaks_are_told
def test_measuring_four_times_the_layers_takes_the_same_memory(tmp_path: Path) -> None:
    text, peaks = tmp_path / "ids.jsonl", {}
    text.write_text(json.dumps({"input_ids": [n % 251 for n in range(1024)]}))
    for layers in (4, 16):
        model = build("llama", tmp_path / f"m{layers}", num_hidden_layers=layers, **SHAPE)
        run("quantize", str(model), str(tmp_path / f"o{layers}"), "--workers", "2")
        options = ("--ppl", str(text), "--window", "128", "--kl-against", str(model))
        run("eval", str(tmp_path / f"o{layers}"), *options)  # compiles kernels, where nobody has
        peaks[layers] = int(run("eval", str(tmp_path / f"o{layers}"), *options).split()[-1])
    assert peaks[16] < 1.1 * peaks[4], peaks
