"""Models whose code ships inside the checkpoint: run only when that is allowed, and only as a plain chain of blocks."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.cases import tokens_of, weights_of
from models import pico
from roundel.calibration.skeleton import Skeleton
from roundel.checkpoint import open_checkpoint
from roundel.errors import PlanError
from roundel.families import family_of

# As such code was written before transformers 5: buffers and masks of its own, tuples, experts in a list.
CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class ShippedConfig(PretrainedConfig):
    model_type = "shipped"

    def __init__(self, hidden_size=64, num_hidden_layers=2, vocab_size=256, num_experts=4, **kwargs):
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.vocab_size, self.num_experts = vocab_size, num_experts
        super().__init__(**kwargs)


class Mixture(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.gate = nn.Linear(size, config.num_experts, bias=False)
        make = lambda: nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
        self.experts = nn.ModuleList([make() for _ in range(config.num_experts)])

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(flat[rows]) * weight[rows, None])
        return out.view_as(hidden_states)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.moe = Mixture(config)
        self.register_buffer("decay", 0.5 ** torch.arange(8).float(), persistent=False)

    def forward(self, hidden_states, mask, positions=None, extra=None, past=None):
        x = self.norm(hidden_states) * positions
        x = hidden_states + self.decay[0] * mask @ self.mix(x)
        x = x if extra is None else x + extra
        return x + self.moe(x), None


class ShippedForCausalLM(PreTrainedModel):
    config_class = ShippedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.register_buffer("waves", torch.outer(torch.arange(64).float(), torch.linspace(0, 1, 64)), persistent=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, use_cache=None, **kwargs):
        x = self.embed(input_ids)
        length = x.shape[1]
        mask = torch.tril(torch.ones(length, length, device=x.device)) / length
        positions = self.waves[:length, : x.shape[-1]].cos()
        for number, layer in enumerate(self.layers):
            x = layer(x, mask, positions=positions)[0]
        return CausalLMOutput(logits=self.lm_head(x))

    def get_output_embeddings(self):
        return self.lm_head
"""

WAVES = "torch.outer(torch.arange(64).float(), torch.linspace(0, 1, 64))"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of `CODE`'s model; transformers keeps copies of what it runs in a folder of its own."""
    import transformers.dynamic_module_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return write(tmp_path / tmp_path.name.replace("-", "_"), CODE)


def write(folder: Path, code: str) -> Path:
    folder.mkdir()
    (folder / "modeling_shipped.py").write_text(code)
    config = {
        "model_type": "shipped",
        "architectures": ["ShippedForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_shipped.ShippedConfig",
            "AutoModelForCausalLM": "modeling_shipped.ShippedForCausalLM",
        },
        "num_experts": 4,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(dict(model_of(folder).state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def model_of(folder: Path) -> Any:
    """The model, from its file, without transformers' loading."""
    spec = importlib.util.spec_from_file_location("modeling_shipped", folder / "modeling_shipped.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ShippedForCausalLM(module.ShippedConfig()).eval()


def skeleton_of(folder: Path, *, trust_remote_code: bool) -> tuple[Skeleton, dict[str, Tensor]]:
    checkpoint = open_checkpoint(folder)
    skeleton = Skeleton(
        checkpoint.source.config,
        replace(checkpoint.family, blocks=("layers",), embedding="embed.weight"),
        checkpoint.tensor_names,
        folder=folder,
        trust_remote_code=trust_remote_code,
    )
    weights = weights_of(skeleton, checkpoint)
    checkpoint.close()
    return skeleton, weights


def test_it_is_not_run_unless_that_is_allowed(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "was run"
    (folder / "modeling_shipped.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n" + CODE)
    with pytest.raises(PlanError, match=r"'shipped' needs code that ships inside the checkpoint.*--trust-remote-code"):
        skeleton_of(folder, trust_remote_code=False)
    assert not marker.exists()
    skeleton_of(folder, trust_remote_code=True)
    assert marker.exists()


def test_a_type_that_transformers_knows_runs_none_of_it(tmp_path: Path) -> None:
    config = pico.config_of("llama") | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    skeleton = Skeleton(config, family_of(config), pico.shapes_of("llama"), folder=tmp_path, trust_remote_code=True)
    assert type(skeleton._model).__name__ == "LlamaForCausalLM"


def test_its_logits_are_the_models(folder: Path) -> None:
    """Its own buffers are real numbers, which transformers' loading leaves to chance."""
    skeleton, weights = skeleton_of(folder, trust_remote_code=True)
    model = model_of(folder)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    for samples in (1, 3):
        tokens = tokens_of(samples)
        with torch.no_grad():
            x = skeleton.enter(tokens, weights)
            for piece in (*skeleton.blocks, skeleton.tail):
                x = piece.forward(x, weights)
            torch.testing.assert_close(x, model(tokens).logits, rtol=0, atol=1e-6)
    assert all(p.is_meta for p in skeleton._model.parameters())


def test_experts_in_a_list_can_be_shown_every_token(folder: Path) -> None:
    skeleton, weights = skeleton_of(folder, trust_remote_code=True)
    tokens, block = tokens_of(3), skeleton.blocks[1]
    with torch.no_grad():
        x = skeleton.blocks[0].forward(skeleton.enter(tokens, weights), weights)
    modules = [m for m in block.modules if ".experts." in m]
    assert len(modules) == 8
    counts: dict[str, int] = {}

    def count(module: str, seen: Tensor) -> None:
        counts[module] = counts.get(module, 0) + len(seen)

    block.observe(x, weights, count, modules)
    assert sum(counts.values()) == 2 * tokens.numel()
    counts.clear()
    block.observe(x, weights, count, modules, every_expert=True)
    assert counts == dict.fromkeys(modules, tokens.numel())


@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        ("positions=positions)[0]", "positions=positions)[0] * 2", "between decoder blocks 0 and 1 it does more"),
        (
            "positions=positions)",
            "positions=positions, extra=x)",
            r"layers\.0 is called with .*\(extra\) that depends on",
        ),
        ("positions=positions)", "positions=positions, extra=self.embed(input_ids))", "depends on the tokens"),
        ("positions=positions)", "positions=positions, extra=slice(3))", "cannot be run on hidden states alone"),
        ("positions=positions)", "positions=positions, past={})", r"with an argument \(past\) of type dict"),
        ("positions=positions)", "positions=positions, past=slice(3))", r"with an argument \(past\) of type slice"),
        (WAVES, "torch.empty(64, 64).fill_(2)", "computes the buffer waves in a way that"),
        (WAVES, "self.embed.weight[:64].clone()", "computes the buffer waves in a way that"),
    ],
)
def test_what_is_no_plain_chain_of_blocks_is_refused(
    written: str, instead: str, message: str, folder: Path, tmp_path: Path
) -> None:
    assert written in CODE
    (folder / "modeling_shipped.py").write_text(CODE.replace(written, instead))
    with pytest.raises(PlanError, match=message) as caught:
        skeleton, weights = skeleton_of(folder, trust_remote_code=True)
        skeleton.enter(tokens_of(2), weights)
    assert "opt-rtn" in str(caught.value)
