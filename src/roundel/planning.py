"""What will happen, exactly, before the first weight is read: the contract between a recipe and a model.

A plan knows every output tensor's name, dtype, shape and file offset. So impossible wishes fail at once and all
together, files are written header first in any order, and resuming is a list of finished names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from roundel import __version__
from roundel.cached import carried_cache
from roundel.checkpoint import Checkpoint, Matrix
from roundel.choosing import choose, choose_conversions, head_asked, layers_of, settle
from roundel.errors import PlanError
from roundel.families import attention_of, text_config
from roundel.formats import Contents, Format, Model, format_named
from roundel.formats.format import CACHE_PARTS
from roundel.fusion import SLAB_BYTES, fuses, goes_by_rows, slab_rows
from roundel.importance import Importances, open_importances
from roundel.io.safetensors import ShardLayout, stacked
from roundel.matrices import sharing
from roundel.notes import notes_of
from roundel.recipe import Choice, Recipe, parse_size
from roundel.scheme import PRESETS, Scheme
from roundel.tensor import ITEMSIZE, TensorSpec
from roundel.unit import Layer, Piece

__all__ = ["PART_TOKENS", "Copy", "Kept", "Output", "Plan", "Work", "build_plan", "part_of"]


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A tensor that is written as it is stored: its name in the output, and where it lies in the source."""

    spec: TensorSpec
    piece: Piece


