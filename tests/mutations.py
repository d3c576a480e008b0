"""Checkpoints made senseless at random: headers, configs and bytes of a sound one, changed in one to three places."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roundel.tensor import ITEMSIZE

__all__ = ["Sound", "mutated", "sound"]

NUMBERS = (0, -1, 1, 2, 3, 5, 7, 16, 31, 128, -128, 2**31, 2**63, 10**30, 1e9, -0.5, 1e300)
TEXTS = ("", "x", "re:(", "re:.*", "float", "int", "group", "tensor", "block", "4", "auto_round", "auto_round:auto_awq",
         "gptq_v2", "gemm", "nf4", "é", "a" * 5000, "re:((([a-z_.]+)+)+)+$", "(\\w+\\.?)+!")  # fmt: skip
PARTS = ("weight", "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape", "biases",
         "weight_zero_point", "weight_global_scale", "weight_scale_2", "weight_scale_inv", "input_scale", "W_q", "zero",
         "nbits", "shape", "weight.absmax", "weight.quant_map", "bias", "")  # fmt: skip

UP = "model.layers.0.mlp.up_proj"
SETTINGS = ("dynamic", "extra_config", "config_groups", "ignore", "sym_exceptions", "weight_block_size", "desc_act",
            "group_size", "bits", "sym", "zero_point", "version", "checkpoint_format", "packing_format", "format",
            "data_type", "act_data_type", "types", "provider", UP)  # fmt: skip


@dataclass
class Sound:
    """A checkpoint of one file in memory: the file's header, its config.json, the bytes of each tensor."""

    header: dict[str, dict[str, Any]]
    config: dict[str, Any]
    data: dict[str, bytes] = field(repr=False)

    def copy(self) -> Sound:
        header, config = json.loads(json.dumps([self.header, self.config]))
        return Sound(header, config, dict(self.data))

    def write(self, folder: Path, chance: random.Random) -> None:
        """The files, whose sizes agree with the header now and then only."""
        begin, stored = 0, []
        for name, entry in self.header.items():
            size = _nbytes(entry)
            raw = self.data.get(name, b"")
            if size is None or size > 1 << 22:  # absurd: the file stays small
                entry.setdefault("data_offsets", [begin, begin + (size or 0)])
                continue
            raw = raw[:size] if len(raw) >= size else raw + chance.randbytes(size - len(raw))
            entry["data_offsets"] = [begin, begin + size]
            stored.append(raw)
            begin += size
        text = json.dumps(self.header)
        if chance.random() < 0.05 and self.header:  # the same name twice
            name = next(iter(self.header))
            text = "{" + f"{json.dumps(name)}: {json.dumps(self.header[name])}, " + text[1:]
        body = struct.pack("<Q", len(text.encode())) + text.encode() + b"".join(stored)
        if chance.random() < 0.1:
            body = body[: chance.randrange(len(body))]
        if chance.random() < 0.05:
            at = chance.randrange(min(len(body), 4000))
            body = body[:at] + chance.randbytes(1) + body[at + 1 :]
        (folder / "model.safetensors").write_bytes(body)
        (folder / "config.json").write_text(json.dumps(self.config))


def sound(folder: Path) -> Sound:
    """A written checkpoint of one file, read."""
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    data = {n: raw[8 + length + e["data_offsets"][0] : 8 + length + e["data_offsets"][1]] for n, e in header.items()}
    return Sound(header, json.loads((folder / "config.json").read_text()), data)


def mutated(seed: Sound, chance: random.Random) -> Sound:
    """The same with one to three changes."""
    found = seed.copy()
    for _ in range(chance.randrange(1, 4)):
        if found.header:
            chance.choice(_CHANGES)(found, chance)
    return found


def _drop(it: Sound, chance: random.Random) -> None:
    del it.header[_name(it, chance)]


def _rename(it: Sound, chance: random.Random) -> None:
    old = _name(it, chance)
    module = old.rpartition(".")[0]
    new = chance.choice([f"{module}.{chance.choice(PARTS)}", f"{old}.weight", old.upper(), "lm_head", "", "a..b"])
    it.header[new], it.data[new] = it.header.pop(old), it.data.get(old, b"")


def _double(it: Sound, chance: random.Random) -> None:
    old = _name(it, chance)
    new = f"{old.rpartition('.')[0]}.{chance.choice(PARTS)}"
    it.header[new], it.data[new] = json.loads(json.dumps(it.header[old])), it.data.get(old, b"")


