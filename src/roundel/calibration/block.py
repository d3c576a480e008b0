"""A decoder block, or the model's end, as a function of its weights.

The module holds no numbers: weights are arguments of `torch.func.functional_call`. All names are the checkpoint's.
Matrices may be given as they are stored, or rounded; they are widened one by one (`late.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from roundel.calibration.experts import experts_and_inputs, experts_prefix
from roundel.calibration.late import stand_ins
from roundel.unit import Call, Decodable

__all__ = ["Block", "Blocks", "Weights"]

See = Callable[[str, Tensor], None]
SeeCache = Callable[[str, Tensor, Tensor], None]
Weights = Mapping[str, Tensor | Decodable]
Run = Callable[[Mapping[str, Tensor], Tensor], Tensor]


class _Enough(Exception):
    """Ends a forward pass whose rest nobody needs."""


@dataclass(frozen=True)
class _Names:
    """What a block's modules are called in the checkpoint and in the model.

    parameters   parameter or buffer of the module -> tensor of the checkpoint
    paths        module of the checkpoint -> path in the module; the block itself is ""
    matrices     modules of the checkpoint whose weight is a matrix
    """

    parameters: Mapping[str, str]
    paths: Mapping[str, str]
    matrices: tuple[str, ...]


class Block:
    """A decoder block, or final norm and head, whose weights are given with each call.

    name      its module name in the checkpoint ("model.layers.0"); for the model's end, the head's
    tensors   names of all its tensors
    modules   names of its matrices, routers among them
    """

    def __init__(
        self, name: str, module: nn.Module, parameters: Mapping[str, str], run: Run, repeated: Collection[str] = ()
    ) -> None:
        """
        parameters   parameter of `module` -> tensor of the checkpoint
        run          (numbers by parameter of `module`, x) -> output
        repeated     paths of submodules that a forward pass calls more than once
        """
        self.name = name
        self._module, self._run, self._repeated = module, run, frozenset(repeated)
        self._names = _names(name, module, parameters)
        self.tensors = tuple(parameters.values())
        self.modules = self._names.matrices

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """The output on x [samples, tokens, hidden]. Differentiable in x and in weights.

        An expert that no token is routed to takes no part: its weights get no gradient.
        """
        return self._computed(x, weights)

    def observe(
        self,
        x: Tensor,
        weights: Weights,
        see: See,
        modules: Collection[str],
        every_expert: bool = False,
    ) -> None:
        """Run x [samples, tokens, hidden]; call see(module, inputs [tokens, in]) for what enters each of `modules`.

        every_expert   experts are shown all tokens, not those routed to them; what the block computes is the same
        A module that no token reaches is not seen. The pass ends early once all are.
        """
        if modules:
            with suppress(_Enough):
                self._shown(x, weights, see, modules, every_expert)

    def observed(
        self, x: Tensor, weights: Weights, see: See, modules: Collection[str], every_expert: bool = False
    ) -> Tensor:
        """`observe` to the end: the output on x."""
        return self._shown(x, weights, see, modules, every_expert, to_the_end=True)

    def _shown(
        self,
        x: Tensor,
        weights: Weights,
        see: See,
        modules: Collection[str],
        every_expert: bool,
        to_the_end: bool = False,
    ) -> Tensor:
        looking = _Looking({self.path(m): m for m in modules}, see, self._repeated, to_the_end)
        with torch.no_grad(), looking.hooks(self._module, every_expert):
            return self._computed(x, weights)

    def observe_cache(self, x: Tensor, weights: Weights, see: SeeCache, modules: Collection[str]) -> None:
        """Run x [samples, tokens, hidden]; call see(module, keys, values) for what each of these attention modules puts
        into the cache, [samples, heads, tokens, head_dim] each: keys after rotation, heads not repeated."""
        handles = [
            self._module.get_submodule(self.path(module)).register_forward_pre_hook(
                _with_cache(partial(see, module)), with_kwargs=True
            )
            for module in modules
        ]
        try:
            with torch.no_grad():
                self._computed(x, weights)
        finally:
            for handle in handles:
                handle.remove()

    def calls(self, x: Tensor, weights: Weights, module: str) -> Call:
        """What enters a module: a matrix, what holds it, or the block itself.

        An expert's matrix that no token reaches is entered by a tensor of no rows. Raises LookupError for any other
        module that is not called.
        """
        path, caught = self.path(module), []
        if path == "":
            return Call(module=module, arguments=(x,), named={})

        def catch(_: nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
            caught.append(Call(module=module, arguments=arguments, named=named))
            raise _Enough

        inner = self._module.get_submodule(path)
        hook = inner.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with torch.no_grad():
                self._computed(x, weights)
        except _Enough:
            return caught[0]
        finally:
            hook.remove()
        if module in self.modules:
            width = weights[f"{module}.weight"].shape[1]
            return Call(module=module, arguments=(x.new_empty(0, width),), named={})
        raise LookupError(f"{module} is not called by {self.name}")

    def call(self, call: Call, weights: Weights) -> Tensor:
        """A module's output (the first, where there are several) on what entered it, with these weights."""
        path = self.path(call.module)
        if path == "":
            (x,) = call.arguments
            assert isinstance(x, Tensor)
            return self.forward(x, weights)
        numbers = {
            name[len(path) + 1 :]: weights[tensor]
            for name, tensor in self._names.parameters.items()
            if name.startswith(path + ".")
        }
        inputs = tree_leaves((call.arguments, dict(call.named)))
        x = next(leaf for leaf in inputs if isinstance(leaf, Tensor) and leaf.is_floating_point())
        given, late = stand_ins(numbers, x.dtype, x.device)
        module = self._module.get_submodule(path)
        with late:
            output = functional_call(module, given, call.arguments, dict(call.named), tie_weights=False)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def path(self, module: str) -> str:
        """Where a module of the checkpoint is in the block. Raises LookupError when it is not."""
        if module in self._names.paths:
            return self._names.paths[module]
        raise LookupError(f"{module} is no module of {self.name}")

    def _computed(self, x: Tensor, weights: Weights) -> Tensor:
        numbers = {name: weights[tensor] for name, tensor in self._names.parameters.items()}
        given, late = stand_ins(numbers, x.dtype, x.device)
        with late:
            return self._run(given, x)


