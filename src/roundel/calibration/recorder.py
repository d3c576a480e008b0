"""What stands in a model where its decoder blocks stood, so that the model's own forward can be run without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from roundel.calibration.architecture import DATA_FREE, WRONG
from roundel.errors import PlanError

__all__ = ["Heard", "Kind", "Recorder", "Stop", "Watch", "zeros_of"]


class Stop(Exception):
    """Ends the model's forward at the last block."""


class Passed:
    """Stands for what one block would hand to the next beside the hidden states."""


PASSED = Passed()


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What a block is called with: hidden states, and positional and named arguments beside them."""

    states: Tensor | None
    others: tuple[object, ...]
    named: Mapping[str, object]

    def call(self, block: nn.Module, numbers: Mapping[str, Tensor], states: Tensor) -> Any:
        """Call a block so, with other states and with these parameters."""
        return functional_call(block, dict(numbers), (states, *self.others), dict(self.named), tie_weights=False)

    @property
    def has_passed(self) -> bool:
        return any(value is PASSED for _, value in self.everything())

    def without_passed(self) -> Heard:
        """The same with None where something was PASSED."""
        others = tuple(None if value is PASSED else value for value in self.others)
        named = {name: None if value is PASSED else value for name, value in self.named.items()}
        return Heard(states=self.states, others=others, named=named)

    def everything(self) -> Iterator[tuple[str, object]]:
        """The arguments beside the hidden states, positional ones by their place."""
        yield from ((str(place), value) for place, value in enumerate(self.others, 1))
        yield from self.named.items()


@dataclass
class Kind:
    """What is common to blocks of the same structure, found out by running one of them on zeros.

    outputs    0 if a block returns a tensor, else how many things it returns, the hidden states first
    deaf       whether it is known to make nothing of what the block before hands on beside hidden states
    repeated   submodules that it calls more than once
    """

    outputs: int | None = None
    deaf: bool = False
    repeated: frozenset[str] = frozenset()

    def learn(self, block: nn.Module, heard: Heard) -> None:
        """Run a block on what it was called with. Raises PlanError when it cannot be run or looks at what is PASSED."""
        assert heard.states is not None
        counts: dict[str, int] = {}
        try:
            with _counting(block, counts), torch.no_grad(), _OnZeros():
                output = heard.call(block, zeros_of(block, heard.states.device), heard.states)
        except WRONG as error:
            reason = f"{type(error).__name__}: {error}"
            raise PlanError(
                f"A block of {type(block).__name__} cannot be run on hidden states alone ({reason}). {DATA_FREE}"
            ) from error
        self.outputs = len(output) if isinstance(output, tuple) else 0
        self.deaf = heard.has_passed
        self.repeated = frozenset(path for path, count in counts.items() if count > 1)


class _OnZeros(TorchFunctionMode):
    """Linear layers of zeros give zeros, without the time and the memory that multiplying by them takes."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.linear:
            x, weight = args[:2]
            return x.new_zeros(*x.shape[:-1], weight.shape[0])
        return func(*args, **(kwargs or {}))


class Recorder(nn.Module):
    """Keeps what it is called with, hands hidden states on, and otherwise answers as the block it stands for.

    instead   states handed on in place of those that came in
    stops     end the model's forward here
    watch     told when the last block has been reached
    """

    def __init__(self, block: nn.Module, kind: Kind) -> None:
        super().__init__()
        self.behind = (block,)  # in a tuple: the block's parameters are none of the model's any more
        self.kind = kind
        self.heard: Heard | None = None
        self.instead: Tensor | None = None
        self.stops = False
        self.watch: Watch | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.behind[0], name)

    @property
    def block(self) -> nn.Module:
        return self.behind[0]

    def forward(self, *arguments: Any, **named: Any) -> Any:
        if not arguments:
            arguments = (named.pop("hidden_states"),)
        heard = Heard(states=arguments[0], others=arguments[1:], named=named)
        if self.kind.outputs is None or (heard.has_passed and not self.kind.deaf):
            self.kind.learn(self.block, heard)
        self.heard = heard.without_passed()
        if self.stops:
            raise Stop
        if self.watch is not None:
            self.watch.is_behind = True
        states = arguments[0] if self.instead is None else self.instead
        outputs = self.kind.outputs
        return states if not outputs else (states, *[PASSED] * (outputs - 1))


class Watch(TorchFunctionMode):
    """Notes which tensors are used before the blocks and which behind, where it computes on the meta device."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in tensors.items()}
        self.before: dict[str, None] = {}
        self.behind: dict[str, None] = {}
        self.is_behind = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "__get__":  # the shape, dtype or device of a tensor, not its numbers
            return func(*args, **(kwargs or {}))
        used = self.behind if self.is_behind else self.before
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self.names:
                used[self.names[id(leaf)]] = None
        if self.is_behind:
            args, kwargs = tree_map(_on_meta, (args, kwargs))
        return func(*args, **(kwargs or {}))


def zeros_of(module: nn.Module, device: torch.device | str) -> dict[str, Tensor]:
    """A tensor of zeros that takes no memory for every tensor of a module that holds no numbers."""
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {
        name: torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
        for name, tensor in tensors
        if tensor.is_meta
    }


@contextmanager
def _counting(module: nn.Module, counts: dict[str, int]) -> Iterator[None]:
    """Count the calls of each submodule, by path."""

    def count(path: str) -> Any:
        def add(*_: object) -> None:
            counts[path] = counts.get(path, 0) + 1

        return add

    handles = [inner.register_forward_pre_hook(count(path)) for path, inner in module.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf
