"""The model class of a checkpoint, without numbers: transformers' own, or the checkpoint's where that is allowed.

Parameters are on torch's meta device. Buffers that no checkpoint holds (rotary frequencies, embedding scales) are real:
transformers computes them again after loading, and the same call (`PreTrainedModel.initialize_weights`) does so here.
Code that ships inside a checkpoint seldom has that call's rules, so its buffers are computed while it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.overrides import TorchFunctionMode

from roundel.calibration.quiet import quiet
from roundel.errors import PlanError, SourceError

__all__ = ["DATA_FREE", "WRONG", "empty_model", "fill_buffers", "misfit"]

DATA_FREE = "Algorithms that look at no data, such as opt-rtn, round it all the same."

UNLIKE_LOADING = ("quantization_config", "torch_dtype", "dtype")  # settings of a stored file, not of the class
DEFINITE = (
    *(torch.arange, torch.linspace, torch.logspace, torch.tensor, torch.as_tensor),
    *(torch.zeros, torch.ones, torch.full, torch.eye, torch.tril_indices, torch.triu_indices),
)
WRONG: tuple[type[Exception], ...] = (
    *(AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)  # what a class of transformers, or of a checkpoint, raises when it is given what it was not made for


def empty_model(
    config: Mapping[str, object], folder: Path | None, dtype: torch.dtype, *, trust_remote_code: bool
) -> nn.Module:
    """The causal language model that config.json describes, in evaluation mode, its tensors on the meta device.

    folder   where the checkpoint's own code lies, which is run only if transformers does not know the model type
    Raises PlanError, with the model type, when transformers has no class for it, when its code may not be run, and when
    the class refuses the config.
    """
    settings = {key: _spelled_out(value) for key, value in config.items() if key not in UNLIKE_LOADING}
    with quiet():
        try:
            kind, made = _native(settings) or _shipped(settings, folder, trust_remote_code)
            with torch.device("meta"), _Definite(not kind.__module__.startswith("transformers.models.")):
                model: nn.Module = kind._from_config(made, dtype=dtype)
                # one expert after the other, where they are not taken apart: faster ways want weights that are laid out
                made._experts_implementation = "eager"
        except WRONG as error:
            raise PlanError(
                f"transformers cannot build a {config.get('model_type')!r} model of this config.json "
                f"({type(error).__name__}: {error}). Install the transformers release it was made for. {DATA_FREE}"
            ) from error
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            _put(model, name, nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))
    return model.eval()


def misfit(tensor: str, found: Sequence[int], wanted: Sequence[int]) -> SourceError:
    """That a tensor has another shape than the model's."""
    return SourceError(
        f"{tensor} is {list(found)}, and config.json describes a model in which it is {list(wanted)}. Fetch both again "
        "from one place."
    )


def fill_buffers(model: nn.Module, stored: Collection[str], device: str) -> None:
    """Give every buffer that is not among `stored` its numbers, on `device`, as transformers does after loading.

    Raises PlanError for a buffer whose numbers nothing computes.
    """
    own = [name for name, _ in model.named_buffers() if name not in stored]
    blank = [name for name in own if model.get_buffer(name).is_meta]
    for name in blank:
        buffer = model.get_buffer(name)
        _put(model, name, torch.full(buffer.shape, _nothing(buffer.dtype), dtype=buffer.dtype))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_meta:
            setattr(tensor, "_is_hf_initialized", True)  # noqa: B010 - what transformers sets on loaded tensors
    with quiet():
        initialize: Callable[[], None] = model.initialize_weights  # type: ignore[assignment]
        initialize()
    for name in own:
        buffer = model.get_buffer(name)
        if name in blank and _is_blank(buffer):
            raise PlanError(
                f"{type(model).__name__} computes the buffer {name} in a way that only a loaded model has. {DATA_FREE}"
            )
        _put(model, name, buffer.to(device))


class _Definite(TorchFunctionMode):
    """In a device context that makes no numbers, make those of tensors that are neither left open nor drawn.

    Weights are left open (`torch.empty`) until they are loaded; buffers are computed from numbers that are said.
    """

    def __init__(self, active: bool) -> None:
        super().__init__()
        self.active = active

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if self.active and func in DEFINITE and named.get("device") is None:
            named["device"] = "cpu"
        return func(*args, **named)


def _native(settings: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """transformers' class and config for a model type it knows."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = settings.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return None
    config = CONFIG_MAPPING[model_type].from_dict(settings)
    for name in settings.get("architectures") or ():
        if name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")) and hasattr(transformers, name):
            return getattr(transformers, name), config
    for classes in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    ):
        if type(config) in classes:
            return classes[type(config)], config
    raise ValueError("it has no class for language modelling")


def _shipped(settings: Mapping[str, Any], folder: Path | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """The class and config that the checkpoint's own code defines."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model_type, shipped = settings.get("model_type"), settings.get("auto_map")
    if not isinstance(shipped, Mapping):
        raise PlanError(
            f"transformers {transformers.__version__} does not know the model type {model_type!r}, so its blocks "
            f"cannot be run. Install a release that knows it. {DATA_FREE}"
        )
    if not trust_remote_code:
        raise PlanError(
            f"The model type {model_type!r} needs code that ships inside the checkpoint ({', '.join(shipped.values())})"
            f", which would run on this machine. Read it, then pass --trust-remote-code. {DATA_FREE}"
        )
    if folder is None or "AutoConfig" not in shipped or "AutoModelForCausalLM" not in shipped:
        raise PlanError(
            f"The code of the model type {model_type!r} cannot be found: auto_map of config.json must name an "
            "AutoConfig and an AutoModelForCausalLM that lie beside it. Fetch the checkpoint again, with its .py files."
        )
    config_class = get_class_from_dynamic_module(shipped["AutoConfig"], str(folder))
    model_class = get_class_from_dynamic_module(shipped["AutoModelForCausalLM"], str(folder))
    return model_class, config_class.from_dict(dict(settings))


def _spelled_out(value: object) -> object:
    """Settings with numbers that JSON has no way to write, {"__float__": "Infinity"}, as numbers."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(str(value["__float__"]))
        return {key: _spelled_out(inner) for key, inner in value.items()}
    return [_spelled_out(inner) for inner in value] if isinstance(value, list) else value


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, tensor)


def _nothing(dtype: torch.dtype) -> float | int | bool:
    """A value that no computed buffer has."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return False if dtype == torch.bool else torch.iinfo(dtype).min


def _is_blank(buffer: torch.Tensor) -> bool:
    if buffer.dtype == torch.bool or not buffer.numel():
        return False
    nothing = _nothing(buffer.dtype)
    return bool((buffer != buffer).any() if nothing != nothing else (buffer == nothing).any())
