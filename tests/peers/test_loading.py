"""Checkpoints that auto-round itself wrote, loaded by transformers' own call, here and where auto-round is."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import roundel
from inference.test_loading import IDS, expected, near, packed_layers, said
from roundel.checkpoint import open_checkpoint
from roundel.data.bundled import bundled_model
from roundel.matrices import errors_of
from roundel.scheme import PRESETS

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("ROUNDEL_PEERS", ROOT / ".peers")) / "auto-round" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="auto-round is not there: run `make peers`")
FORMATS = {"auto_round": True, "auto_gptq": False, "auto_awq": False}  # -> symmetric?
FLOATS = ("FP8_BLOCK", "FPW8A16")  # which auto-round writes and does not load
THEIRS = """
import roundel, sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__module__)
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    jobs = [
        {"name": name, "model": str(bundled_model()), "out": str(folder / name), "format": name, "scheme": "W4A16",
         "sym": sym, "group_size": 32, "route": "regular", "bf16": False, "enable_torch_compile": False}
        for name, sym in FORMATS.items()
    ]  # fmt: skip
    jobs += [
        {"name": name, "model": str(bundled_model()), "out": str(folder / name), "format": "auto_round", "scheme": name,
         "route": "regular", "bf16": True, "enable_torch_compile": False}
        for name in FLOATS
    ]  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [str(PYTHON), str(HERE / "run_auto_round.py"), str(folder / "jobs.json")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(json.loads(line)["ok"] for line in ran.stdout.splitlines()), ran.stdout
    return folder


@pytest.mark.parametrize("format_", list(FORMATS))
def test_they_say_what_they_decode_to(foreign: Path, format_: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(foreign / format_, dtype=torch.float32)
    assert len(packed_layers(model)) == 28
    assert near(said(model), expected(foreign / format_))
    assert torch.equal(said(model), said(roundel.load(foreign / format_)))
    assert torch.equal(said(model, IDS[:1, :1]), said(roundel.load(foreign / format_), IDS[:1, :1]))


@pytest.mark.parametrize("scheme", FLOATS)
def test_floats_that_only_it_writes(foreign: Path, scheme: str, tmp_path: Path) -> None:
    """Read as what they are, and ours have the same tensors and the same config, but for what we add."""
    theirs = open_checkpoint(foreign / scheme)
    read = {name: layer.scheme for name, layer in theirs.layers.items()}
    assert len(read) == 28 and set(read.values()) == {PRESETS[scheme]}
    for name in read:
        near_to = errors_of(open_checkpoint(bundled_model()).tensor(f"{name}.weight"), theirs.tensor(f"{name}.weight"))
        assert near_to.sqnr > 30
    assert torch.isfinite(said(roundel.load(foreign / scheme))).all()
    roundel.quantize(bundled_model(), tmp_path / "out", scheme=scheme)
    ours = open_checkpoint(tmp_path / "out")
    specs = [{n: (s.dtype, s.shape) for n, s in c.source.tensors.items()} for c in (ours, theirs)]
    assert specs[0] == specs[1]
    told, found = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (foreign / scheme, tmp_path / "out")
    )
    unread = {"autoround_version", "enable_quanted_input", "iters", "provider", "extra_config"}
    assert {k: v for k, v in told.items() if k not in unread} == {k: v for k, v in found.items() if k not in unread}


def test_where_auto_round_is_installed_it_stays(foreign: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [str(PYTHON), "-c", THEIRS, str(foreign / "auto_round")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and done.stdout.split()[-1].startswith(("auto_round", "gptqmodel")), done.stderr
