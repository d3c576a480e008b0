"""The model as transformers has it, without numbers: what comes before the decoder blocks, the blocks, and the end.

The model's own forward does everything but the blocks, in whose place a Recorder keeps what each is called with (masks,
rotary tables, positions) and hands hidden states on. Those arguments depend on how many samples there are and how long
they are, never on the tokens, and no state but the hidden one passes from block to block: a model that needs more is
refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from roundel.calibration.agreement import misfits, shapes_of
from roundel.calibration.architecture import DATA_FREE, empty_model, fill_buffers
from roundel.calibration.block import Block, Weights
from roundel.calibration.experts import unfuse
from roundel.calibration.late import stand_ins
from roundel.calibration.quiet import quiet
from roundel.calibration.recorder import Heard, Kind, Recorder, Stop, Watch, zeros_of
from roundel.calibration.spelling import Spelling, spelling_of
from roundel.checkpoint import Checkpoint
from roundel.errors import PlanError, SourceError
from roundel.families import Family

__all__ = ["Block", "Skeleton"]

FEW = (1, 8)  # samples and tokens of the pass that finds out which tensors are used where


class Skeleton:
    """A checkpoint's language model, run piece by piece with weights that are given.

    blocks         the decoder blocks, in order
    tail           final norm and output head; its output is the logits
    entry_tensors  names of the tensors that are needed before the first block
    hidden         how wide the states between blocks are
    """

    def __init__(
        self,
        config: Mapping[str, object],
        family: Family,
        tensors: Collection[str],
        *,
        folder: Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        """
        tensors   names of the checkpoint's tensors as they are written: packed layers as `.weight`, experts split
        folder    where code that ships with the checkpoint lies
        dtype     of the states that enter blocks; weights are to be given in it
        Raises PlanError when the model cannot be run block by block, SourceError when a tensor is missing.
        """
        self._type, self._device, self._dtype = str(config.get("model_type")), device, dtype
        self._model = empty_model(config, folder, dtype, trust_remote_code=trust_remote_code)
        spelling = spelling_of(self._model, tensors)
        fill_buffers(self._model, spelling.tensors, device)
        unfuse(self._model, spelling.experts)
        self._shapes = shapes_of(self._model, spelling)
        stored, path = self._find_blocks(family, spelling)
        self._recorders = self._take_out(path)
        self._zeros = zeros_of(self._model, device)
        self._heard: dict[tuple[int, int], list[Heard]] = {}
        before, behind = self._try_out()
        self._entry = self._named(before, spelling, family)
        self.entry_tensors = tuple(self._entry.values())
        self.blocks = tuple(
            self._block(n, f"{stored}.{n}", f"{path}.{n}", spelling) for n in range(len(self._recorders))
        )
        end = self._named(behind, spelling, family)
        heads = [spelling.tensors[name] for name in self._weights_of("output") if name in spelling.tensors]
        name = heads[0].removesuffix(".weight") if heads else family.head
        self.tail = Block(name, self._model, end, self._finish)

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, device: str = "cpu", trust_remote_code: bool = False) -> Skeleton:
        """A checkpoint's, in float32. Raises what the class raises, and SourceError for a tensor of another shape."""
        made = cls(
            checkpoint.source.config,
            checkpoint.family,
            checkpoint.tensor_names,
            folder=checkpoint.source.small_folder(),
            device=device,
            trust_remote_code=trust_remote_code,
        )
        for error in misfits(made._shapes, checkpoint):
            raise error
        return made

    def enter(self, tokens: Tensor, weights: Weights) -> Tensor:
        """The states that enter the first block, [samples, tokens, hidden], for token ids [samples, tokens].

        weights   numbers of entry_tensors, in the states' dtype or as they are stored
        Raises PlanError when a block is called with something that depends on the tokens.
        """
        expected = self._calls(tokens.shape[0], tokens.shape[1])
        numbers = {name: weights[tensor] for name, tensor in self._entry.items()}
        given, late = stand_ins(numbers, self._dtype, tokens.device)
        with late:
            found = self._record(tokens, given)
        same: dict[tuple[int, int], bool] = {}
        for number, (heard, assumed) in enumerate(zip(found, expected, strict=True)):
            for (name, value), (_, other) in zip(heard.everything(), assumed.everything(), strict=True):
                pair = (id(value), id(other))
                if pair not in same:
                    same[pair] = _equal(value, other)
                if not same[pair]:
                    raise PlanError(
                        f"{self._type}: {self.blocks[number].name} is called with an argument ({name}) that depends on "
                        f"the tokens, so it cannot be run on hidden states alone. {DATA_FREE}"
                    )
        states = found[0].states
        assert states is not None
        return states

    def _find_blocks(self, family: Family, spelling: Spelling) -> tuple[str, str]:
        """What the list of decoder blocks is called in the checkpoint, and in the model."""
        for stored in family.blocks:
            for name, tensor in spelling.tensors.items():
                path = name.partition(".0.")[0]
                if tensor.startswith(f"{stored}.0.") and isinstance(self._model.get_submodule(path), nn.ModuleList):
                    return stored, path
        raise PlanError(
            f"{self._type}: no tensor of the checkpoint is one of a decoder block ({' or '.join(family.blocks)}) as "
            f"transformers knows them. {DATA_FREE}"
        )

    def _take_out(self, path: str) -> list[Recorder]:
        """Recorders, put where the blocks were."""
        kinds: dict[object, Kind] = {}
        recorders: list[Recorder] = []
        for block in self._model.get_submodule(path).children():
            structure = (type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters()))
            recorders.append(Recorder(block, kinds.setdefault(structure, Kind())))
        for number, recorder in enumerate(recorders):
            self._model.set_submodule(f"{path}.{number}", recorder)
        return recorders

    def _try_out(self) -> tuple[Iterable[str], Iterable[str]]:
        """Parameters that are used before the blocks, and behind them; what blocks return is found out on the way."""
        watch = Watch(self._zeros)
        tokens = torch.zeros(FEW, dtype=torch.long, device=self._device)
        last = self._recorders[-1]
        last.watch = watch
        with watch:
            logits = self._run(tokens, {})
        last.watch = None
        heard = self._told()
        assert heard[0].states is not None
        self.hidden = heard[0].states.shape[-1]
        if heard[0].states.shape[:-1] != tokens.shape or logits is None or logits.shape[:-1] != tokens.shape:
            raise PlanError(
                f"{self._type}: what enters its blocks is {list(heard[0].states.shape)} for {list(tokens.shape)} "
                f"tokens, not one vector for each. {DATA_FREE}"
            )
        return watch.before, watch.behind

    def _named(self, names: Iterable[str], spelling: Spelling, family: Family) -> dict[str, str]:
        """Parameters of the model -> tensors of the checkpoint.

        A head without a tensor is tied. It goes by its own name; by the embedding's where the family does not know it.
        """
        found: dict[str, str] = {}
        for name in names:
            if name in spelling.tensors:
                found[name] = spelling.tensors[name]
            elif name in self._weights_of("output"):
                embeddings = [spelling.tensors.get(other) for other in self._weights_of("input")]
                known = family.embedding in embeddings or not any(embeddings)
                found[name] = f"{family.head}.weight" if known else next(filter(None, embeddings))
            else:
                raise self._missing(name)
        return found

    def _weights_of(self, end: Literal["input", "output"]) -> list[str]:
        """What the model calls the weight of its embedding, or of its head."""
        model: Any = self._model
        found: nn.Module | None = model.get_input_embeddings() if end == "input" else model.get_output_embeddings()
        return [f"{path}.weight" for path, module in self._model.named_modules() if module is found]

    def _block(self, number: int, stored: str, path: str, spelling: Spelling) -> Block:
        recorder = self._recorders[number]
        names: dict[str, str] = {}
        for name in zeros_of(recorder.block, "meta"):
            if f"{path}.{name}" not in spelling.tensors:
                raise self._missing(f"{path}.{name}")
            names[name] = spelling.tensors[f"{path}.{name}"]

        def run(numbers: Mapping[str, Tensor], x: Tensor) -> Tensor:
            output = self._calls(x.shape[0], x.shape[1])[number].call(recorder.block, numbers, x)
            result: Tensor = output[0] if isinstance(output, tuple) else output
            return result

        return Block(stored, recorder.block, names, run, recorder.kind.repeated)

    def _finish(self, numbers: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The logits [samples, tokens, vocabulary] for what leaves the last block."""
        last = self._recorders[-1]
        last.instead = x
        try:
            logits = self._run(torch.zeros(x.shape[:2], dtype=torch.long, device=x.device), numbers)
        finally:
            last.instead = None
        assert logits is not None
        return logits

    def _calls(self, samples: int, tokens: int) -> list[Heard]:
        """What each block is called with beside hidden states, for so many samples of so many tokens."""
        if (samples, tokens) not in self._heard:
            found = self._record(torch.zeros((samples, tokens), dtype=torch.long, device=self._device), {})
            self._heard[samples, tokens] = [Heard(states=None, others=h.others, named=h.named) for h in found]
        return self._heard[samples, tokens]

    def _record(self, tokens: Tensor, numbers: Mapping[str, Tensor]) -> list[Heard]:
        """What each block is called with when the model is run on these tokens."""
        last = self._recorders[-1]
        last.stops = True
        try:
            with torch.no_grad():
                self._run(tokens, numbers)
        finally:
            last.stops = False
        return self._told()

    def _run(self, tokens: Tensor, numbers: Mapping[str, Tensor]) -> Tensor | None:
        """The logits of the model without its blocks; None where a recorder stopped it."""
        named: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        try:
            with quiet():
                output: Any = functional_call(self._model, {**self._zeros, **numbers}, (), named, tie_weights=False)
        except Stop:
            return None
        logits: Tensor = output.logits
        return logits

    def _told(self) -> list[Heard]:
        """What the recorders have kept since the last run. Raises PlanError where blocks are not a plain chain."""
        heard: list[Heard] = []
        for number, recorder in enumerate(self._recorders):
            now, recorder.heard = recorder.heard, None
            if now is None or (number and now.states is not heard[0].states):
                raise PlanError(
                    f"{self._type}: between decoder blocks {number - 1} and {number} it does more than hand the hidden "
                    f"states on. {DATA_FREE}"
                )
            for name, value in now.everything():
                if not _is_plain(value):
                    raise PlanError(
                        f"{self._type}: decoder block {number} is called with an argument ({name}) of type "
                        f"{type(value).__name__}, which may hold what other blocks left there. {DATA_FREE}"
                    )
            heard.append(now)
        return heard

    def _missing(self, name: str) -> SourceError:
        return SourceError(
            f"{self._type}: the checkpoint has no tensor for transformers' {name}, or holds it in another arrangement. "
            f"Fetch the checkpoint again. {DATA_FREE}"
        )


def _is_plain(value: object) -> bool:
    """Whether an argument is a value that nobody writes to; an empty dict is there to be written to."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return bool(value) and all(_is_plain(v) for v in value.values())
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other
