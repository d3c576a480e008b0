"""Transforms and the algorithm of a run, in order: made from names and options, as a recipe or a command line has them.

An option is a field of one of the dataclasses: `iters`, or `signround.iters` where only one of several is meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from typing import TypeVar

from roundel.algorithms import ALGORITHMS, Algorithm
from roundel.errors import RecipeError, nearest
from roundel.step import Step
from roundel.transforms import TRANSFORMS, Transform

__all__ = ["Chain", "Option", "Value", "known_options", "make_chain", "names_and_options"]

Value = int | float | bool | str | None
S = TypeVar("S", bound=Step)
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "none"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One hyperparameter, gathered over all algorithms and transforms that have a field of this name.

    kinds    the types its value may have: "int", "float", "bool", "str"
    owners   algorithm or transform name -> (default, what the class says of it)
    """

    name: str
    kinds: frozenset[str]
    owners: Mapping[str, tuple[Value, str]]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What is done with a unit: transforms one after the other, then the algorithm."""

    transforms: tuple[Transform, ...]
    algorithm: Algorithm

    @property
    def steps(self) -> tuple[Step, ...]:
        return (*self.transforms, self.algorithm)

    @property
    def reads_activations(self) -> bool:
        return any(step.reads_activations for step in self.steps)

    @property
    def blocks_at_a_time(self) -> int:
        """Decoder blocks that make a unit."""
        return self.algorithm.blocks_at_a_time

    @property
    def copies(self) -> float:
        """Float32 copies of a unit's weights that are held beside these."""
        return max(step.copies for step in self.steps)

    def learns_on(self, batch: int, part: int) -> int:
        """Samples that are run forward and backward at once; 0 where no step learns."""
        return max(step.learns_on(batch, part) for step in self.steps)

    @property
    def reads_float_stream(self) -> bool:
        return any(step.reads_float_stream for step in self.steps)

    def typed(self, options: Iterable[str]) -> dict[str, Value]:
        """Options that the chain was made with -> their values as the steps have them: 50, where "50" was given."""
        found: dict[str, Value] = {}
        for key in options:
            owner, _, field = key.rpartition(".")
            having = (step for step in self.steps if owner in ("", step.name) and hasattr(step, field))
            found[key] = getattr(next(having), field)
        return found


@cache
def known_options() -> dict[str, Option]:
    """Every hyperparameter there is, by name."""
    found: dict[str, Option] = {}
    for name, step in {**TRANSFORMS, **ALGORITHMS}.items():
        told = _descriptions(type(step))
        for field in fields(step):  # type: ignore[arg-type]
            default: Value = None if field.default is MISSING else field.default
            before = found.get(field.name)
            kinds = frozenset(re.findall(r"\b(int|float|bool|str)\b", str(field.type)))
            found[field.name] = Option(
                name=field.name,
                kinds=kinds | (before.kinds if before else frozenset()),
                owners={**(before.owners if before else {}), name: (default, told.get(field.name, ""))},
            )
    return found


