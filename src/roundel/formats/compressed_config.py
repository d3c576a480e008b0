"""The config of compressed-tensors checkpoints: config groups <-> schemes, and which group a module belongs to.

A group has a layout (`format`), targets (full module names, `re:` patterns, or the class "Linear"), and arguments for
weights and inputs: type, num_bits, strategy (tensor, channel, group, tensor_group, block, token), group_size,
symmetric, dynamic. Source: QuantizationArgs and QuantizationScheme of compressed-tensors 0.20, and the files
llm-compressor and auto-round write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from roundel.formats.patterns import begins
from roundel.scheme import ELEMENTS, LARGEST_BLOCK, PRESETS, Grid, Scheme, integer_scheme

__all__ = ["group_for", "group_of", "kv_cache_arguments", "kv_cache_of", "layout_of", "scheme_of"]

Arguments = Mapping[str, object]


def layout_of(scheme: Scheme) -> str:
    """The name of the layout a scheme is stored in."""
    grid = scheme.weight
    if grid.element.is_integer:
        return "int-quantized" if scheme.input is not None and scheme.input.element.is_integer else "pack-quantized"
    if isinstance(grid.scale, Grid):
        return "nvfp4-pack-quantized"
    if grid.is_mx:
        return "mxfp4-pack-quantized" if scheme.bits == 4 else "mxfp8-quantized"
    return "naive-quantized" if scheme.input is None else "float-quantized"


def group_of(scheme: Scheme, targets: Sequence[str]) -> dict[str, object]:
    """A config group for layers on one scheme."""
    weights = _arguments(scheme.weight, "channel")
    return {
        "format": layout_of(scheme),
        "input_activations": None if scheme.input is None else _inputs(scheme),
        "output_activations": None,
        "targets": list(targets),
        "weights": weights,
    }


def kv_cache_arguments() -> dict[str, object]:
    """How keys and values are rounded in the cache: to FP8, one stored scale each."""
    return _arguments(Grid(element=ELEMENTS["e4m3"], block=(0, 0), scale="F32"), "tensor")


def kv_cache_of(quantization: Arguments) -> str | None:
    """ "fp8" where a config asks for that, other words for other schemes, None where keys and values stay."""
    given = quantization.get("kv_cache_scheme")
    if not isinstance(given, Mapping) or not given:
        return None
    names = ("num_bits", "type", "symmetric", "dynamic")
    wanted = kv_cache_arguments()
    told = {"symmetric": True, "dynamic": False, **given}
    plain = told.get("strategy") in (None, "tensor") and all(told.get(name) == wanted[name] for name in names)
    return "fp8" if plain else f"{given.get('type')}{given.get('num_bits')} by {given.get('strategy')}"


def group_for(module: str, groups: object) -> Arguments | None:
    """The group a module belongs to: one that names it, else one whose pattern matches, else one for all layers."""
    found = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    for fits in (_named, _matched, _all):
        for group in found:
            targets = group.get("targets")
            if isinstance(targets, list) and any(isinstance(t, str) and fits(module, t) for t in targets):
                return group
    return found[0] if len(found) == 1 else None


def scheme_of(group: Arguments) -> Scheme | None:
    """The scheme of a group, scales of weights in the dtype our presets store; None where it is no scheme of ours."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        return None
    weight = _grid(weights, "F16" if weights.get("type") == "int" else "BF16")
    given = _grid(inputs, "F32") if isinstance(inputs, Mapping) else None
    if weight is None or (isinstance(inputs, Mapping) and given is None):
        return None
    dynamic = not isinstance(inputs, Mapping) or bool(inputs.get("dynamic"))
    found = Scheme(name="", weight=weight, input=given, dynamic=dynamic)
    return next((preset for preset in PRESETS.values() if preset == found), _named_by_fields(found))


def _named_by_fields(scheme: Scheme) -> Scheme:
    grid = scheme.weight
    if grid.element.is_integer and grid.block[0] == 1 and grid.element.bits > 1:
        name = integer_scheme(scheme.bits, scheme.group_size, grid.symmetric).name
    else:
        name = grid.element.name.upper()
    if scheme.input is not None:
        name = f"{name.replace('A16', '')}A{scheme.input.element.bits}"
    return Scheme(name=name, weight=grid, input=scheme.input, dynamic=scheme.dynamic)


def _arguments(grid: Grid, whole_row: str) -> dict[str, object]:
    """QuantizationArgs of a grid. whole_row: what a scale for each row is called, "channel" or "token"."""
    found: dict[str, object] = {
        "dynamic": False,
        "num_bits": grid.element.bits,
        "symmetric": grid.symmetric,
        "type": "int" if grid.element.is_integer else "float",
    }
    if grid.block[0] > 1:
        return found | {"strategy": "block", "block_structure": list(grid.block)}
    if grid.block == (0, 0):
        return found | {"strategy": "tensor"}
    if grid.block[1] == 0:
        return found | {"strategy": whole_row}
    found |= {"group_size": grid.block[1], "strategy": "group"}
    if isinstance(grid.scale, Grid):
        return found | {"scale_dtype": "torch.float8_e4m3fn", "strategy": "tensor_group"}
    return found | {"scale_dtype": "torch.uint8"} if grid.scale == "E8M0" else found


def _inputs(scheme: Scheme) -> dict[str, object]:
    assert scheme.input is not None
    found = _arguments(scheme.input, "token") | {"dynamic": scheme.dynamic}
    return found | {"dynamic": "local", "observer": "static_minmax"} if isinstance(scheme.input.scale, Grid) else found


def _grid(arguments: Arguments, scale: str) -> Grid | None:
    """The grid of QuantizationArgs; None where it is none of ours. scale: the dtype of float scales."""
    bits, kind = arguments.get("num_bits", 8), arguments.get("type", "int")
    size, structure, strategy = (arguments.get(key) for key in ("group_size", "block_structure", "strategy"))
    symmetric = bool(arguments.get("symmetric", True))
    if strategy is None:
        strategy = "group" if isinstance(size, int) and size > 0 else "channel" if size == -1 else "tensor"
    name = f"{'' if symmetric else 'u'}int{bits}" if kind == "int" else {4: "e2m1", 8: "e4m3"}.get(_whole(bits), "")
    blocks = {"tensor": (0, 0), "channel": (1, 0), "token": (1, 0)}
    if strategy in ("group", "tensor_group") and _whole(size) > 0:
        block = (1, _whole(size))
    elif strategy == "block" and isinstance(structure, (list, tuple)) and len(structure) == 2:
        block = (_whole(structure[0]), _whole(structure[1]))
        if min(block) < 1:
            return None
    elif str(strategy) in blocks:
        block = blocks[str(strategy)]
    else:
        return None
    if name not in ELEMENTS or (kind != "int" and not symmetric):
        return None
    if strategy == "tensor_group":
        nested = PRESETS["NVFP4A16"].weight
        return nested if (name, block) == (nested.element.name, nested.block) else None
    powers = kind == "float" and block == (1, 32) and (name == "e2m1" or "uint8" in str(arguments.get("scale_dtype")))
    return Grid(element=ELEMENTS[name], block=block, symmetric=symmetric, scale="E8M0" if powers else scale)


def _whole(value: object) -> int:
    return value if type(value) is int and value <= LARGEST_BLOCK else 0


def _named(module: str, target: str) -> bool:
    return target == module


def _matched(module: str, target: str) -> bool:
    return target.startswith("re:") and begins(target[3:], module)


def _all(module: str, target: str) -> bool:
    return target == "Linear"
