"""A checkpoint as a working model of transformers, its rounded layers packed.

The model class is built without numbers (`calibration/architecture.py`), experts that it fuses are taken apart
(`experts.py`), and every tensor goes from its file to its place, one layer at a time: the float model never exists.
"""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from roundel.calibration.architecture import empty_model, fill_buffers, misfit
from roundel.calibration.experts import Projection, unfuse
from roundel.calibration.spelling import spelling_of
from roundel.checkpoint import Checkpoint, Matrix, open_checkpoint
from roundel.errors import BackendError, PlanError, RecipeError, SourceError
from roundel.families import text_config
from roundel.formats import FORMATS
from roundel.inference.backends import Backend, better_but_absent, choose
from roundel.inference.backends.numba import Numba
from roundel.inference.backends.torch import Decoding, Torch
from roundel.inference.gradient import Kernel
from roundel.inference.linear import Anchor, QuantEmbedding, QuantLinear, StoredEmbedding, StoredLinear
from roundel.inference.room import check_room
from roundel.tensor import QuantizedTensor, plain

__all__ = ["chosen_backends", "device_named", "fill", "load"]

SIXTEEN = (torch.bfloat16, torch.float16)


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tick: Callable[[float, str], None] | None = None,
) -> Any:
    """The causal language model of a checkpoint, rounded or not, ready for `generate`.

    path      a folder, or a Hub id
    device    "cpu", "cuda", "cuda:1", "xpu": where it is to run; it cannot be moved afterwards
    backend   which one multiplies by rounded weights; None: for each layer the best that takes it
    dtype     of activations, norms and other small tensors; None: float32 on a CPU, elsewhere the config's. Rounded
              layers, and on a CPU kept matrices too, stay as they are stored whatever it is
    trust_remote_code   whether code that ships inside the checkpoint may run
    tick      told how much is loaded, 0 to 1, and what is at hand

    Inputs of layers are not rounded, also where the scheme has a grid for them (MXFP4, MXFP8).
    Raises SourceError for a broken checkpoint, PlanError for a model that transformers does not know, BackendError when
    no backend, or not the one asked for, takes a layer, or the memory is too small.
    """
    where = device_named(device)
    with tempfile.TemporaryDirectory(prefix="roundel-") as work:
        checkpoint = open_checkpoint(path, revision, Path(work))
        try:
            chosen = _dtype(checkpoint, dtype, where)
            return _loaded(checkpoint, where, backend, chosen, trust_remote_code, tick)
        finally:
            checkpoint.close()


def _loaded(
    checkpoint: Checkpoint,
    device: str,
    backend: str | None,
    dtype: torch.dtype,
    trusted: bool,
    tick: Callable[[float, str], None] | None,
) -> nn.Module:
    folder = checkpoint.source.small_folder()
    backends = chosen_backends(checkpoint, device, backend)
    check_room(checkpoint, device, dtype)
    model = empty_model(checkpoint.source.config, folder, dtype, trust_remote_code=trusted)
    fill(model, checkpoint, device, dtype, backends, tick)
    if checkpoint.reader is not None and backends:
        from roundel.inference.kept import Kept, StoredConfig

        known: Any = model
        known.hf_quantizer = Kept(StoredConfig({"quant_method": checkpoint.reader.name}))
    _generation(model, folder)
    return model


def chosen_backends(checkpoint: Checkpoint, device: str, backend: str | None) -> dict[str, Backend]:
    """The backend of each rounded layer, by module name, a head tied to a rounded embedding among them.

    See `load` for `backend` and what is raised.
    """
    packed = {name: layer for name, layer in checkpoint.layers.items() if layer.cut is None}  # parts become floats
    backends = {name: choose(layer, device, backend) for name, layer in packed.items()}
    if backend is None:
        _name_absent(checkpoint, backends, device)
    embedding = checkpoint.matrices.get(checkpoint.family.embedding.removesuffix(".weight"))
    if embedding is not None and embedding.name in backends and checkpoint.family.head not in checkpoint.matrices:
        tied = checkpoint.tied_head()
        backends[tied.name] = choose(tied.layer(), device, backend)
    return backends


def fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    device: str,
    dtype: torch.dtype,
    backends: Mapping[str, Backend],
    tick: Callable[[float, str], None] | None = None,
) -> None:
    """Give a model whose tensors are on the meta device those of a checkpoint, its rounded layers packed.

    tick   told how much of the numbers it has, 0 to 1, and which come next

    Raises SourceError when a tensor is missing or has another shape, PlanError when a module takes no rounded layer.
    """
    spelling = spelling_of(model, checkpoint.tensor_names)
    fill_buffers(model, spelling.tensors, device)
    unfuse(model, spelling.experts)
    filling = _Filling(checkpoint, model, device, dtype, backends)
    sizes = {tensor: math.prod(checkpoint.shape(tensor)) for tensor in spelling.tensors.values()}
    done, whole = 0, max(1, sum(sizes.values()))
    for name, tensor in spelling.tensors.items():
        if tick is not None:
            tick(done / whole, name)
        filling.put(name, tensor)
        done += sizes[tensor]
    filling.tie()
    if backends:
        others = dict(model._modules)
        model._modules.clear()
        model._modules.update({"anchor": Anchor(device, dtype)} | others)
    if device == "cpu" and not any(_multiplied_by_torch(module) for module in model.modules()):
        from roundel.inference.numba.team import spare_processors

        spare_processors(model)


