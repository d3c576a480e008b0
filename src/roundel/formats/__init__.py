"""One file for each format on disk; `unpack` is `pack`'s inverse."""

from __future__ import annotations

from collections.abc import Mapping

from roundel.errors import RecipeError, SourceError, nearest
from roundel.formats.autoround import AutoRound
from roundel.formats.autoround_mlx import AutoRoundMlx
from roundel.formats.awq import AutoAwq
from roundel.formats.bnb import Bnb
from roundel.formats.compressed_tensors import CompressedTensors
from roundel.formats.fake import Fake
from roundel.formats.format import Contents, Format, Found, Model, WordLayout
from roundel.formats.fp8 import Fp8, ModelOpt
from roundel.formats.gguf.format import Gguf, gguf_variant
from roundel.formats.gpt_oss import Mxfp4Blocks
from roundel.formats.gptq import AutoGptq, GptqV2
from roundel.formats.hqq import Hqq
from roundel.formats.mlx import Mlx

__all__ = ["FORMATS", "Contents", "Format", "Found", "Model", "WordLayout", "format_named", "reader_of"]

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        AutoRound(),
        AutoGptq(),
        GptqV2(),
        AutoAwq(),
        CompressedTensors(),
        Mlx(),
        AutoRoundMlx(),
        Bnb(),
        Hqq(),
        Fp8(),
        Gguf(),
        Fake(),
        ModelOpt(),
        Mxfp4Blocks(),
    )
}
_ALIASES = {
    "bitsandbytes": "bnb",
    "gptq": "auto_gptq",
    "auto_gptq_v2": "gptq_v2",
    "awq": "auto_awq",
    "auto-round": "auto_round",
    "compressed-tensors": "llm_compressor",
    "compressed_tensors": "llm_compressor",
}


def format_named(name: str) -> Format:
    """A format that is written; "gguf:q4_k_m" is one, too. Raises RecipeError with the nearest known name."""
    if name.lower().startswith("gguf:"):
        return gguf_variant(name[5:])
    found = FORMATS.get(_ALIASES.get(name, name))
    writable = [n for n, f in FORMATS.items() if f.writes]
    if found is None:
        raise RecipeError(
            f"Unknown format {name!r}.{nearest(name, (*writable, *_ALIASES))} Known are {', '.join(writable)}."
        )
    if not found.writes:
        raise RecipeError(f"Format {name!r} is only read, not written. Written are {', '.join(writable)}.")
    return found


def reader_of(config: Mapping[str, object]) -> Format | None:
    """The format a checkpoint's config declares; None for a checkpoint that is not quantized.

    Raises SourceError when it is quantized in a way that is not read.
    """
    names = ("quantization_config", "compression_config", "quantization")
    quantization = next((found for name in names if (found := config.get(name))), None)
    if not isinstance(quantization, Mapping):
        return None
    for format in FORMATS.values():
        reader = format.recognize(quantization)
        if reader is not None:
            return reader
    raise SourceError(
        f"The checkpoint is quantized by {quantization.get('quant_method')!r}, which is not read. Start from the "
        f"original model; read are {', '.join(FORMATS)}."
    )