@dataclass(frozen=True, kw_only=True)
class Work:
    """The smallest piece of work that is done, committed and resumed as a whole.

    name     unique; the layer's, the tensor's or the unit's name
    kind     "round" a layer, "decode" a packed matrix that stays in full precision, "copy" tensors, or a "unit":
             decoder blocks, mostly one, or the output head, of which all is needed at once
    layer    for "round" and "decode"
    copies   tensors written along with it: its bias, all of a "copy", what stays of a unit
    layers   the matrices of a unit that are rounded
    decodes  the packed matrices of a unit that stay in full precision
    blocks   the names of a unit's blocks, in the order they are run
    caches   attention modules of a unit whose keys and values are measured
    beside   layers rounded elsewhere that have a scale in common with `layer`, so that they are read, too
    shards   source files it reads
    """

    name: str
    kind: Literal["round", "decode", "copy", "unit"]
    layer: Layer | None = None
    copies: tuple[Copy, ...] = ()
    layers: tuple[Layer, ...] = ()
    decodes: tuple[Layer, ...] = ()
    blocks: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    beside: tuple[Layer, ...] = ()
    shards: tuple[str, ...] = ()

    @property
    def rounded(self) -> tuple[Layer, ...]:
        """The layers it rounds."""
        if self.kind == "round":
            assert self.layer is not None
            return (self.layer,)
        return self.layers


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A matrix that stays in full precision, and why."""

    name: str
    shape: tuple[int, int]
    dtype: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Output:
    """One format of a run: the settled format, its config, and its files, each laid out."""

    format: Format
    config: Mapping[str, object]
    shards: tuple[ShardLayout, ...]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that will be written.

    origins      layer name -> where its scheme was decided
    kept         matrices that stay, each with its reason
    outputs      one for each format
    importances  what a file says of layers' inputs, where the recipe names one
    notes        fallbacks and facts the user should know; an error under `strict` where they are fallbacks
    """

    recipe: Recipe
    source_name: str
    source_revision: str | None
    source_fingerprint: str
    family: str
    works: tuple[Work, ...]
    layers: tuple[Layer, ...]
    origins: Mapping[str, str]
    kept: tuple[Kept, ...]
    outputs: tuple[Output, ...]
    untied: bool
    source_bytes: int
    demoted: Mapping[str, str] = field(default_factory=dict)
    calibration: str | None = None
    importances: Importances | None = None
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """sha256 of what shapes the output: recipe, source headers, and every output tensor."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode())
        for output in self.outputs:
            for shard in output.shards:
                digest.update(shard.header)
        return digest.hexdigest()

    def identity(self) -> dict[str, object]:
        """The fields that name a plan, for comparing with an unfinished one."""
        return {
            "roundel": __version__,
            "source": self.source_name,
            "source_fingerprint": self.source_fingerprint,
            **{f"recipe.{k}": v for k, v in self.recipe.to_dict().items()},
            "demoted": dict(self.demoted),
            **({"calibration": self.calibration} if self.calibration else {}),
            **({"importances": self.importances.sha256} if self.importances else {}),
        }

    @property
    def parameters(self) -> int:
        """Weights in the layers that are rounded."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def extent(self) -> str:
        """What is rounded, and how wide it is stored, in words."""
        if not self.layers:
            return "no layer is rounded"
        return f"{len(self.layers)} layers at {self.bits_per_weight:.3f} bits per weight"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per rounded weight in the first format, scales and zero points included."""
        stored = sum(s.nbytes for layer in self.layers for s in self.outputs[0].format.outputs(layer))
        return 8 * stored / max(1, self.parameters)

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    def peak_memory(self, workers: int, device: str = "cpu") -> int:
        """Bytes of memory the run is expected to reach, the interpreter and its libraries included."""
        algorithm, formats = self.recipe.chain.algorithm, [o.format for o in self.outputs]
        sizes, needs_torch, copied = [], device != "cpu", all(format.copies for format in formats)
        for work in self.works:
            plain = work.kind == "copy" and copied and all(c.piece.is_whole for c in work.copies)
            layer = work.layer if work.kind == "round" else None
            fused = layer is not None and fuses(layer, formats, algorithm, device)
            needs_torch |= not (plain or fused)
            if not fused and layer is not None and goes_by_rows(layer, formats, algorithm, device):
                sizes.append(min(layer.parameters, SLAB_BYTES // ITEMSIZE[layer.dtype]) * FLOAT_BYTES)
            else:
                sizes.append(_working_bytes(work, formats, fused, plain))
        base = (BASE_WITH_TORCH if needs_torch else BASE_PLAIN) + (0 if copied else TOKENIZER_BYTES)
        apart = sum(sorted(sizes, reverse=True)[:workers])
        return base + max(apart, sum(self.unit_memory(device)))

    def unit_memory(self, device: str = "cpu") -> tuple[int, int]:
        """Bytes of the largest unit while it is worked on: of its weights, in all copies that the steps hold, and of
        the activations of the samples that run through it at once. What lies between units comes on top."""
        found = (0, 0)
        for work in self.works:
            if work.kind == "unit":
                found = max(found, _unit_bytes(work, self.recipe, device), key=sum)
        return found


COPY_FACTOR = 8  # of a slab of what is copied in another dtype: stored, in float32, and what it becomes
COPY_BYTES = 8 << 20  # a copy goes from file to file, at most through a buffer of this size
BASE_PLAIN = 141 << 20  # interpreter, numpy, numba, rich: measured
BASE_WITH_TORCH = 330 << 20  # the same with torch: measured
TOKENIZER_BYTES = 105 << 20  # of transformers, by which GGUF's vocabulary is read: measured
FLOAT_BYTES = 17  # for each weight of a matrix on its way through torch: stored, decoded thrice over, codes
PART_TOKENS = 2048  # run at once on CPU where only outputs count: more is not faster, and takes memory
EXPERTS_A_TOKEN = 4
KEPT_FORWARD = 0.6  # of what a unit's layers are given and hand on, at once: measured
KEPT_LEARNED = 2.0  # of the same, where it is kept for the way back: measured
COMPARED_BYTES = 24 << 20  # of float64, while a matrix is compared with what it became


def part_of(recipe: Recipe, tokens: int, device: str) -> int:
    """Samples of so many tokens that are run at once where only outputs count."""
    return min(recipe.together, max(1, PART_TOKENS // tokens)) if device == "cpu" else recipe.together


def _unit_bytes(work: Work, recipe: Recipe, device: str) -> tuple[int, int]:
    """(weights, activations). Where a step learns, all that layers are given and hand on is kept for the way back; else
    the largest of it. Of experts about EXPERTS_A_TOKEN count."""
    layers = (*work.layers, *work.decodes)
    largest = max((layer.parameters for layer in layers), default=0)
    stored = sum(layer.parameters * ITEMSIZE[layer.dtype] for layer in layers)
    weights = stored + 4 * (recipe.chain.copies * sum(layer.parameters for layer in layers) + 2 * largest)
    experts = [sum(layer.shape) for layer in layers if layer.role == "expert"]
    width = sum(sum(layer.shape) for layer in layers if layer.role != "expert")
    width += 3 * EXPERTS_A_TOKEN * max(experts, default=0)
    part = part_of(recipe, recipe.seqlen, device)
    learned = recipe.chain.learns_on(recipe.together, part)
    return int(weights), int(4 * recipe.seqlen * width * max(KEPT_LEARNED * learned, KEPT_FORWARD * part))


def _working_bytes(work: Work, formats: Sequence[Format], fused: bool, plain: bool) -> int:
    """Bytes one piece of work holds at its peak: a slab and the packed parts, or matrices in float and in codes."""
    if plain:
        return COPY_BYTES
    if work.kind == "unit":
        return 0
    if work.layer is None:
        return max(
            COPY_FACTOR * min(c.spec.nbytes, SLAB_BYTES if c.piece.in_rows else c.spec.nbytes) for c in work.copies
        )
    layer = work.layer
    packed = sum(s.nbytes for f in formats for s in f.outputs(layer)) if work.kind == "round" else layer.parameters * 2
    if fused:
        codes = layer.shape[1] * min(slab_rows(layer), layer.shape[0])
        return packed + codes * (1 + ITEMSIZE[layer.dtype])
    return packed + layer.parameters * FLOAT_BYTES + COMPARED_BYTES


def build_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    demoted: Mapping[str, str] | None = None,
    seen: tuple[str, Sequence[str]] | None = None,
) -> Plan:
    """Decide everything.

    seen      where activations are read: sha256 of the tokens they are made from, and notes on these
    demoted   layers that a run found it cannot round (weights that are not finite) -> why; they are kept
    Raises PlanError with every problem at once: patterns that match nothing, layers a format or the algorithm refuses,
    formats that cannot hold the mixture.
    """
    demoted = demoted or {}
    problems: list[str] = []
    matrices = dict(checkpoint.matrices)
    untied = checkpoint.is_tied and head_asked(recipe, checkpoint.family.head)
    if untied:
        matrices[checkpoint.family.head] = checkpoint.tied_head()
    elif recipe.quant_lm_head and checkpoint.family.head not in matrices:
        problems.append(
            f"--quant-lm-head is asked for and {checkpoint.source.name} has no {checkpoint.family.head}. Drop the "
            f"option."
        )
    shapes = {matrix.name: matrix.shape for matrix in matrices.values()}
    importances = None
    if recipe.importance_file is not None:
        importances = open_importances(Path(recipe.importance_file), checkpoint.source.config, shapes)
    named = [format_named(name) for name in recipe.formats]
    model = Model(
        config=checkpoint.source.config,
        folder=Path() if all(format.copies for format in named) else checkpoint.source.small_folder(),
        name=checkpoint.source.name,
        matrices=shapes,
        importance=bool(getattr(recipe.chain.algorithm, "imatrix", None)),
    )
    formats = [format.for_model(model) for format in named]
    _check_deciding(formats, recipe)
    floats = formats[0].floats
    if recipe.conversion is not None:
        if floats is None:
            _check_quantized(checkpoint)
        embedding = checkpoint.family.embedding.removesuffix(".weight")
        choices = choose_conversions(matrices, recipe, embedding, problems, formats[0])
    else:
        choices = choose(matrices, recipe, checkpoint.family.head, problems, formats)
    for name, reason in demoted.items():
        choices[name] = Choice(scheme=None, origin=reason)
    layers = layers_of(matrices, choices, formats, recipe, problems)
    if not layers and not problems and floats is None:
        problems.append(
            f"No layer of {checkpoint.source.name} would be rounded: every matrix is kept "
            f"({'; '.join(dict.fromkeys(c.origin for c in choices.values()))}). Change what is ignored or kept."
        )
    settled = settle(formats, layers, problems)
    if problems:
        raise PlanError(problems)
    splits = any(format.splits for format in settled)
    cache = carried_cache(checkpoint, settled, recipe.kv_cache)
    works = _works(checkpoint, matrices, {layer.name: layer for layer in layers}, splits, cache.left)
    if recipe.reads_activations:
        works = _units(works, checkpoint, recipe.chain.blocks_at_a_time)
        _check_measured(works)
    if recipe.kv_cache is not None:
        works = _with_caches(works, settled)
    _check_stacks(layers, choices, settled)
    order = {name: i for i, name in enumerate(checkpoint.source.tensors)}
    _check_names(works, settled, order, checkpoint.source.name)
    kept = tuple(
        Kept(name=m.name, shape=m.shape, dtype=_kept_dtype(m, settled[0]), reason=choices[m.name].origin)
        for m in matrices.values()
        if choices[m.name].scheme is None
    )
    contents = Contents(
        layers=layers,
        kept=[k.name for k in kept],
        default=_most_common(layers),
        blocks=_blocks(checkpoint, layers),
        head=checkpoint.family.head,
        embedding=checkpoint.family.embedding.removesuffix(".weight"),
        kv_cache=recipe.kv_cache or cache.scheme,
    )
    outputs = tuple(
        Output(
            format=f,
            config=f.config(contents),
            shards=f.lay_out(_specs(works, f, order), layers, parse_size(recipe.shard_size), _stacks(layers, f)),
        )
        for f in settled
    )
    return Plan(
        recipe=recipe,
        source_name=checkpoint.source.name,
        source_revision=checkpoint.source.revision,
        source_fingerprint=checkpoint.source.fingerprint(),
        family=checkpoint.family.name + (" (a guess)" if checkpoint.family.guess else ""),
        works=works,
        layers=tuple(layers),
        origins={layer.name: choices[layer.name].origin for layer in layers},
        kept=kept,
        outputs=outputs,
        untied=untied,
        source_bytes=sum(s.nbytes for s in checkpoint.source.tensors.values()),
        demoted=dict(demoted),
        calibration=seen[0] if seen else None,
        importances=importances,
        notes=(
            *(seen[1] if seen else ()),
            *notes_of(checkpoint, layers, matrices, demoted, untied),
            *cache.notes,
            *(caveat for format in settled for caveat in format.caveats(contents)),
        ),
    )


def _check_quantized(checkpoint: Checkpoint) -> None:
    if all(matrix.stored.scheme is None for matrix in checkpoint.matrices.values()):
        raise PlanError(
            f"{checkpoint.source.name} is not quantized, so there is nothing to convert. Use roundel quantize to round "
            "its weights."
        )


def _check_deciding(formats: Sequence[Format], recipe: Recipe) -> None:
    """A format that decides on schemes itself has no other beside it, and one of floats has nothing to be chosen."""
    deciding = [f.name for f in formats if f.schemes() is not None]
    if deciding and len(formats) > 1:
        others = ", ".join(f.name for f in formats if f.name != deciding[0])
        raise PlanError(
            f"{deciding[0]} decides how every tensor is stored, and {others} cannot share that. Write it alone."
        )
    if formats[0].floats is not None and recipe.algorithm != Recipe.algorithm and not recipe.layer_config:
        raise PlanError(
            f"{formats[0].name} rounds nothing to codes, so {recipe.algorithm} has nothing to choose. Drop --algorithm."
        )


def _works(
    checkpoint: Checkpoint,
    matrices: Mapping[str, Matrix],
    layers: Mapping[str, Layer],
    splits: bool,
    left: Collection[str],
) -> tuple[Work, ...]:
    """Every tensor of the source exactly once (a tied head reads the embedding's twice), in the order they lie in the
    files.

    splits   whether fused tensors are taken apart although no part of them is rounded
    left     loose tensors that are not written
    """
    source = checkpoint.source
    split = {p.tensor for m in matrices.values() if m.name in layers and m.is_split for p in m.stored.parts.values()}
    works: list[Work] = []
    whole: dict[str, None] = {}  # fused tensors of which no part is rounded, copied once
    for matrix in matrices.values():
        layer = layers.get(matrix.name)
        tensors = [p.tensor for p in matrix.stored.parts.values()]
        fused = matrix.is_split and not splits and not split.intersection(tensors)
        if layer is None and fused and matrix.stored.format == "plain":
            whole.update(dict.fromkeys(tensors + ([matrix.bias[1].tensor] if matrix.bias else [])))
            continue
        copies = (_copy(source.tensors, *matrix.bias),) if matrix.bias else ()
        if layer is not None:
            works.append(_work(checkpoint, matrix.name, "round", layer, copies, sharing(layer, layers)))
        elif matrix.stored.format != "plain":
            works.append(_work(checkpoint, matrix.name, "decode", matrix.layer(), copies))
        else:
            weight = _copy(source.tensors, matrix.name + ".weight", matrix.stored.parts["weight"])
            works.append(_work(checkpoint, matrix.name + ".weight", "copy", None, (weight, *copies)))
    for name in (*whole, *(name for name in checkpoint.loose if name not in left)):
        works.append(_work(checkpoint, name, "copy", None, (_copy(source.tensors, name, Piece(tensor=name)),)))
    order = {name: i for i, name in enumerate(source.tensors)}
    return tuple(sorted(works, key=lambda w: min(order[t] for t in _tensors(w))))


def _units(works: Sequence[Work], checkpoint: Checkpoint, together: int) -> tuple[Work, ...]:
    """Everything of `together` decoder blocks as one piece of work, and the output head where it is rounded: what
    stands apart from the blocks first, then the blocks in order."""
    blocks: dict[tuple[str, int], list[Work]] = {}
    apart: list[Work] = []
    heads: list[Work] = []
    layers_in_blocks = _block_count(checkpoint.source.config)
    for work in works:
        tried = (re.match(rf"({re.escape(path)})\.(\d+)\.", work.name) for path in checkpoint.family.blocks)
        found = next((match for match in tried if match), None)
        if found is not None and (layers_in_blocks is None or int(found[2]) < layers_in_blocks):
            blocks.setdefault((found[1], int(found[2])), []).append(work)
        elif work.kind == "round" and work.layer is not None and work.layer.role == "head":
            heads.append(work)
        else:
            apart.append(work)
    units: list[Work] = []
    in_order = sorted(blocks)
    for path in dict.fromkeys(path for path, _ in in_order):
        indices = [index for p, index in in_order if p == path]
        for start in range(0, len(indices), together):
            part = indices[start : start + together]
            name = f"{path}.{part[0]}" + (f"-{part[-1]}" if len(part) > 1 else "")
            inside = [work for index in part for work in blocks[path, index]]
            units.append(_unit(name, inside, [f"{path}.{index}" for index in part]))
    return (*apart, *units, *(_unit(work.name, [work], [work.name]) for work in heads))


def _unit(name: str, works: Sequence[Work], blocks: Sequence[str]) -> Work:
    return Work(
        name=name,
        blocks=tuple(blocks),
        kind="unit",
        copies=tuple(c for w in works for c in w.copies),
        layers=tuple(w.layer for w in works if w.kind == "round" and w.layer is not None),
        decodes=tuple(w.layer for w in works if w.kind == "decode" and w.layer is not None),
        shards=tuple(dict.fromkeys(s for w in works for s in w.shards)),
    )


def _block_count(config: Mapping[str, object]) -> int | None:
    count = text_config(config).get("num_hidden_layers", config.get("num_hidden_layers"))
    return count if isinstance(count, int) else None


def _with_caches(works: Sequence[Work], formats: Sequence[Format]) -> tuple[Work, ...]:
    """The works, their attention modules named. Scales that the source has are measured anew."""
    problems = [
        f"{f.name} has no place for scales of keys and values that its readers look at, which --kv-cache asks for. "
        "Use format llm_compressor, or leave --kv-cache out."
        for f in formats
        if not f.caches
    ]
    found: list[Work] = []
    for work in works:
        if work.kind != "unit" or any(layer.role == "head" for layer in work.layers):
            found.append(work)
            continue
        names = [layer.name for layer in (*work.layers, *work.decodes)] + [c.spec.name for c in work.copies]
        modules = tuple(dict.fromkeys(module for name in names if (module := attention_of(name))))
        if not modules:
            problems.append(
                f"{work.name} has no keys and values of its own (k_proj and v_proj, or qkv_proj), as with latent "
                "attention. Leave --kv-cache out."
            )
        again = {f"{module}.{part}" for module in modules for part in CACHE_PARTS}
        kept = tuple(copy for copy in work.copies if copy.spec.name not in again)
        found.append(replace(work, caches=modules, copies=kept))
    if problems:
        raise PlanError(problems)
    return tuple(found)


def _check_measured(works: Sequence[Work]) -> None:
    """Inputs are measured where tokens run through blocks."""
    apart = [w.layer for w in works if w.kind == "round" and w.layer is not None and w.layer.scheme.stores_input_scale]
    if apart:
        raise PlanError(
            f"{apart[0].name} stands outside the decoder blocks, where no inputs are measured, and "
            f"{apart[0].scheme.name} stores a scale of them. Keep it with --ignore-layers, or choose a scheme that "
            "scales inputs at run time, such as FP8_DYNAMIC."
        )


def _stacks(layers: Sequence[Layer], format: Format) -> dict[str, tuple[str, int]]:
    """The tensors of experts that a format has in one, and where."""
    found: dict[str, tuple[str, int]] = {}
    for layer in layers:
        stack = format.stack(layer.name)
        if stack is not None:
            parts = [s.name for s in format.outputs(layer)] + ["bias"] * (layer.bias is not None)
            found |= {f"{layer.name}.{part}": (f"{stack[0]}.{part}", stack[1]) for part in parts}
    return found


def _check_stacks(layers: Sequence[Layer], choices: Mapping[str, Choice], formats: Sequence[Format]) -> None:
    """Experts that share a tensor are all rounded, and alike."""
    schemes = {layer.name: layer.scheme for layer in layers}
    problems: list[str] = []
    for format in formats:
        stacks: dict[str, dict[int, str]] = {}
        for name in choices:
            stack = format.stack(name)
            if stack is not None:
                stacks.setdefault(stack[0], {})[stack[1]] = name
        for stack_name, members in stacks.items():
            kinds = Counter(schemes[name].name if name in schemes else "kept" for name in members.values())
            if len(kinds) > 1 or (set(members) != set(range(len(members))) and "kept" not in kinds):
                problems.append(
                    f"{format.name} holds the {len(members)} experts of {stack_name} in one tensor, and they are "
                    f"{', '.join(f'{count} {kind}' for kind, count in kinds.items())}. Give them one scheme."
                )
    if problems:
        raise PlanError(problems)


def _check_names(works: Sequence[Work], formats: Sequence[Format], order: Mapping[str, int], source: str) -> None:
    """A file holds a name once, and a journal too."""
    layers = [layer for work in works for layer in work.rounded]
    files = [stacked(_specs(works, f, order), _stacks(layers, f)) for f in formats]
    for names in ([w.name for w in works], *([s.name for s in specs] for specs in files)):
        if len(set(names)) < len(names):
            double = Counter(names).most_common(1)[0][0]
            raise PlanError(
                f"{source} would need the name {double!r} twice: a tensor of this name is in the way of a layer's. "
                "Rename it, or keep the layer with --ignore-layers."
            )


def _copy(tensors: Mapping[str, TensorSpec], name: str, piece: Piece) -> Copy:
    spec = tensors[piece.tensor]
    return Copy(spec=TensorSpec(name, spec.dtype, piece.shape(spec)), piece=piece)


def _work(
    checkpoint: Checkpoint,
    name: str,
    kind: Literal["round", "decode", "copy"],
    layer: Layer | None,
    copies: tuple[Copy, ...],
    beside: tuple[Layer, ...] = (),
) -> Work:
    work = Work(name=name, kind=kind, layer=layer, copies=copies, beside=beside)
    read = (*_tensors(work), *(piece.tensor for each in beside for piece in each.stored.parts.values()))
    return replace(work, shards=tuple(dict.fromkeys(checkpoint.source.shard_of(tensor) for tensor in read)))


def _tensors(work: Work) -> list[str]:
    layers = (*work.layers, *work.decodes, *((work.layer,) if work.layer else ()))
    return [p.tensor for layer in layers for p in layer.stored.parts.values()] + [c.piece.tensor for c in work.copies]


def _specs(works: Sequence[Work], format: Format, order: Mapping[str, int]) -> list[TensorSpec]:
    """Every tensor of a format's files, by its name in the plan. order: of the source's tensors."""
    placed: list[tuple[int, TensorSpec]] = []
    for work in works:
        first = min(order[tensor] for tensor in _tensors(work))
        for layer in work.rounded:
            at = min(order[piece.tensor] for piece in layer.stored.parts.values())
            parts = format.outputs(layer)
            placed += [(at, TensorSpec(f"{layer.name}.{s.name}", s.dtype, s.shape)) for s in parts]
        placed += [
            (first, TensorSpec(f"{module}.{part}", "F32", (1,))) for module in work.caches for part in CACHE_PARTS
        ]
        decoded = work.decodes if work.layer is None or work.kind == "round" else (work.layer,)
        stay = [(first, TensorSpec(layer.tensor, layer.dtype, layer.shape)) for layer in decoded]
        stay += [(order[copy.piece.tensor], copy.spec) for copy in work.copies]
        placed += [(at, kept) for at, spec in stay if (kept := format.kept(spec)) is not None]
    if format.in_order:
        placed.sort(key=lambda found: found[0])  # stable
    extras = [TensorSpec(name, "F32", tuple(tensor.shape)) for name, tensor in format.extras().items()]
    return extras + [spec for _, spec in placed]


def _kept_dtype(matrix: Matrix, format: Format) -> str:
    """As a matrix that stays is written; as it is read, where it is left out."""
    stored = format.kept(TensorSpec(f"{matrix.name}.weight", matrix.dtype, matrix.shape))
    return matrix.dtype if stored is None else stored.dtype


def _blocks(checkpoint: Checkpoint, layers: Sequence[Layer]) -> list[str]:
    """The families' block lists in which layers are rounded."""
    inside = [b for b in checkpoint.family.blocks if any(layer.name.startswith(b + ".") for layer in layers)]
    return inside or list(checkpoint.family.blocks[:1])


def _most_common(layers: Sequence[Layer]) -> Scheme:
    """Of no layers a nominal one, which nobody looks at."""
    if not layers:
        return PRESETS["W8A16"]
    return Counter(layer.scheme for layer in layers).most_common(1)[0][0]
