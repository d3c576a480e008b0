"""transformers' own loading call on rounded checkpoints: the same model as `roundel.load`, bit for bit."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoRoundConfig,
    BitsAndBytesConfig,
)
from transformers.quantizers import auto

import roundel
from commands import process
from models import pico
from models.raw import plant
from roundel.data.bundled import bundled_model
from roundel.errors import BackendError, PlanError, SourceError
from roundel.inference import registration
from roundel.inference.linear import QuantLinear

IDS = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(0))
ORDERS = ("import roundel, transformers", "import transformers.modeling_utils, roundel")
LIGHT = "import sys, roundel; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
PROGRAM = """
{order}
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert sum(type(module).__name__ == 'QuantLinear' for module in model.modules()) == 14
assert model.dtype == torch.bfloat16
print(model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False).shape)
"""


def made(model_type: str, folder: Path, **wishes: Any) -> Path:
    """A rounded pico checkpoint."""
    config = {"quantization_config": None} if model_type == "gpt_oss" else {}
    source = pico.build(model_type, folder / "source", **config)
    roundel.quantize(source, folder / "out", workers=1, **({"scheme": "W4A16G32"} | wishes))
    return folder / "out"


def said(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def packed(model: Any) -> dict[str, str]:
    """Rounded layers, and their backends."""
    return {m.name: m.backend for m in model.modules() if isinstance(m, QuantLinear)}


def agree(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    config, kind = AutoConfig.from_pretrained(folder), AutoModelForCausalLM
    if type(config) not in AutoModelForCausalLM._model_mapping:
        kind = AutoModelForImageTextToText
    model, ours = kind.from_pretrained(folder, dtype=dtype), roundel.load(folder, dtype=dtype)
    assert packed(model) == packed(ours) != {}
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not model.training
    assert said(model).dtype == dtype and torch.equal(said(model), said(ours))


@pytest.mark.parametrize("model_type", [t for t in pico.PICO_TYPES if t != "gpt2"])
def test_every_family(model_type: str, tmp_path: Path) -> None:
    agree(made(model_type, tmp_path))


@pytest.mark.parametrize(
    ("scheme", "format_"),
    [
        ("W2A16G32", "auto_round"), ("W5A16G32_ASYM", "auto_round"), ("MXFP4", "auto_round"), ("MXFP8", "auto_round"),
        ("W4A16G32", "auto_gptq"), ("W3A16G32_ASYM", "gptq_v2"), ("W4A16G32_ASYM", "auto_awq"),
        ("W4A16G32", "llm_compressor"), ("W8A16G32_ASYM", "llm_compressor"), ("NVFP4A16", "llm_compressor"),
        ("FP8_BLOCK", "llm_compressor"), ("MXFP8", "llm_compressor"), ("FP8_BLOCK", "fp8"), ("NF4", "bnb"),
        ("FP4", "bnb"), ("W4A16G64", "hqq"), ("W4A16G32", "mlx"), ("MXFP4A16", "mlx"), ("W3A16G64", "auto_round:mlx"),
    ],
)  # fmt: skip
def test_every_format(scheme: str, format_: str, tmp_path: Path) -> None:
    roundel.quantize(bundled_model(), tmp_path, scheme=scheme, format=format_, workers=1)
    agree(tmp_path)
    agree(tmp_path, torch.bfloat16)


@pytest.mark.parametrize("kind", ["fp8 block", "fp8 channel", "mxfp4", "nvfp4", "modelopt", "gpt_oss"])
def test_checkpoints_of_other_tools(kind: str, tmp_path: Path) -> None:
    pico.build_foreign(kind, tmp_path)
    agree(tmp_path)


def test_mixed_widths_and_a_rounded_head(tmp_path: Path) -> None:
    mix = {"down_proj": {"bits": 8}, "k_proj": {"bits": 5}, "q_proj": {"bits": 16}}
    agree(made("gemma2", tmp_path, layer_config=mix, quant_lm_head=True))


def test_a_model_without_its_head(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(made("qwen3", tmp_path), dtype=torch.float32)
    whole = roundel.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS)[0], whole.model(input_ids=IDS)[0])


@pytest.mark.parametrize("order", ORDERS)
def test_either_is_imported_first(order: str, tmp_path: Path) -> None:
    done = process("-W", "error", "-c", PROGRAM.format(order=order), made("llama", tmp_path))
    assert done.code == 0 and "torch.Size([1, 6])" in done.output, done.error


def test_importing_roundel_imports_neither_torch_nor_transformers() -> None:
    assert process("-c", LIGHT).code == 0


@pytest.fixture
def tables() -> Iterator[None]:
    """transformers' tables are as they were, afterwards."""
    configs, quantizers = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), dict(auto.AUTO_QUANTIZER_MAPPING)
    yield
    for table, before in (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, configs),
        (auto.AUTO_QUANTIZER_MAPPING, quantizers),
    ):
        table.clear()
        table.update(before)


