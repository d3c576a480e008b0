"""Checkpoints as float32 models, for measuring: as they are, or with some of their matrices replaced.

A model is made by transformers from the tensors of a checkpoint under their stored names, so whatever transformers
itself does at loading (experts fused, heads tied) happens here as well. Nothing is fetched, no code of a checkpoint
is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from roundel.calibration.quiet import quiet
from roundel.calibration.tokenizer import Tokenizer
from roundel.checkpoint import Checkpoint, open_checkpoint
from roundel.errors import RecipeError, SourceError
from roundel.tensor import FLOAT_DTYPES, torch_dtype
from roundel.unit import Piece

__all__ = ["continuation", "decoded_model", "draw", "float_model", "logits_of"]


def float_model(folder: Path) -> nn.Module:
    """The causal language model of a float checkpoint, float32, on the CPU, in evaluation mode.

    Raises SourceError when the checkpoint is broken, incomplete, quantized, or of a kind that transformers does not
    know.
    """
    return decoded_model(folder, {})


def decoded_model(source_folder: Path, weights: Mapping[str, Tensor]) -> nn.Module:
    """The same model with matrices replaced: name of the linear layer in the checkpoint -> float32 [out, in].

    A given matrix takes the place of whatever the checkpoint stores under that layer's name, except its bias; so the
    folder may be quantized itself where `weights` covers all of its quantized layers.
    Raises SourceError as `float_model` does, and when a name or a shape is not the checkpoint's.
    """
    checkpoint = open_checkpoint(source_folder)
    source = checkpoint.source
    try:
        tensors = _tensors(checkpoint, weights)
    finally:
        checkpoint.close()
    settings = {key: value for key, value in source.config.items() if key != "quantization_config"}
    with quiet():
        return _assembled(source.name, settings, tensors)


def logits_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model as a function: token ids [batch, tokens] -> logits [batch, tokens, vocab]."""

    def logits(ids: Tensor) -> Tensor:
        result: Tensor = model(input_ids=ids, use_cache=False).logits
        return result

    return logits


def continuation(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    seed: int | None = None,
    temperature: float = 1.0,
) -> str:
    """What the model writes after the prompt: `tokens` tokens, the likeliest ones, or sampled where a seed is given.

    temperature   divides the logits before a token is drawn
    Models that differ little write much the same under the same seed. Raises RecipeError when the prompt has no tokens.
    """
    ids = tokenizer.encode(prompt, add_special_tokens=False, verbose=False)
    if not ids:
        raise RecipeError("An empty prompt cannot be continued. Give at least one word.")
    uniform = None if seed is None else torch.rand(tokens, generator=torch.Generator().manual_seed(seed))
    written: list[int] = []
    entering, cache = torch.tensor([ids]), None
    with torch.no_grad():
        for step in range(tokens):
            output = model(input_ids=entering, past_key_values=cache, use_cache=True)
            last, cache = output.logits[:, -1], output.past_key_values
            chosen = last.argmax(-1) if uniform is None else draw(last / temperature, uniform[step : step + 1])
            written.append(int(chosen))
            entering = chosen[:, None]
    return tokenizer.decode(written)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [batch] drawn from logits [batch, vocab]: the first whose cumulated probability exceeds `uniform`.

    uniform   numbers [batch] in [0, 1)
    Computed in float64, so that the last bits of the logits hardly ever change a token.
    """
    cumulated = logits.double().softmax(-1).cumsum(-1)
    found = torch.searchsorted(cumulated, uniform.double()[:, None].contiguous(), right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)


def _tensors(checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the model by its stored name, given matrices in place of what they replace."""
    source = checkpoint.source
    found: dict[str, Tensor] = {}
    packed = {name: m for name, m in checkpoint.wholes.items() if name in weights and m.stored.format != "plain"}
    parts = {piece.tensor for matrix in packed.values() for piece in matrix.stored.parts.values()}
    replaced: set[str] = set(packed)
    for name, spec in source.tensors.items():
        layer, _, part = name.rpartition(".")
        if name in parts:
            continue
        if layer in weights and part != "bias":
            if part == "weight" and spec.dtype in FLOAT_DTYPES and spec.shape != tuple(weights[layer].shape):
                raise SourceError(
                    f"{layer} is {list(spec.shape)} in {source.name}, but {list(weights[layer].shape)} was given. "
                    "Decode the layer of this checkpoint, or of one that was made from it."
                )
            replaced.add(layer)
        elif spec.dtype in FLOAT_DTYPES:
            found[name] = (
                torch.from_numpy(source.read(Piece(tensor=name))).view(torch_dtype(spec.dtype)).view(spec.shape)
            )
        else:
            raise SourceError(
                f"{source.name} stores {name} as {spec.dtype}, which is no float matrix. Give the decoded matrix "
                f"of that layer."
            )
    unknown = sorted(set(weights) - replaced)
    if unknown:
        raise SourceError(
            f"{source.name} stores nothing under {unknown[0]!r} ({len(unknown)} such names). Give names as it "
            f"stores them."
        )
    return found | {f"{layer}.weight": weight for layer, weight in weights.items()}


def _assembled(name: str, settings: Mapping[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """A model from config.json's content and its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    causal: Any = AutoModelForCausalLM  # untyped, as are its models
    try:
        config = AutoConfig.for_model(**settings)
        with torch.device("meta"):
            kind = type(causal.from_config(config, trust_remote_code=False))
        loaded = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise SourceError(
            f"transformers cannot make a causal language model of {name} ({error}). Install the release "
            "of transformers that it was made for, or fetch the checkpoint again."
        ) from error
    model: nn.Module = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise SourceError(
            f"{name} lacks {missing[0]!r} ({len(missing)} such tensors). Fetch or copy the checkpoint again."
        )
    return model.eval()
