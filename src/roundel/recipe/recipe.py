"""The wish as one frozen value. Every default of a run that shapes its output is written here, once.

A recipe is saved with the output (`recipe.json`) and can be fed back (`--recipe-file`). It holds nothing that does not
shape the output: no paths, no device, no number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Literal

from roundel.chain import Chain, Value, known_options, make_chain, names_and_options
from roundel.errors import RecipeError, nearest
from roundel.families import text_config
from roundel.formats import format_named
from roundel.recipe.layer_config import compiled, scheme_of_entry
from roundel.recipe.reading import parse_size, read_mapping, read_text
from roundel.scheme import DEFAULT_SCHEME, MIXES, Mix, Scheme

__all__ = ["RECIPES", "STORED", "TOGETHER", "Recipe"]

TOGETHER = 8  # samples
STORED = "STORED"  # in place of a scheme, where a quantized checkpoint is converted: what each layer is on

RECIPES: dict[str, dict[str, object]] = {  # named wishes; what is given beside one wins
    "default": {"algorithm": "signround", "nsamples": 128},
    "best": {"algorithm": "signround", "nsamples": 512, "options": {"iters": 1000}},
    "light": {"algorithm": "signround", "nsamples": 128, "options": {"iters": 50, "lr": 5e-3}},
    "opt-rtn": {"algorithm": "opt-rtn"},
    "rtn": {"algorithm": "rtn"},
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The wish: which numbers, chosen how, stored how.

    scheme          a preset's name, a mix's name, or W<bits>A16[G<group>][_ASYM]; STORED in a conversion
    conversion      "exact" moves the layers of a quantized checkpoint to another format, number for number, and touches
                    nothing else; "requantize" rounds those anew whose numbers the format does not hold
    bits, group_size, sym   replace that part of an integer scheme; None keeps the scheme's
    algorithm       what chooses the codes, transforms first: "gptq", "awq,signround"
    options         hyperparameters by field name, "iters" or "signround.iters"
    dataset, nsamples, seqlen   what activations are calibrated on, where the algorithm reads them: where the text
                    comes from, samples, tokens of a sample
    batch_size      samples run together, and taken for a step of learning; None: 8, and what the algorithm takes
    seed            of the samples' order and of everything an algorithm draws
    activation_dtype   of the activations that travel from block to block: float32 or bfloat16
    calibrate_all_experts   every expert sees every token for its statistics; outputs do not change
    formats         the formats to write, in one pass; more than one go to a folder each
    layer_config    pattern -> preset name, or {scheme, bits, group_size, sym}; {"bits": 16} keeps layers. Exact names
                    win over patterns, later patterns over earlier ones
    ignore_layers   patterns of layers to keep in full precision
    quant_lm_head   whether the output head is rounded too
    kv_cache        "fp8": scales are stored with which runtimes keep keys and values in FP8; None: none are
    shard_size      largest output file, as bytes or "5GB"
    strict          whether a fallback is an error instead of a row of the report

    Raises RecipeError for a wish that makes no sense whatever the model.
    """

    scheme: str = DEFAULT_SCHEME
    conversion: Literal["exact", "requantize"] | None = None
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    algorithm: str = "rtn"
    options: Mapping[str, Value] = field(default_factory=dict)
    dataset: str = "NeelNanda/pile-10k"
    nsamples: int = 128
    seqlen: int = 2048
    batch_size: int | None = None
    seed: int = 42
    activation_dtype: str = "float32"
    calibrate_all_experts: bool = False
    formats: tuple[str, ...] = ("auto_round",)
    layer_config: Mapping[str, str | Mapping[str, object]] = field(default_factory=dict)
    ignore_layers: tuple[str, ...] = ()
    quant_lm_head: bool = False
    kv_cache: str | None = None
    shard_size: str | int = "5GB"
    strict: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", tuple(format_named(f).name for f in self.formats))
        object.__setattr__(self, "ignore_layers", tuple(self.ignore_layers))
        if not self.formats:
            raise RecipeError("No format is asked for. Name at least one, such as auto_round.")
        if len(set(self.formats)) < len(self.formats):
            raise RecipeError(f"Format {self.formats[0]} is asked for twice. Name each format once.")
        self._check_conversion()
        parse_size(self.shard_size)
        if self.converts_as_stored:
            return
        self._check_calibration()
        object.__setattr__(self, "options", self.chain.typed(self.options))
        self.default_for("linear")
        for pattern, value in self.layer_config.items():
            compiled(pattern)
            scheme_of_entry(pattern, value, self.default_for("linear"))
        for pattern in self.ignore_layers:
            compiled(pattern)

    def _check_conversion(self) -> None:
        if self.conversion not in (None, "exact", "requantize"):
            raise RecipeError(f"conversion={self.conversion!r} is not possible: it is exact or requantize.")
        if self.conversion is None:
            if self.scheme == STORED:
                raise RecipeError(f"Scheme {STORED} is that of a conversion. Use roundel convert, or name a scheme.")
            return
        if len(self.formats) > 1:
            raise RecipeError("A conversion writes one format. Convert once for each.")
        idle = {
            "algorithm": self.algorithm != "rtn", "layer_config": self.layer_config, "options": self.options,
            "ignore_layers": self.ignore_layers, "quant_lm_head": self.quant_lm_head, "strict": self.strict,
        }  # fmt: skip
        asked = [name for name, value in idle.items() if value]
        if asked:
            raise RecipeError(
                f"A conversion moves what is quantized, as it is; {asked[0]} has no meaning for it. Drop it, or use "
                "roundel quantize."
            )

    @property
    def converts_as_stored(self) -> bool:
        """Whether each layer stays on the scheme it is on, or on one that holds the same numbers."""
        return self.conversion is not None and self.scheme == STORED

    def _check_calibration(self) -> None:
        for name, low in (("nsamples", 1), ("seqlen", 2), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if name == "batch_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise RecipeError(f"{name}={value!r} is not possible: it is a whole number, at least {low}.")
        if self.activation_dtype not in ("float32", "bfloat16"):
            raise RecipeError(f"activation_dtype={self.activation_dtype!r} is not possible: float32 or bfloat16.")
        if self.kv_cache not in (None, "fp8"):
            raise RecipeError(f"kv_cache={self.kv_cache!r} is not possible: fp8, or nothing.")
        reads = self.reads_activations
        if self.calibrate_all_experts and not reads:
            raise RecipeError(
                f"calibrate_all_experts has no meaning for {self.algorithm}, which looks at no data. Drop it, or "
                "choose an algorithm that does, such as gptq."
            )
        if self.importance_file is not None and self.chain.transforms:
            raise RecipeError(
                f"{self.importance_file} says what enters layers as they are, and {self.chain.transforms[0].name} "
                "changes that. Drop one of the two, or have importances measured: --imatrix without a file."
            )

    @cached_property
    def chain(self) -> Chain:
        """The steps, made from their names and options."""
        return make_chain(
            self.algorithm,
            self.options,
            {"seed": self.seed} | ({} if self.batch_size is None else {"batch_size": self.batch_size}),
        )

    @cached_property
    def reads_activations(self) -> bool:
        """Whether any step looks at data, or what only data can tell is stored, of a layer's inputs or of the cache."""
        if self.conversion is not None:
            return False  # a scale of inputs that is stored moves over, too
        default = self.default_for("linear")
        own = (scheme_of_entry(pattern, value, default) for pattern, value in self.layer_config.items())
        schemes = (default, self.default_for("expert"), self.default_for("head"), *own)
        stores = self.kv_cache is not None or any(each.stores_input_scale for each in schemes if each is not None)
        return self.chain.reads_activations or stores

    @property
    def importance_file(self) -> str | None:
        """The file of importances that stands for data."""
        named = self.chain.algorithm.imatrix
        return named if isinstance(named, str) else None

    @property
    def label(self) -> str:
        """What people call the result: the mix's name (GGUF's too), or the scheme's with bits, group size and symmetry
        replaced."""
        if self.converts_as_stored:
            return f"as {self.formats[0]}"
        decided = next((f.partition(":")[2].upper() for f in self.formats if f.startswith("gguf:")), None)
        mix = _mix(self.scheme)
        return decided or (mix.name if mix is not None else self.default_for("linear").name)

    def default_for(self, role: str) -> Scheme:
        """The scheme of a layer that no override names."""
        mix = _mix(self.scheme)
        name = self.scheme if mix is None else (mix.experts if role == "expert" else mix.others)
        if mix is not None and self.bits is not None:
            raise RecipeError(
                f"bits={self.bits} does not go with {mix.name}, which mixes widths itself. Drop one of the two."
            )
        return Scheme.parse(name).altered(bits=self.bits, group_size=self.group_size, sym=self.sym)

    @property
    def together(self) -> int:
        """Samples that are run together."""
        return TOGETHER if self.batch_size is None else self.batch_size

    def tokens_for(self, config: Mapping[str, object]) -> int:
        """Tokens of a sample: seqlen, or what a model of this config takes."""
        limit = text_config(config).get("max_position_embeddings")
        return min(self.seqlen, limit) if isinstance(limit, int) else self.seqlen

    def to_dict(self) -> dict[str, object]:
        """Only what differs from the defaults, ready for JSON, and fit for `from_dict`."""
        default = Recipe()
        found = {k: v for k, v in asdict(self).items() if v != getattr(default, k)}
        always: dict[str, object] = {"scheme": self.scheme, "algorithm": self.algorithm, "formats": list(self.formats)}
        if self.reads_activations:
            always |= {name: getattr(self, name) for name in ("dataset", "nsamples", "seqlen", "seed")}
        return always | {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Recipe:
        """Raises RecipeError for a field that does not exist or a value of the wrong type."""
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise RecipeError(
                    f"A recipe has no field {key!r}.{nearest(key, (*known, *known_options()))} Fields are "
                    f"{', '.join(sorted(known))}."
                )
        clean = dict(values)
        if "algorithm" in clean and not isinstance(clean["algorithm"], str):
            clean["algorithm"], given = names_and_options(clean["algorithm"])
            if given:
                clean["options"] = {**given, **_mapping(clean.get("options", {}))}
        for key, kind in (
            ("scheme", str),
            ("algorithm", str),
            ("quant_lm_head", bool),
            ("strict", bool),
            ("layer_config", Mapping),
            ("options", Mapping),
            ("dataset", str),
            ("conversion", str),
            ("calibrate_all_experts", bool),
        ):
            if key in clean and not isinstance(clean[key], kind):
                raise RecipeError(
                    f"Recipe field {key} is {clean[key]!r}; it takes "
                    f"{'a mapping' if kind is Mapping else kind.__name__}."
                )
        for key in ("formats", "ignore_layers"):
            value = clean.get(key, ())
            if isinstance(value, str):
                clean[key] = tuple(part.strip() for part in value.split(",") if part.strip())
            elif not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
                raise RecipeError(f"Recipe field {key} is {value!r}; it takes a list of names.")
            elif key in clean:
                clean[key] = tuple(value)
        return cls(**clean)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """From a JSON or YAML file. Raises RecipeError when it cannot be read or means nothing."""
        return cls.from_dict(read_mapping(read_text(path), str(path)))


def _mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"Recipe field options is {value!r}; it takes a mapping.")
    return value


def _mix(name: str) -> Mix | None:
    return MIXES.get(name.strip().upper())
