"""What is sent back: the JSON objects of OpenAI's completions and chats, whole or as a stream of chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from roundel.inference.text import Written
from roundel.serving.asked import Refusal

__all__ = ["Answer", "error_body", "model_entry"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The frame of one answer: what its parts have in common.

    prompt_tokens   of all prompts
    """

    model: str
    is_chat: bool
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(self, written: list[Written]) -> dict[str, Any]:
        choices = [
            {
                "index": number,
                **({"message": {"role": "assistant", "content": w.text}} if self.is_chat else {"text": w.text}),
                "logprobs": None,
                "finish_reason": _reason(w),
            }
            for number, w in enumerate(written)
        ]
        return self._frame("") | {"choices": choices, "usage": self.usage(written)}

    def beginning(self, index: int) -> Iterator[dict[str, Any]]:
        """Chunks before the first piece of a choice."""
        if self.is_chat:
            yield self._chunk(index, {"role": "assistant", "content": ""}, None)

    def piece(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, {"content": text} if self.is_chat else text, None)

    def end(self, index: int, written: Written) -> dict[str, Any]:
        return self._chunk(index, {} if self.is_chat else "", _reason(written))

    def last(self, written: list[Written]) -> dict[str, Any]:
        """The chunk that says what all of it took."""
        return self._frame(".chunk") | {"choices": [], "usage": self.usage(written)}

    def usage(self, written: list[Written]) -> dict[str, int]:
        made = sum(w.tokens for w in written)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    def _chunk(self, index: int, content: Any, reason: str | None) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta" if self.is_chat else "text": content,
            "logprobs": None,
            "finish_reason": reason,
        }
        return self._frame(".chunk") | {"choices": [choice]}

    def _frame(self, suffix: str) -> dict[str, Any]:
        kind, prefix = (f"chat.completion{suffix}", "chatcmpl") if self.is_chat else ("text_completion", "cmpl")
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


def error_body(refusal: Refusal) -> dict[str, Any]:
    """The JSON of an error, as OpenAI's clients read it."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    return {"error": {"message": str(refusal), "type": kind, "param": refusal.param, "code": refusal.code}}


def model_entry(name: str, since: int) -> dict[str, Any]:
    """The served model in the list of /v1/models. since: seconds since 1970."""
    return {"id": name, "object": "model", "created": since, "owned_by": "roundel"}


def _reason(written: Written) -> str:
    return "stop" if written.ended else "length"
