"""The skeleton computes what transformers' loaded model computes, for every family there is a pico checkpoint of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import pico
from roundel.calibration.skeleton import Skeleton
from roundel.checkpoint import Checkpoint, open_checkpoint

TOKENS = 40  # more than the window, and not a multiple of anything
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {"sliding_window": 16} for name in ("gemma2", "gemma3", "gemma3_text", "mistral", "mistral3", "phi3")},
    "gpt_oss": {"sliding_window": 16, "quantization_config": None},
    "llama4": {"attention_chunk_size": 16},
    "llama4_text": {"attention_chunk_size": 16},
    "qwen3_vl_moe": {"moe_intermediate_size": 48},  # a square matrix leaves open which way round it is stored
}


@dataclass(frozen=True)
class Case:
    """A pico checkpoint, as transformers loads it and as a skeleton."""

    checkpoint: Checkpoint
    model: Any
    skeleton: Skeleton
    weights: Mapping[str, Tensor]

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.skeleton.enter(tokens, self.weights)
        for block in (*self.skeleton.blocks, self.skeleton.tail):
            x = block.forward(x, self.weights)
        return x


def tokens_of(samples: int, seed: int = 0, length: int = TOKENS) -> Tensor:
    return torch.randint(3, 256, (samples, length), generator=torch.Generator().manual_seed(seed))


def needed(skeleton: Skeleton) -> Iterable[str]:
    return {*skeleton.entry_tensors, *(t for b in (*skeleton.blocks, skeleton.tail) for t in b.tensors)}


def make_case(model_type: str, folder: Path) -> Case:
    import transformers

    pico.build(model_type, folder, dtype="float32", **CONFIGS.get(model_type, {}))
    checkpoint = open_checkpoint(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    images = type(config) in transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    loader: Any = transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM
    transformers.logging.disable_progress_bar()
    model = loader.from_pretrained(folder, dtype=torch.float32).eval()
    skeleton = Skeleton(checkpoint.source.config, checkpoint.family, checkpoint.tensor_names)
    return Case(checkpoint, model, skeleton, {name: checkpoint.tensor(name).float() for name in needed(skeleton)})


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they give on matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=pico.PICO_TYPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    made = make_case(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    made.checkpoint.close()


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 3])
def test_logits_are_those_of_the_loaded_model(case: Case, samples: int) -> None:
    tokens = tokens_of(samples)
    expected = case.model(input_ids=tokens).logits
    torch.testing.assert_close(case.logits(tokens), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_no_parameter_is_allocated(case: Case) -> None:
    model = case.skeleton._model
    recorders = case.skeleton._recorders
    assert all(p.is_meta for module in (model, *(r.block for r in recorders)) for p in module.parameters())
    assert not any(name.startswith("layers") for name, _ in model.named_parameters())
