"""One generation at a time, in a thread of its own, in the order they were asked for."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import nn

from roundel.errors import QuantizationError
from roundel.inference.drawing import Drawing
from roundel.inference.text import Turns, Written, prompt_ids, reach, tokens_known, turn_ids, written
from roundel.serving.asked import Asked, Refusal, failure

__all__ = ["Speaker"]

OPEN = 2048  # tokens written at most where neither the request nor the model's config says how many


class Speaker:
    """A model and its tokenizer, for many who ask.

    stopping   once it is set, whatever is being written ends with its next token
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._reading = copy.deepcopy(tokenizer)  # a tokenizer is used by one thread at a time
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="speaker")
        self._limit, self._rows = reach(model), tokens_known(model)
        self.stopping = threading.Event()

    def read(self, asked: Asked) -> list[tuple[list[int], Drawing]]:
        """The tokens of each prompt, and how those after it are chosen. Raises Refusal."""
        found = []
        for prompt in asked.prompts:
            ids = self._ids(prompt)
            room = OPEN if self._limit is None else self._limit - len(ids)
            if room < 1:
                raise Refusal(
                    f"The prompt has {len(ids)} tokens, and the model reads {self._limit}. Shorten it.",
                    code="context_length_exceeded",
                )
            found.append((ids, asked.drawing(room)))
        return found

    async def speak(self, ids: Sequence[int], drawing: Drawing, stop: Sequence[str]) -> AsyncIterator[str | Written]:
        """Pieces of text as they come, and at last what was written. Ends early when nobody listens any more."""
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[str | Future[Written]]()
        alone = threading.Event()

        def hand(item: str | Future[Written]) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, item)

        def given_up() -> bool:
            return alone.is_set() or self.stopping.is_set()

        future = self._thread.submit(self._write, ids, hand, drawing, stop, given_up)
        future.add_done_callback(hand)
        try:
            while isinstance(item := await heard.get(), str):
                yield item
            error = item.exception()
            if error is not None and not isinstance(error, Refusal):
                logging.getLogger(__name__).error("A generation failed.", exc_info=error)
                raise failure(error)
            yield item.result()
        finally:
            alone.set()

    def close(self) -> None:
        self.stopping.set()
        self._thread.shutdown(cancel_futures=True)

    def _write(
        self,
        ids: Sequence[int],
        write: Callable[[str], None],
        drawing: Drawing,
        stop: Sequence[str],
        given_up: Callable[[], bool],
    ) -> Written:
        if given_up():  # while it waited
            raise _ending()
        try:
            made = written(self._model, self._tokenizer, ids, write, drawing, stop=stop, cancelled=given_up)
        except QuantizationError as error:
            raise Refusal(str(error), status=500) from error
        if self.stopping.is_set():
            raise _ending()
        return made

    def _ids(self, prompt: str | tuple[int, ...] | Turns) -> list[int]:
        try:
            if isinstance(prompt, str):
                return prompt_ids(self._reading, prompt)
            if isinstance(prompt, tuple):
                if max(prompt) >= self._rows:
                    raise Refusal(f"The prompt has the token {max(prompt)}, and the model's end at {self._rows - 1}.")
                return list(prompt)
            return turn_ids(self._reading, prompt)
        except QuantizationError as error:
            raise Refusal(str(error)) from error


def _ending() -> Refusal:
    return Refusal("The server is ending.", status=503)