def _multiplied_by_torch(module: nn.Module) -> bool:
    if isinstance(module, QuantLinear):
        return module.backend != Numba.name
    return isinstance(module, (nn.Linear, Projection))


class _Filling:
    """A model on the meta device, being given its numbers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        device: str,
        dtype: torch.dtype,
        backends: Mapping[str, Backend],
    ) -> None:
        """backends: of each rounded layer"""
        self.checkpoint, self.model, self.device, self.dtype = checkpoint, model, device, dtype
        self.backends = backends
        self.wide = _kept_wide(model, dtype)
        known: Any = model
        self.embedding: nn.Module = known.get_input_embeddings()

    def put(self, name: str, tensor: str) -> None:
        """Give a parameter (or stored buffer) of the model the numbers of a tensor of the checkpoint."""
        path, _, part = name.rpartition(".")
        stored, _, stored_part = tensor.rpartition(".")
        matrix = self.checkpoint.matrices.get(stored)
        if stored_part == "weight" and matrix is not None and matrix.stored.format != "plain":
            self._put_layer(path, part, matrix)
            return
        module, value = self.model.get_submodule(path), self.checkpoint.mapped(tensor)
        self._check_shape(name, tensor, module, part, value)
        if part == "weight" and self._stays(module, value):
            parameter = nn.Parameter(value.to(self.device), requires_grad=False)
            if isinstance(module, nn.Embedding):
                self.embedding = StoredEmbedding(module, parameter, self.dtype)
                self.model.set_submodule(path, self.embedding)
            else:
                self._replace(path, StoredLinear(parameter))
            return
        if value.is_floating_point():
            value = value.to(torch.float32 if self.wide(name) else self.dtype)
        value = value.to(self.device)
        if part in module._buffers:
            module._buffers[part] = value
        else:
            module.register_parameter(part, nn.Parameter(value, requires_grad=False))

    def tie(self) -> None:
        """Give a head without a matrix of its own the embedding's. Raises SourceError when more is missing."""
        model: Any = self.model
        embedding, head = self.embedding, model.get_output_embeddings()
        if isinstance(getattr(head, "weight", None), Tensor) and head.weight.is_meta:
            path = next(path for path, module in self.model.named_modules() if module is head)
            if isinstance(embedding, StoredEmbedding):
                self._replace(path, StoredLinear(embedding.weight))
            elif isinstance(embedding, QuantEmbedding):
                tied = self.checkpoint.tied_head()
                shared = embedding.kernel if isinstance(self.backends[tied.name], Torch) else None
                self._replace(path, self._packed(tied, shared))
            else:
                head.weight = embedding.get_parameter("weight")
        missing = [name for name, value in self.model.named_parameters() if value.is_meta]
        if missing:
            source, wanted = self.checkpoint.source, type(self.model).__name__
            made_for = source.config.get("architectures")
            if isinstance(made_for, list) and made_for and wanted not in made_for:
                raise PlanError(
                    f"{source.name} is a checkpoint of {made_for[0]} and cannot be loaded as {wanted}, whose "
                    f"{missing[0]} it does not have ({len(missing)} such). Load it as {made_for[0]}."
                )
            raise SourceError(
                f"{source.name} has no tensor for transformers' {missing[0]} ({len(missing)} such), or "
                "holds it in another arrangement. Fetch the checkpoint again."
            )

    def _put_layer(self, path: str, part: str, matrix: Matrix) -> None:
        module, layer = self.model.get_submodule(path), matrix.layer()
        looked_up = isinstance(module, nn.Embedding) and module is self.embedding and layer.scheme.weight.block[0] == 1
        if part != "weight" or not (looked_up or isinstance(module, (nn.Linear, Projection))):
            raise PlanError(
                f"{matrix.name} is rounded, and transformers multiplies by it in a {type(module).__name__}, which only "
                "knows float matrices. Round the model again with --ignore-layers for this one."
            )
        assert isinstance(module, (nn.Embedding, nn.Linear, Projection))
        if tuple(module.weight.shape) != matrix.shape:
            raise misfit(matrix.name, matrix.shape, module.weight.shape)
        if isinstance(module, nn.Embedding):
            kernel = Decoding(FORMATS[layer.stored.format], self._quantized(matrix))
            self.embedding = QuantEmbedding(module, kernel, kernel.rows, self.dtype)
            self.model.set_submodule(path, self.embedding)
        else:
            self._replace(path, self._packed(matrix))

    def _packed(self, matrix: Matrix, kernel: Kernel | None = None) -> QuantLinear:
        """A rounded layer as a module."""
        backend = self.backends[matrix.name]
        kernel = kernel if kernel is not None else backend.make(matrix.layer(), self._quantized(matrix))
        return QuantLinear(matrix.name, backend.name, self.device, kernel, matrix.shape)

    def _quantized(self, matrix: Matrix) -> QuantizedTensor:
        """A rounded layer's numbers, on the device. Raises SourceError where they are none."""
        quantized = self.checkpoint.unpack(matrix.layer(), mapped=True)
        if not bool(torch.isfinite(plain(quantized.scale)).all()):
            raise SourceError(f"{matrix.name}: a stored scale is not finite. The file is damaged; fetch it again.")
        return quantized.to(self.device)

    def _replace(self, path: str, made: QuantLinear | StoredLinear) -> None:
        """Put a module in the place of a linear one, whose bias it takes over."""
        before: Any = self.model.get_submodule(path)
        made.bias = before.bias
        self.model.set_submodule(path, made)

    def _stays(self, module: nn.Module, value: Tensor) -> bool:
        """Whether a kept matrix is left in the 16 bits it is stored in."""
        narrow = self.device == "cpu" and self.dtype == torch.float32 and value.dtype in SIXTEEN
        is_matrix = isinstance(module, Projection) or type(module) is nn.Linear
        return narrow and (is_matrix or (module is self.embedding and isinstance(module, nn.Embedding)))

    def _check_shape(self, name: str, tensor: str, module: nn.Module, part: str, value: Tensor) -> None:
        place: Tensor | None = module._parameters.get(part)
        place = module._buffers.get(part) if place is None else place
        if place is not None and place.shape != value.shape:
            raise misfit(tensor, tuple(value.shape), place.shape)