def _reshape(it: Sound, chance: random.Random) -> None:
    entry = it.header[_name(it, chance)]
    shape = [n for n in entry["shape"] if isinstance(n, int)] if isinstance(entry["shape"], list) else []
    entry["shape"] = chance.choice([
        [], [0], [1], [0, 64], [2, 3, 4], [1, 1, 1, 1], shape[::-1], [n + 1 for n in shape], [n * 2 for n in shape],
        [n // 2 for n in shape], [1, *shape], [*shape, 1], [math.prod(shape)], [2**40, *shape], [2**63], [-1, *shape],
        [1.5], ["8"], None, "x",
    ])  # fmt: skip


def _retype(it: Sound, chance: random.Random) -> None:
    it.header[_name(it, chance)]["dtype"] = chance.choice([*ITEMSIZE, *ITEMSIZE, "F4", "", None, 8])


def _same_size_retype(it: Sound, chance: random.Random) -> None:
    entry = it.header[_name(it, chance)]
    if isinstance(entry["dtype"], str):
        entry["dtype"] = chance.choice([d for d, n in ITEMSIZE.items() if n == ITEMSIZE.get(entry["dtype"])] or ["U8"])


def _noise(it: Sound, chance: random.Random) -> None:
    name = _name(it, chance)
    it.data[name] = chance.choice([b"", chance.randbytes(len(it.data.get(name, b"")))])


def _spoil_bytes(it: Sound, chance: random.Random) -> None:
    raw = bytearray(it.data.get(name := _name(it, chance), b""))
    for _ in range(min(len(raw), 4)):
        raw[chance.randrange(len(raw))] = chance.choice([0, 1, 127, 128, 255])
    it.data[name] = bytes(raw)


def _spoil_text(it: Sound, chance: random.Random) -> None:
    """Numbers and words in the states that bitsandbytes keeps as JSON."""
    states = [name for name in it.header if "quant_state" in name]
    if states:
        name = chance.choice(states)
        old = it.data.get(name, b"")
        new = chance.choice(
            [b"{}", b"[" * 300, b'{"shape": [1e9, -4]}', old.replace(b"64", chance.choice([b"-4", b"63", b"0 "]))]
        )
        it.data[name] = new.ljust(len(old))


def _spoil_setting(it: Sound, chance: random.Random) -> None:
    """A value of the quantization's config, at any depth, becomes another."""
    here: Any = it.config.get("quantization_config") or it.config.get("quantization") or it.config
    while isinstance(here, (dict, list)) and here:
        key = chance.choice(list(here) if isinstance(here, dict) else range(len(here)))
        if isinstance(here[key], (dict, list)) and here[key] and chance.random() < 0.7:
            here = here[key]
            continue
        here[key] = _junk(chance)
        return


def _add_setting(it: Sound, chance: random.Random) -> None:
    here = it.config.get("quantization_config") or it.config.get("quantization")
    if isinstance(here, dict):
        named = {chance.choice(TEXTS): {"bits": _junk(chance)}}
        weights = {"num_bits": _junk(chance), "group_size": _junk(chance)}
        here[chance.choice(SETTINGS)] = chance.choice([
            _junk(chance), {UP: _junk(chance)}, named, {"g": {"targets": [_junk(chance)], "weights": weights}},
        ])  # fmt: skip


def _spoil_config(it: Sound, chance: random.Random) -> None:
    it.config[chance.choice(list(it.config))] = _junk(chance)


def _other_method(it: Sound, chance: random.Random) -> None:
    methods = ("gptq", "awq", "fp8", "compressed-tensors", "modelopt", "mxfp4", "auto-round", "bitsandbytes", "hqq", 3)
    it.config["quantization_config"] = {"quant_method": chance.choice(methods), "format": "pack-quantized", "bits": 4,
                                        "load_in_4bit": True, "group_size": 32}  # fmt: skip


_CHANGES: tuple[Callable[[Sound, random.Random], None], ...] = (
    _drop, _rename, _double, _reshape, _reshape, _retype, _same_size_retype, _noise, _spoil_bytes, _spoil_text,
    _spoil_setting, _spoil_setting, _add_setting, _add_setting, _spoil_config, _other_method,
)  # fmt: skip


def _name(it: Sound, chance: random.Random) -> str:
    return chance.choice(list(it.header))


def _junk(chance: random.Random) -> Any:
    deep: Any = {}
    for _ in range(200):
        deep = {"weights": deep} if chance.random() < 0.5 else [deep]
    small = [None, True, False, [], {}, [None], {"a": None}, [[1], 2], {"bits": -3, "group_size": 0}, deep]
    return chance.choice([*small, *NUMBERS[: len(small) // 2], chance.choice(NUMBERS), *chance.sample(TEXTS, 3)])


def _nbytes(entry: dict[str, Any]) -> int | None:
    shape, size = (
        entry.get("shape"),
        ITEMSIZE.get(entry.get("dtype") or "") if isinstance(entry.get("dtype"), str) else None,
    )
    if size is None or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        return None
    return math.prod(shape) * size