@pytest.mark.usefixtures("tables")
def test_what_is_installed_stays_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers.quantizer_auto_round import AutoRoundQuantizer

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    registration.register()
    assert auto.AUTO_QUANTIZER_MAPPING["auto-round"] is AutoRoundQuantizer
    assert auto.AUTO_QUANTIZER_MAPPING["hqq"].theirs is not None  # transformers loads no such checkpoint, hqq or not
    registration.register(always=True)
    assert auto.AUTO_QUANTIZER_MAPPING["auto-round"].theirs is AutoRoundQuantizer
    registration.register(always=True)
    assert auto.AUTO_QUANTIZER_MAPPING["auto-round"].theirs is AutoRoundQuantizer
    registration.register()
    assert auto.AUTO_QUANTIZER_MAPPING["auto-round"] is AutoRoundQuantizer


def test_rounding_while_loading_and_decoding_stay_theirs(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="bitsandbytes"):
        AutoModelForCausalLM.from_pretrained(bundled_model(), quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    theirs = auto.AUTO_QUANTIZER_MAPPING["fp8"].theirs
    config = auto.AutoQuantizationConfig.from_dict({"quant_method": "fp8", "weight_block_size": [128, 128]})
    config.dequantize = True
    assert type(auto.AutoHfQuantizer.from_config(config)) is theirs


def test_a_backend_is_named_in_the_config(tmp_path: Path) -> None:
    folder = made("llama", tmp_path)
    with pytest.warns(UserWarning, match="loading attributes"):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=AutoRoundConfig(backend="torch"))
    assert set(packed(model).values()) == {"torch"}


def test_a_model_is_on_one_device(tmp_path: Path) -> None:
    from roundel.inference.quantizer import Packed

    loader = Packed(AutoRoundConfig())
    assert loader.update_device_map(None) is None
    assert loader.update_device_map({"": "cpu"}) == {"": "cpu"}
    assert len(loader.update_device_map("auto")) == 1
    with pytest.raises(BackendError, match="names cuda:0, disk, and rounded layers are loaded for one device"):
        loader.update_device_map({"model": "cuda:0", "lm_head": "disk"})


def test_it_stays_as_it_was_loaded(tmp_path: Path) -> None:
    folder = made("llama", tmp_path)
    for model in (AutoModelForCausalLM.from_pretrained(folder), roundel.load(folder)):
        with pytest.raises(BackendError, match="cannot be moved to meta"):
            model.to("meta")
        assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
        with pytest.raises(BackendError, match="Copy the folder that it was loaded from"):
            model.save_pretrained(tmp_path / "saved")
        with pytest.raises(BackendError, match="Copy the folder that it was loaded from"):
            model.state_dict()
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert torch.equal(said(copied.to("cpu")), said(model))
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_the_dtype_is_that_of_activations(tmp_path: Path) -> None:
    folder = made("llama", tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for model in (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), roundel.load(folder, dtype=dtype)):
            assert model.dtype == said(model).dtype == dtype
    assert model.to(torch.bfloat16).dtype == torch.bfloat16 and model.device == torch.device("cpu")


def test_a_head_that_the_checkpoint_does_not_have(tmp_path: Path) -> None:
    told = r"checkpoint of LlamaForCausalLM and cannot be loaded as LlamaForSequenceClassification, whose score\.weight"
    with pytest.raises(PlanError, match=told):
        AutoModelForSequenceClassification.from_pretrained(made("llama", tmp_path))


def test_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made("llama", tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(SourceError, match=r"has no tensor for transformers' model\.layers\.2"):
        AutoModelForCausalLM.from_pretrained(folder)
    path.write_text(json.dumps(config))
    plant(folder, "model.layers.1.mlp.up_proj.scales", 3, float("nan"), "float16")
    with pytest.raises(SourceError, match="up_proj: a stored scale is not finite"):
        AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.setattr("roundel.inference.room.free_memory", lambda device="cpu": 1000)
    with pytest.raises(BackendError, match=r"out needs .* GB on cpu"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_from_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a snapshot are links to blobs."""
    folder, home = made("llama", tmp_path), tmp_path / "cache" / "models--some--model"
    snapshot, blobs = home / "snapshots" / ("a" * 40), home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../..") / "blobs" / file.name)
    agree(snapshot)