def device_named(device: str | torch.device) -> str:
    """A device as backends are told it: "cpu", "cuda:0".

    Raises RecipeError for one that torch does not know, BackendError for one that is not there.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"Device {device!r} is none that torch knows. Use cpu, cuda or xpu.") from error
    if found.type == "cpu":
        return "cpu"
    module: Any = getattr(torch, found.type, None)
    if module is None or not hasattr(module, "is_available") or not module.is_available():
        raise BackendError(f"Device {str(found)!r} is not there: torch sees no such device. Use device='cpu'.")
    return str(found)


def _dtype(checkpoint: Checkpoint, wanted: torch.dtype | None, device: str) -> torch.dtype:
    if wanted is not None:
        if not wanted.is_floating_point or wanted.itemsize < 2:
            raise RecipeError(f"Activations cannot be {wanted}. Use torch.float32, torch.bfloat16 or torch.float16.")
        return wanted
    config = checkpoint.source.config
    inner = text_config(config)
    named = str(config.get("dtype") or config.get("torch_dtype") or inner.get("dtype") or inner.get("torch_dtype"))
    known = {"float16": torch.float16, "float32": torch.float32}
    return torch.float32 if device == "cpu" else known.get(named.removeprefix("torch."), torch.bfloat16)


def _kept_wide(model: nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether a parameter stays in float32, as transformers keeps it when it loads the model class in a dtype."""
    known: Any = model
    always = set(getattr(known, "_keep_in_fp32_modules_strict", None) or ())
    half = set(getattr(known, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    patterns = [re.compile(rf"((^|\.){name}($|\.))") for name in always | half]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _name_absent(checkpoint: Checkpoint, backends: Mapping[str, Backend], device: str) -> None:
    """Warn, once, of a better backend that only misses a package."""
    layers = checkpoint.layers
    for name, chosen in backends.items():
        better = better_but_absent(layers[name], device, chosen)
        if better is not None:
            warnings.warn(
                f"Backend {better.name} would run {layers[name].scheme.name} on {device} faster than {chosen.name}; "
                f"install it with `{better.needs}`.",
                stacklevel=5,  # of who called `load`
            )
            return


def _generation(model: nn.Module, folder: Path) -> None:
    """How the checkpoint wants its text drawn, where it says."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        known: Any = model
        try:
            found = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            raise SourceError(f"generation_config.json cannot be read ({error}). Fetch it again.") from error
        stated = found.to_dict()
        for name, highest in (("temperature", math.inf), ("top_p", 1)):
            value = stated.get(name)
            if stated.get("do_sample") and value is not None and not _is_share(value, highest):
                raise SourceError(
                    f"generation_config.json says {name}={value!r}, which is not possible. Fetch it again."
                )
        known.generation_config = found


def _is_share(value: object, highest: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= highest