class Blocks:
    """Blocks that follow each other, as one: what leaves one enters the next. See Block."""

    def __init__(self, name: str, blocks: Sequence[Block]) -> None:
        self.name, self._blocks = name, tuple(blocks)
        self.tensors = tuple(tensor for block in blocks for tensor in block.tensors)
        self.modules = tuple(module for block in blocks for module in block.modules)

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        for block in self._blocks:
            x = block.forward(x, weights)
        return x

    def observe(
        self,
        x: Tensor,
        weights: Weights,
        see: See,
        modules: Collection[str],
        every_expert: bool = False,
    ) -> None:
        last = max((n for n, block in enumerate(self._blocks) if not set(block.modules).isdisjoint(modules)), default=0)
        with torch.no_grad():
            for block in self._blocks[:last]:
                x = block.observed(x, weights, see, [m for m in modules if m in block.modules], every_expert)
            block = self._blocks[last]
            block.observe(x, weights, see, [m for m in modules if m in block.modules], every_expert)

    def observe_cache(self, x: Tensor, weights: Weights, see: SeeCache, modules: Collection[str]) -> None:
        with torch.no_grad():
            for block in self._blocks:
                block.observe_cache(x, weights, see, [m for m in modules if m.startswith(f"{block.name}.")])
                if block is not self._blocks[-1]:
                    x = block.forward(x, weights)

    def calls(self, x: Tensor, weights: Weights, module: str) -> Call:
        home = self._home(module)
        with torch.no_grad():
            for block in self._blocks[: self._blocks.index(home)]:
                x = block.forward(x, weights)
        return home.calls(x, weights, module)

    def call(self, call: Call, weights: Weights) -> Tensor:
        return self._home(call.module).call(call, weights)

    def _home(self, module: str) -> Block:
        """The block that a module is in. Raises LookupError when none is."""
        for block in self._blocks:
            if f"{module}.".startswith(f"{block.name}."):
                return block
        raise LookupError(f"{module} is no module of {self.name}")


