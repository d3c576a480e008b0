"""The model card that goes with an output: what it is, how it was made, how large it is, how to use it."""

from __future__ import annotations

import json
import shlex

from roundel import __version__
from roundel.chain import Value, known_options
from roundel.planning import Plan
from roundel.recipe import Recipe

__all__ = ["command_of", "model_card", "size"]

_LOAD = {
    "auto_round": "transformers with `pip install auto-round`, vLLM, SGLang",
    "auto_gptq": "transformers with `pip install gptqmodel optimum`, GPTQModel, vLLM",
    "auto_awq": "transformers with `pip install gptqmodel`, GPTQModel, vLLM",
    "llm_compressor": "transformers with `pip install compressed-tensors`, vLLM",
}


def size(count: float) -> str:
    """Bytes as people read them: 7.6 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def command_of(recipe: Recipe, model: str, out: str = "OUT", revision: str | None = None) -> str:
    """The command line that makes this output."""
    default = Recipe()
    if recipe.conversion is not None:
        words = ["roundel", "convert", model, out, "--format", recipe.formats[0]]
        words += [] if recipe.converts_as_stored else ["--scheme", recipe.scheme]
        words += ["--requantize"] if recipe.conversion == "requantize" else []
        words += ["--shard-size", str(recipe.shard_size)] if recipe.shard_size != default.shard_size else []
        return shlex.join(words + (["--revision", revision] if revision is not None else []))
    words = ["roundel", "quantize", model, out, "--scheme", recipe.scheme]
    for name in ("bits", "group_size"):
        if getattr(recipe, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(recipe, name))]
    if recipe.sym is not None:
        words.append("--sym" if recipe.sym else "--asym")
    words += ["--algorithm", recipe.algorithm, "--format", ",".join(recipe.formats)]
    for key, value in recipe.options.items():
        words += _option(key.rpartition(".")[2], value)
    if recipe.reads_activations:
        words += ["--dataset", recipe.dataset]
        for name in ("nsamples", "seqlen", "batch_size", "seed", "activation_dtype"):
            if getattr(recipe, name) != getattr(default, name):
                words += [f"--{name.replace('_', '-')}", str(getattr(recipe, name))]
        if recipe.calibrate_all_experts:
            words.append("--calibrate-all-experts")
    if recipe.layer_config:
        words += ["--layer-config", json.dumps(recipe.layer_config)]
    if recipe.ignore_layers:
        words += ["--ignore-layers", ",".join(recipe.ignore_layers)]
    if recipe.quant_lm_head:
        words.append("--quant-lm-head")
    if recipe.kv_cache is not None:
        words += ["--kv-cache", recipe.kv_cache]
    if recipe.shard_size != default.shard_size:
        words += ["--shard-size", str(recipe.shard_size)]
    if recipe.strict:
        words.append("--strict")
    if revision is not None:
        words += ["--revision", revision]
    return shlex.join(words)


def _option(name: str, value: Value) -> list[str]:
    """A hyperparameter, as the command line takes it: a switch, or a value that may be true or false."""
    flag = name.replace("_", "-")
    if value is True:
        return [f"--{flag}"]
    if value is False:
        return [f"--no-{flag}"] if known_options()[name].kinds == {"bool"} else [f"--{flag}", "false"]
    return [f"--{flag}", str(value)]


def model_card(plan: Plan, output: int) -> str:
    """README.md for one format of a plan."""
    made, recipe = plan.outputs[output], plan.recipe
    schemes: dict[str, int] = {}
    for layer in plan.layers:
        schemes[layer.scheme.name] = schemes.get(layer.scheme.name, 0) + 1
    reasons: dict[str, int] = {}
    for kept in plan.kept:
        reasons[kept.reason] = reasons.get(kept.reason, 0) + 1
    base = f"base_model: {plan.source_name}\n" if plan.source_name.count("/") == 1 else ""
    notes = "".join(f"- {note}\n" for note in plan.notes)
    return f"""---
{base}tags:
- roundel
- {made.format.name}
---
# {plan.source_name.rpartition("/")[2]}, {recipe.label}

Weights of {plan.source_name} {"converted" if recipe.conversion else "rounded"} by roundel {__version__}. Load with {
        _LOAD.get(made.format.name, made.format.summary)
    }.

| | |
| --- | --- |
| scheme | {", ".join(f"{name} ({count} layers)" for name, count in schemes.items())} |
| algorithm | {recipe.algorithm} |
| format | {made.format.name} |
| bits per rounded weight | {plan.bits_per_weight:.3f} |
| size | {size(made.nbytes)}, {made.nbytes / max(1, plan.source_bytes):.0%} of the source's {size(plan.source_bytes)} |
| kept in full precision | {"; ".join(f"{count} × {reason}" for reason, count in reasons.items()) or "no matrix"} |

Made with

    {command_of(recipe, plan.source_name, revision=plan.source_revision)}

`recipe.json` holds the recipe, `report.json` the signal-to-noise ratio of every layer.
{notes}"""