def make_chain(text: str, options: Mapping[str, object], common: Mapping[str, Value] | None = None) -> Chain:
    """The chain that "awq,gptq" and its options mean. A text that ends in a transform is followed by rtn.

    common   values for fields that no option names (the recipe's seed and batch size)
    Raises RecipeError for an unknown name, an algorithm that is not last, an option nobody in the chain has, or a value
    of the wrong type.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise RecipeError(f"algorithm {text!r} names nothing. Name what chooses the codes, such as rtn or gptq.")
    for name in names:
        if name not in TRANSFORMS and name not in ALGORITHMS:
            known = (*ALGORITHMS, *TRANSFORMS)
            raise RecipeError(f"Unknown algorithm {name!r}.{nearest(name, known)} Known are {', '.join(known)}.")
    if names[-1] in TRANSFORMS:
        names.append("rtn")
    early = [name for name in names[:-1] if name in ALGORITHMS]
    if early:
        raise RecipeError(
            f"--algorithm {text}: {early[0]} chooses codes, so it stands last. Write transforms first, such as "
            f"awq,{early[0]}."
        )
    if len(set(names)) < len(names):
        raise RecipeError(f"--algorithm {text} names one step twice. Name each once.")
    for key in options:
        _check_owner(key, names)
    transforms = tuple(_filled(TRANSFORMS[n], n, options, common or {}) for n in names[:-1])
    return Chain(transforms=transforms, algorithm=_filled(ALGORITHMS[names[-1]], names[-1], options, common or {}))


def names_and_options(steps: object) -> tuple[str, dict[str, Value]]:
    """("awq,gptq", {"gptq.damping": 0.05}) from a name, a step, or a sequence of names and steps.

    Raises RecipeError for anything else.
    """
    several = steps if isinstance(steps, Sequence) and not isinstance(steps, str) else (steps,)
    names: list[str] = []
    options: dict[str, Value] = {}
    for step in several:
        if isinstance(step, str):
            names.append(step)
        elif any(type(step) is type(known) for known in (*ALGORITHMS.values(), *TRANSFORMS.values())):
            name = str(getattr(type(step), "name"))  # noqa: B009
            names.append(name)
            options |= {
                f"{name}.{f.name}": getattr(step, f.name)
                for f in fields(step)  # type: ignore[arg-type]
                if getattr(step, f.name) != f.default
            }
        else:
            raise RecipeError(
                f"algorithm={step!r} is neither the name of an algorithm nor one of roundel.algorithms or "
                'roundel.transforms. Pass "gptq", Gptq(damping=0.05), or a list of such.'
            )
    return ",".join(names), options


def _filled(step: S, name: str, options: Mapping[str, object], common: Mapping[str, Value]) -> S:
    own = {f.name: f for f in fields(step)}  # type: ignore[arg-type]
    values: dict[str, object] = {key: value for key, value in common.items() if key in own}
    for key, value in options.items():
        owner, _, field = key.rpartition(".")
        if owner in ("", name) and field in own:
            values[field] = _checked(f"{name}: {field}", value, str(own[field].type))
    return replace(step, **values) if values else step  # type: ignore[type-var]


def _check_owner(key: str, names: Sequence[str]) -> None:
    owner, _, field = key.rpartition(".")
    known = known_options()
    if field not in known:
        raise RecipeError(f"There is no option {field!r}.{nearest(field, known)} `roundel list algorithms` shows all.")
    owners = known[field].owners
    if owner and owner not in owners:
        raise RecipeError(f"{owner} has no option {field!r}. {', '.join(owners)} has.")
    if not any(name in names for name in ([owner] if owner else owners)):
        raise RecipeError(
            f"{field} is an option of {', '.join(owners)}, and the algorithm is {','.join(names)}. Drop it, or choose "
            f"--algorithm {next(iter(owners))}."
        )


def _checked(what: str, value: object, annotation: str) -> object:
    kinds = set(re.findall(r"\b(int|float|bool|str|None)\b", annotation))
    if value is None and "None" in kinds:
        return None
    if isinstance(value, bool):
        if "bool" in kinds:
            return value
    elif isinstance(value, int):
        if "int" in kinds:
            return value
        if "float" in kinds:
            return float(value)
    elif isinstance(value, float):
        if "float" in kinds:
            return value
    elif isinstance(value, str):
        for read in _readings(value, kinds):
            return read
    taken = " or ".join(text for kind, text in _KINDS.items() if kind in kinds)
    raise RecipeError(f"{what}={value!r} is not possible: it takes {taken}.")


def _readings(text: str, kinds: set[str]) -> Iterator[Value]:
    """What a text of a command line can mean, the narrowest type first."""
    if "bool" in kinds and text.lower() in ("true", "false"):
        yield text.lower() == "true"
    if "int" in kinds and re.fullmatch(r"[+-]?\d+", text):
        yield int(text)
    if "float" in kinds and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        yield float(text)
    if "None" in kinds and text.lower() == "none":
        yield None
    if "str" in kinds:
        yield text


def _descriptions(cls: type) -> dict[str, str]:
    """What a class's docstring says of each field: lines of the form `field   text`, and lines that continue one."""
    found: dict[str, str] = {}
    name = None
    for line in (cls.__doc__ or "").splitlines():
        match = re.match(r" {4}(\w+) {2,}(\S.*)", line)
        if match:
            name = match[1]
            found[name] = match[2]
        elif name is not None and re.match(r" {6,}\S", line):
            found[name] += " " + line.strip()
        else:
            name = None
    return found
