"""`AutoModelForCausalLM.from_pretrained` on checkpoints that transformers cannot run by itself here.

transformers keeps two tables, of configs and of quantizers, by `quant_method`. Once both transformers and roundel are
imported, in either order, the entries whose own package is absent lead to `quantizer.Packed`. Nothing here imports
transformers or torch: `import roundel` stays light, and a program that loads no model pays nothing.

What stays theirs: methods whose package is installed, floats that are to be rounded while they are loaded, and
checkpoints that are asked for decoded (`dequantize=True`).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register", "register_when_imported"]

TABLES = "transformers.quantizers.auto"  # the module that has the tables
METHODS: Mapping[str, tuple[str, ...]] = {  # quant_method -> packages with which transformers runs it packed
    "auto-round": ("auto_round",),
    "intel/auto-round": (),
    "gptq": ("optimum", "gptqmodel"),
    "gptqmodel": (),
    "awq": ("gptqmodel", "accelerate"),
    "compressed-tensors": ("compressed_tensors",),
    "bitsandbytes_4bit": ("bitsandbytes", "accelerate"),
    "fp8": ("kernels",),
    "mxfp4": ("kernels", "triton"),
    "hqq": (),  # transformers 5 knows the name, and loads no such checkpoint
    "modelopt": (),
    "mlx": (),
}
NEEDING = ("compressed-tensors", "hqq")  # methods whose config class wants its package, too


def register(*, always: bool = False) -> None:
    """Have transformers load rounded checkpoints with roundel's layers where the package that it would use is absent.

    always   also where it is there
    `import roundel` does this by itself, without `always`. Imports transformers' quantizers.
    """
    _enter(importlib.import_module(TABLES), always)


def register_when_imported() -> None:
    """Register now if transformers' tables are there, else as soon as something imports them."""
    tables = sys.modules.get(TABLES)
    if tables is not None:
        _enter(tables, always=False)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _enter(tables: Any, always: bool) -> None:
    configs, quantizers = tables.AUTO_QUANTIZATION_CONFIG_MAPPING, tables.AUTO_QUANTIZER_MAPPING
    for method, packages in METHODS.items():
        absent = not packages or any(importlib.util.find_spec(package) is None for package in packages)
        known = quantizers.get(method)
        theirs = known.theirs if isinstance(known, _Choice) else known
        if absent or always:
            quantizers[method] = _Choice(theirs)
        elif theirs is not None:
            quantizers[method] = theirs
        if method not in configs or (absent and method in NEEDING):
            configs[method] = _Stored
    chooser = tables.AutoHfQuantizer
    if not isinstance(chooser.supports_quant_method, _Naming):
        chooser.supports_quant_method = _Naming(chooser.supports_quant_method)


class _Choice:
    """Stands in the table of quantizers: ours for rounded checkpoints that are to stay so, theirs for all else."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def __call__(self, config: Any, pre_quantized: bool = True, **options: Any) -> Any:
        decoded = vars(config).get("dequantize", False)
        if self.theirs is not None and (decoded or not pre_quantized):
            return self.theirs(config, pre_quantized=pre_quantized, **options)
        from roundel.inference.quantizer import Packed

        return Packed(config, pre_quantized=pre_quantized, **options)


class _Stored:
    """Stands in the table of configs: whatever config.json says, as it is."""

    @staticmethod
    def from_dict(quantization: Mapping[str, Any]) -> Any:
        from roundel.inference.kept import StoredConfig

        return StoredConfig(quantization)


class _Naming:
    """transformers' question whether it knows a method, for MLX's files too, which name none."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def __call__(self, quantization: dict[str, Any]) -> bool:
        if "quant_method" not in quantization and {"group_size", "bits"} <= set(quantization):
            quantization["quant_method"] = "mlx"  # the loaded config's own dict, which transformers goes on with
        known: bool = self.theirs(quantization)
        return known


class _Watch(MetaPathFinder):
    """Waits for the import of transformers' tables, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Entering(spec.loader)
        return spec


class _Entering(Loader):
    """A module's own loader, and then the entries."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        _enter(module, always=False)