class _Cache:
    """Stands where attention expects a cache, and keeps nothing."""

    def __init__(self, see: Callable[[Tensor, Tensor], None]) -> None:
        self._see = see

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self._see(keys.detach(), values.detach())
        return keys, values


def _with_cache(see: Callable[[Tensor, Tensor], None]) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A hook that gives a cache to an attention module, by the name transformers 5 has for it."""

    def give(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, {**named, "past_key_values": _Cache(see)}

    return give


class _Looking:
    """Hooks that show what enters modules, and end the pass when all have been seen.

    asked        path in the block -> the name to show it under
    to_the_end   whether the pass goes on all the same
    """

    def __init__(self, asked: Mapping[str, str], see: See, repeated: Collection[str], to_the_end: bool) -> None:
        self.asked, self.see = asked, see
        self.missing = set(asked)
        self.never_enough = to_the_end or any(path in repeated for path in asked)
        self.by_themselves: set[str] = set()  # experts' matrices, which are shown all tokens in a pass of their own
        self.alone = False

    @contextmanager
    def hooks(self, root: nn.Module, every_expert: bool) -> Iterator[None]:
        handles = [
            root.get_submodule(path).register_forward_pre_hook(self._matrix(path), with_kwargs=True)
            for path in self.asked
        ]
        for path, module in root.named_modules():
            prefix = experts_prefix(path, module)
            inside = {p for p in self.asked if prefix is not None and p.startswith(prefix)}
            if inside and every_expert:
                assert prefix is not None
                self.by_themselves |= inside
                numbers = {int(p.removeprefix(prefix).partition(".")[0]) for p in inside}
                handles.append(module.register_forward_pre_hook(self._all_tokens(numbers, inside), with_kwargs=True))
            if inside:
                handles.append(module.register_forward_hook(self._after(inside)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _matrix(self, path: str) -> Callable[..., None]:
        def show(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            if path in self.by_themselves and not self.alone:
                return
            x = arguments[0] if arguments else next(iter(named.values()))
            self.see(self.asked[path], x.detach().reshape(-1, x.shape[-1]))
            self._done({path})

        return show

    def _all_tokens(self, numbers: set[int], inside: set[str]) -> Callable[..., None]:
        def show(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.alone = True
            for number, (expert, x) in enumerate(experts_and_inputs(module, (*arguments, *named.values()))):
                if number in numbers:
                    expert(x)
            self.alone = False
            self._done(inside)

        return show

    def _after(self, inside: set[str]) -> Callable[..., None]:
        return lambda *_: self._done(inside)

    def _done(self, paths: set[str]) -> None:
        self.missing -= paths
        if not self.missing and not self.alone and not self.never_enough:
            raise _Enough


def _names(name: str, module: nn.Module, parameters: Mapping[str, str]) -> _Names:
    """Modules by both names. Where they are nested alike, what holds a matrix has both names too."""
    paths: dict[str, str] = {}
    matrices: list[str] = []
    for parameter, tensor in parameters.items():
        path, _, part = parameter.rpartition(".")
        stored = tensor.rpartition(".")[0]
        paths[stored] = path
        if part == "weight" and len(module.get_parameter(parameter).shape) == 2:
            matrices.append(stored)
        inside, outside = path.split("."), stored.removeprefix(name + ".").split(".")
        if stored.startswith(name + ".") and len(inside) == len(outside):
            for depth in range(1, len(inside)):
                paths.setdefault(".".join((name, *outside[:depth])), ".".join(inside[:depth]))
    paths.setdefault(name, "")
    return _Names(parameters, paths, tuple(matrices))
