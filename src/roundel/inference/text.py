"""Text from a loaded model, token by token: a prompt continued, and a conversation in the model's own template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from roundel.calibration.quiet import quiet
from roundel.calibration.tokenizer import load_tokenizer
from roundel.errors import NumericsError, RecipeError, SourceError
from roundel.inference.drawing import Drawing

__all__ = [
    "Turns",
    "Write",
    "Written",
    "answered",
    "check_template",
    "continued",
    "prompt_ids",
    "reach",
    "tokenizer_for",
    "tokens_known",
    "turn_ids",
    "written",
]

Turns = Sequence[Mapping[str, str]]
Write = Callable[[str], None]


def tokenizer_for(folder: str | Path, model: nn.Module, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer. Raises SourceError when there is none, or it has tokens that the model has not."""
    tokenizer: Any = load_tokenizer(folder, trust_remote_code, fetch=True)
    rows, highest = tokens_known(model), max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise SourceError(
            f"The tokenizer of {folder} has a token {highest}, and the model's embedding ends at {rows - 1}. It "
            "belongs to another model; copy the right tokenizer files there."
        )
    return tokenizer


def tokens_known(model: nn.Module) -> int:
    """How many tokens a model's embedding has rows for, rounded or not."""
    known: Any = model
    embedding = known.get_input_embeddings()
    rows: int = getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]
    return rows


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a model wrote.

    tokens   it wrote, its end token among them, and those of a stop text
    ended    whether it came to an end, its own or a stop text, and not only to the most that was asked for
    """

    text: str
    tokens: int
    ended: bool


def continued(model: nn.Module, tokenizer: Any, prompt: str, write: Write, drawing: Drawing) -> str:
    """What the model writes after a prompt; `write` gets it in pieces as they come.

    Raises RecipeError for an empty prompt, or one longer than the model reads.
    """
    return written(model, tokenizer, prompt_ids(tokenizer, prompt), write, drawing).text


def answered(model: nn.Module, tokenizer: Any, turns: Turns, write: Write, drawing: Drawing) -> str:
    """The model's next turn in a conversation; `write` gets it in pieces as they come.

    turns   {"role": "system" | "user" | "assistant", "content": text}, the last one the user's
    Raises SourceError when the tokenizer has no chat template, or the template refuses the turns.
    """
    return written(model, tokenizer, turn_ids(tokenizer, turns), write, drawing).text


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt. Raises RecipeError where there are none."""
    ids: list[int] = tokenizer.encode(prompt, verbose=False)  # too long a prompt is told of later
    if not ids:
        raise RecipeError("An empty prompt cannot be continued. Give at least one word.")
    return ids


def turn_ids(tokenizer: Any, turns: Turns) -> list[int]:
    """The tokens of a conversation, up to where the model's turn begins. See `answered`."""
    from jinja2 import TemplateError

    check_template(tokenizer)
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=True, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
    except TemplateError as error:
        raise SourceError(f"The chat template refuses this conversation ({error}).") from error
    if not ids:
        raise SourceError("The chat template makes nothing of this conversation. Use `roundel generate`.")
    return ids


def check_template(tokenizer: Any) -> None:
    """Raises SourceError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise SourceError(
            "The tokenizer has no chat template, so the model was not made for conversations. Use `roundel generate`."
        )


def reach(model: nn.Module) -> int | None:
    """How many tokens a model reads and writes together; None where its config does not say."""
    known: Any = model
    limit = known.config.get_text_config().to_dict().get("max_position_embeddings")
    return limit if isinstance(limit, int) else None


def written(
    model: nn.Module,
    tokenizer: Any,
    ids: Sequence[int],
    write: Write,
    drawing: Drawing,
    *,
    stop: Sequence[str] = (),
    cancelled: Callable[[], bool] = lambda: False,
) -> Written:
    """What the model writes after tokens; `write` gets it in pieces as they come.

    stop        texts before the first of which the answer ends
    cancelled   asked after every token whether to leave it at that
    Raises RecipeError when there are more tokens than the model reads, NumericsError when it computes no numbers.
    """
    from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextStreamer

    class Pieces(TextStreamer):  # type: ignore[misc]
        """Hands on whole characters, as soon as no later token can change them."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.add(text, last=stream_end)

    class Enough(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            return torch.full((len(ids),), pieces.stopped or cancelled(), device=ids.device)

    class Numbers(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            if bool(scores.isnan().any()):
                raise NumericsError(
                    f"What the model computes for token {ids.shape[1]} is not a number. A tensor of the checkpoint is "
                    "broken: fetch or make it again. `roundel verify` looks at every one."
                )
            return scores

    pieces = _UpToStop(stop, write)
    known: Any = model
    limit = reach(model) or len(ids) + drawing.tokens
    if len(ids) >= limit:
        raise RecipeError(f"The prompt has {len(ids)} tokens and the model reads {limit}. Shorten it.")
    if drawing.seed is not None:
        torch.manual_seed(drawing.seed)
    entering = torch.tensor([list(ids)], device=known.device)
    with quiet(), torch.no_grad():
        made = known.generate(
            entering,
            attention_mask=torch.ones_like(entering),
            streamer=Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True),
            stopping_criteria=StoppingCriteriaList([Enough()]),
            logits_processor=LogitsProcessorList([Numbers()]),
            tokenizer=tokenizer,  # for stop texts of generation_config
            **drawing.options(limit - len(ids)),
        )[0, len(ids) :].tolist()
    ends = known.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return Written(text=pieces.text, tokens=len(made), ended=pieces.stopped or made[-1] in ends)


class _UpToStop:
    """Hands text on up to the first of the stop texts, and holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str], write: Write) -> None:
        self._stop, self._write, self._held = stop, write, ""
        self.text, self.stopped = "", False

    def add(self, text: str, *, last: bool) -> None:
        if self.stopped:
            return
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found, default=len(self._held) if last else self._safe())
        piece, self._held = self._held[:end], self._held[end:]
        if piece:
            self.text += piece
            self._write(piece)

    def _safe(self) -> int:
        """How far the held text is no beginning of a stop text."""
        for start in range(len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stop):
                return start
        return len(self._held)
