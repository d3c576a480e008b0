"""The plan of a recipe for a model: every choice made, every problem found, all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from roundel.cached import Carried, carried_cache
from roundel.checkpoint import Checkpoint, Matrix
from roundel.choosing import Choice, choose, choose_conversions, head_asked, layers_of, settle
from roundel.errors import PlanError
from roundel.formats import Contents, Format, Model, format_named
from roundel.importance import open_importances
from roundel.matrix import cut_for
from roundel.notes import notes_of
from roundel.planning.files import check_names, check_stacks, specs_of, stacks_of
from roundel.planning.plan import Kept, Output, Plan, Work, most_common
from roundel.planning.units import check_measured, in_units, not_rescaled, with_caches
from roundel.planning.works import works_of
from roundel.recipe import Recipe, parse_size
from roundel.tensor import TensorSpec
from roundel.unit import Layer

__all__ = ["build_plan"]


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
    demoted, family = demoted or {}, checkpoint.family
    problems: list[str] = []
    matrices, untied = _matrices(checkpoint, recipe, problems)
    shapes = {matrix.name: matrix.shape for matrix in matrices.values()}
    importances = (
        open_importances(Path(recipe.importance_file), checkpoint.source.config, shapes)
        if recipe.importance_file is not None
        else None
    )
    formats = _formats(checkpoint, recipe, shapes)
    _check_deciding(formats, recipe)
    floats = formats[0].floats is not None
    choices = _choices(checkpoint, recipe, matrices, formats, problems)
    choices |= {name: Choice(scheme=None, origin=reason) for name, reason in demoted.items()}
    layers = layers_of(matrices, choices, formats, recipe, problems)
    if not layers and not problems and not floats:
        problems.append(
            f"No layer of {checkpoint.source.name} would be rounded: every matrix is kept "
            f"({'; '.join(dict.fromkeys(c.origin for c in choices.values()))}). Change what is ignored or kept."
        )
    settled = settle(formats, layers, problems)
    if problems:
        raise PlanError(problems)
    cache = carried_cache(checkpoint, settled, recipe.kv_cache)
    works = _pieces(checkpoint, recipe, matrices, layers, settled, cache)
    check_stacks(layers, choices, settled)
    order = {name: i for i, name in enumerate(checkpoint.source.tensors)}
    check_names(works, settled, order, checkpoint.source.name)
    kept = tuple(
        Kept(name=m.name, shape=m.shape, dtype=_kept_dtype(m, settled[0]), reason=choices[m.name].origin)
        for m in matrices.values()
        if choices[m.name].scheme is None
    )
    contents = Contents(
        layers=layers,
        kept=[k.name for k in kept],
        default=most_common(layers),
        blocks=_blocks(family.blocks, layers),
        head=family.head,
        embedding=family.embedding.removesuffix(".weight"),
        kv_cache=recipe.kv_cache or cache.scheme,
    )
    return Plan(
        recipe=recipe,
        source_name=checkpoint.source.name,
        source_revision=checkpoint.source.revision,
        source_fingerprint=checkpoint.source.fingerprint(),
        source_format=checkpoint.format_name,
        family=family.name + (" (a guess)" if family.guess else ""),
        works=works,
        layers=tuple(layers),
        origins={layer.name: choices[layer.name].origin for layer in layers},
        kept=kept,
        outputs=tuple(_output(format, contents, works, recipe, order) for format in settled),
        untied=untied,
        source_bytes=sum(s.nbytes for s in checkpoint.source.tensors.values()),
        tokens=recipe.tokens_for(checkpoint.source.config),
        demoted=dict(demoted),
        calibration=seen[0] if seen else None,
        importances=importances,
        notes=(
            *(seen[1] if seen else ()),
            *notes_of(checkpoint, recipe, layers, matrices, demoted, untied),
            *(not_rescaled(works, checkpoint, recipe.algorithm) if recipe.chain.transforms else ()),
            *cache.notes,
            *(caveat for format in settled for caveat in format.caveats(contents)),
        ),
    )


def _matrices(checkpoint: Checkpoint, recipe: Recipe, problems: list[str]) -> tuple[dict[str, Matrix], bool]:
    """The model's matrices, and whether a head that shares the embedding's tensor is one of its own among them."""
    named, head = [format_named(name) for name in recipe.formats], checkpoint.family.head
    matrices = cut_for(named, checkpoint.source.config, checkpoint.wholes, checkpoint.matrices)
    untied = checkpoint.is_tied and head_asked(recipe, head)
    if untied:
        matrices[head] = checkpoint.tied_head()
    elif recipe.quant_lm_head and head not in matrices:
        problems.append(f"--quant-lm-head is asked for and {checkpoint.source.name} has no {head}. Drop the option.")
    return matrices, untied


def _formats(checkpoint: Checkpoint, recipe: Recipe, shapes: Mapping[str, tuple[int, int]]) -> list[Format]:
    """The formats that are asked for, each as it is for this model."""
    named = [format_named(name) for name in recipe.formats]
    model = Model(
        config=checkpoint.source.config,
        folder=Path() if all(format.copies for format in named) else checkpoint.source.small_folder(),
        name=checkpoint.source.name,
        matrices=shapes,
        importance=bool(recipe.chain.algorithm.imatrix),
    )
    return [format.for_model(model) for format in named]


def _choices(
    checkpoint: Checkpoint,
    recipe: Recipe,
    matrices: Mapping[str, Matrix],
    formats: Sequence[Format],
    problems: list[str],
) -> dict[str, Choice]:
    if recipe.conversion is None:
        return choose(matrices, recipe, checkpoint.family.head, problems, formats)
    is_float = all(matrix.stored.scheme is None for matrix in checkpoint.matrices.values())
    if is_float and formats[0].floats is None:
        raise PlanError(
            f"{checkpoint.source.name} is not quantized, so there is nothing to convert. Use roundel quantize to round "
            "its weights."
        )
    embedding = checkpoint.family.embedding.removesuffix(".weight")
    return choose_conversions(matrices, recipe, embedding, problems, formats[0])


def _pieces(
    checkpoint: Checkpoint,
    recipe: Recipe,
    matrices: Mapping[str, Matrix],
    layers: Sequence[Layer],
    formats: Sequence[Format],
    cache: Carried,
) -> tuple[Work, ...]:
    """The work: by layers and tensors or, where a step looks at data, by units."""
    splits = any(format.splits for format in formats)
    works = works_of(checkpoint, matrices, {layer.name: layer for layer in layers}, splits, cache.left)
    if recipe.reads_activations:
        works = in_units(works, checkpoint, recipe.chain.blocks_at_a_time)
        check_measured(works)
    return with_caches(works, formats) if recipe.kv_cache is not None else works


def _output(
    format: Format, contents: Contents, works: Sequence[Work], recipe: Recipe, order: Mapping[str, int]
) -> Output:
    layers = contents.layers
    shards = format.lay_out(
        specs_of(works, format, order), layers, parse_size(recipe.shard_size), stacks_of(layers, format)
    )
    return Output(format=format, config=format.config(contents), shards=shards)


def _check_deciding(formats: Sequence[Format], recipe: Recipe) -> None:
    """One format at most decides on schemes itself; one of floats has none beside it, and nothing to be chosen."""
    deciding = [f.name for f in formats if f.schemes() is not None]
    whole = [f.name for f in formats if f.floats is not None]
    if len(deciding) > 1 or (whole and len(formats) > 1):
        first = (whole or deciding)[0]
        others = ", ".join(f.name for f in formats if f.name != first)
        raise PlanError(f"{first} decides how every tensor is stored, and {others} cannot share that. Write it alone.")
    asked = {"scheme": recipe.scheme, "bits": recipe.bits, "group_size": recipe.group_size, "sym": recipe.sym}
    idle = [f"{name}={value}" for name, value in asked.items() if value != getattr(Recipe, name)]
    if deciding and idle and recipe.conversion is None:
        raise PlanError(
            f"{deciding[0]} decides on the type of every tensor, and {idle[0]} has no say in that. Leave it out, or "
            "name another file type; --format gguf with --scheme GGUF:Q6_K gives all layers one type."
        )
    if formats[0].floats is not None and recipe.algorithm != Recipe.algorithm and not recipe.layer_config:
        raise PlanError(
            f"{formats[0].name} rounds nothing to codes, so {recipe.algorithm} has nothing to choose. Drop --algorithm."
        )


def _kept_dtype(matrix: Matrix, format: Format) -> str:
    """As a matrix that stays is written; as it is read, where it is left out."""
    stored = format.kept(TensorSpec(f"{matrix.name}.weight", matrix.dtype, matrix.shape))
    return matrix.dtype if stored is None else stored.dtype


def _blocks(lists: Sequence[str], layers: Sequence[Layer]) -> list[str]:
    """Of a family's lists of blocks those in which layers are rounded."""
    inside = [path for path in lists if any(layer.name.startswith(path + ".") for layer in layers)]
    return inside or list(lists[:1])
