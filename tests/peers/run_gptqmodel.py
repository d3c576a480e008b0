"""Run where GPTQModel is installed: what backends marlin and exllamav2 hand it, without a card.

Prints JSON, for each case a number that is 0 when all is well:
    TYPE packed       words that differ from those of GPTQModel's own packer
    TYPE product      how far its torch class, with our words in it, is from the decoded product, where over 1e-5
    BACKEND held      words that the backend's class holds otherwise than they were given
    BACKEND taken     layers that the backend takes and the class refuses
    BACKEND left      layers that the class takes and the backend refuses for their bits or symmetry
"""

import json
import os
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its loader asks for two workers of a pool that has one on two cores
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gptqmodel.nn_modules.qlinear import marlin
from gptqmodel.nn_modules.qlinear.exllamav2 import ExllamaV2Linear
from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear

from inference.cases import drawn, layer_of, reference
from roundel.inference.backends.exllamav2 import Exllamav2, exllamav2_module
from roundel.inference.backends.marlin import Marlin, marlin_module
from roundel.inference.gptqmodel import filled, word_parts
from roundel.scheme import Scheme, integer_scheme

SHAPES = ((64, 256), (96, 128), (128, 1088))


def arguments(scheme: Scheme, shape: tuple[int, int]) -> dict[str, object]:
    given = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.weight.symmetric, "desc_act": False}
    return given | {"in_features": shape[1], "out_features": shape[0], "pack_dtype": torch.int32}


def words(scheme: Scheme, shape: tuple[int, int]) -> dict[str, float]:
    """Our words beside its packer's, and in its torch class."""
    quantized = drawn(scheme, shape)
    quantized = replace(quantized, scale=quantized.scale.abs() + 0.001)  # its packer divides by them
    parts, _ = word_parts(quantized, "marlin")
    theirs = TorchLinear(**arguments(scheme, shape), bias=False)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data = quantized.decode()
    middle = 1 << (scheme.bits - 1)
    zeros = torch.full(quantized.scale.shape, middle) if quantized.zero is None else quantized.zero.int()
    theirs.pack(linear, quantized.scale.float(), zeros.float(), parts["g_idx"])
    same = sum(int((getattr(theirs, name) != part).sum()) for name, part in parts.items())
    held = filled(TorchLinear, layer_of(scheme, shape), parts)
    held.scales = held.scales.float()
    held.post_init()
    x = torch.randn(7, shape[1], generator=torch.Generator().manual_seed(1))
    expected, size = reference(quantized.decode(), x, None)
    share = float(((held(x).double() - expected).abs() / size).max())
    name = f"{scheme.name} {shape}"
    return {f"{name} packed": same, f"{name} product": share if not share <= 1e-5 else 0}


def main() -> None:
    marlin.marlin_import_exception = None  # that there is no card: to make the classes, none is needed
    ExllamaV2Linear.validate_once = classmethod(lambda kind: (True, None))
    found: dict[str, float] = {}
    for bits, group, symmetric, shape in product((4, 8), (32, 128, -1), (True, False), SHAPES):
        if shape[1] % abs(group) == 0:
            found |= words(integer_scheme(bits, group, symmetric), shape)
    kinds = ((Marlin(), MarlinLinear, marlin_module), (Exllamav2(), ExllamaV2Linear, exllamav2_module))
    for backend, kind, build in kinds:
        taken = left = held = 0
        sides = (64, 100, 256, 1096)
        for bits, group, symmetric, out, width in product(
            range(2, 9), (16, 32, 48, 128, -1), (True, False), sides, sides
        ):
            scheme = integer_scheme(bits, group, symmetric)
            layer, theirs = layer_of(scheme, (out, width)), kind._validate(**arguments(scheme, (out, width)))[0]
            reason = backend.refuse(layer, "cuda")
            theirs = theirs and (symmetric or kind.SUPPORTS_SYM != [True]) and group in kind.SUPPORTS_GROUP_SIZE
            taken += reason is None and not theirs
            left += theirs and width % abs(group) == 0 and reason is not None
            if reason is None and bits == 4 and out == 64:
                parts, _ = word_parts(drawn(scheme, (out, width)), backend.name)
                made = build(layer, parts)
                held += sum(not torch.equal(getattr(made, name).data, part) for name, part in parts.items())
        found |= {f"{backend.name} held": held, f"{backend.name} taken": taken, f"{backend.name} left": left}
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)  # GPTQModel leaves threads behind that never end


if __name__ == "__main__":
    main()
