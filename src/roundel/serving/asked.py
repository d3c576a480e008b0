"""What a client asks for: the JSON of OpenAI's /v1/completions and /v1/chat/completions, checked.

Source: OpenAI's API reference. What would change the answer and is not done here is refused by name; fields that the
reference does not have are left alone, for tools send many of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roundel.errors import RecipeError
from roundel.inference.drawing import Drawing
from roundel.inference.text import Turns

__all__ = ["Asked", "Refusal", "failure", "read_request"]

LEGACY_TOKENS = 16  # that /v1/completions writes when it is not told how many
STOPS = 16  # stop texts at most
LEFT_ALONE: Mapping[str, Sequence[Any]] = {  # fields that are not supported -> values that ask for nothing
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Refusal(Exception):
    """An answer that is an error: the HTTP status, and what OpenAI's clients expect to find in its body."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request.

    prompts    texts, tokens, or one conversation; each gets an answer
    drawing    `tokens` is None where the request leaves it open: then it is what the model has room for
    """

    prompts: tuple[str | tuple[int, ...] | Turns, ...]
    tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    with_usage: bool

    def drawing(self, room: int) -> Drawing:
        """How tokens are chosen, when there is room for so many."""
        return Drawing(tokens=self.tokens or room, temperature=self.temperature, top_p=self.top_p, seed=self.seed)


def read_request(body: bytes, served: str, *, is_chat: bool) -> Asked:
    """A request's body. served: the model's name. Raises Refusal."""
    try:
        wish = json.loads(body)
        json.dumps(wish, ensure_ascii=False).encode()  # half a character, which JSON can say, is none
    except (ValueError, RecursionError) as error:
        raise Refusal(f"The body is no JSON ({error}).") from error
    if not isinstance(wish, dict):
        raise Refusal("The body is no JSON object.")
    model = wish.get("model")
    if model is not None and model != served:
        raise Refusal(
            f"There is no model {model!r} here; {served!r} is served.",
            status=404,
            param="model",
            code="model_not_found",
        )
    for name, nothing in LEFT_ALONE.items():
        if wish.get(name) is not None and wish[name] not in nothing:
            raise Refusal(f"{name} is not supported here. Leave it out.", param=name, code="unsupported_parameter")
    options = wish.get("stream_options") or {}
    limit = "max_completion_tokens" if wish.get("max_completion_tokens") is not None else "max_tokens"
    asked = Asked(
        prompts=_conversation(wish) if is_chat else _prompts(wish),
        tokens=_number(wish, limit, int) or (None if is_chat else LEGACY_TOKENS),
        temperature=_number(wish, "temperature", float),
        top_p=_number(wish, "top_p", float),
        seed=_number(wish, "seed", int),
        stop=_stop(wish.get("stop")),
        stream=_flag(wish, "stream"),
        with_usage=isinstance(options, dict) and _flag(options, "include_usage"),
    )
    if wish.get(limit) is not None and asked.tokens != wish[limit]:
        raise Refusal(f"{limit} is {wish[limit]!r}, and must be 1 or more.", param=limit)
    try:
        asked.drawing(1)
    except RecipeError as error:
        raise Refusal(str(error)) from error
    return asked


def _prompts(wish: Mapping[str, Any]) -> tuple[str | tuple[int, ...], ...]:
    prompt = wish.get("prompt")
    several = isinstance(prompt, list) and prompt and not all(_is_integer(part) for part in prompt)
    found: list[str | tuple[int, ...]] = []
    for each in prompt if isinstance(prompt, list) and several else [prompt]:
        if isinstance(each, str) and each:
            found.append(each)
        elif isinstance(each, list) and each and all(_is_integer(part) and part >= 0 for part in each):
            found.append(tuple(each))
        else:
            raise Refusal("prompt must be a text, tokens, or a list of either, and not empty.", param="prompt")
    return tuple(found)


def _conversation(wish: Mapping[str, Any]) -> tuple[Turns]:
    messages = wish.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal("messages must be a list of at least one message.", param="messages")
    turns = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES or message.get("tool_calls"):
            raise Refusal(
                f"{place} must be an object whose role is one of {', '.join(ROLES)}; tools are not supported.",
                param=place,
            )
        turns.append({"role": ROLES[message["role"]], "content": _text(message.get("content"), place)})
    return (turns,)


def _text(content: Any, place: str) -> str:
    """A message's content, which may come in parts."""
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) else [None]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise Refusal(f"The content of {place} must be text, or parts of type text.", param=f"{place}.content")
    return "".join(part["text"] for part in parts)


def _stop(stop: Any) -> tuple[str, ...]:
    found = [stop] if isinstance(stop, str) else stop
    if found is None:
        return ()
    if not isinstance(found, list) or len(found) > STOPS or not all(isinstance(s, str) and s for s in found):
        raise Refusal(f"stop must be a text or a list of up to {STOPS}, none of them empty.", param="stop")
    return tuple(found)


def _number(wish: Mapping[str, Any], name: str, kind: type[int] | type[float]) -> Any:
    value = wish.get(name)
    fits = _is_integer(value) if kind is int else _is_integer(value) or isinstance(value, float)
    if value is not None and not (fits and abs(value) < 2**63):
        raise Refusal(f"{name} is {value!r}, and must be {'a whole' if kind is int else 'a'} number.", param=name)
    return value


def _flag(wish: Mapping[str, Any], name: str) -> bool:
    value = wish.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refusal(f"{name} must be true or false.", param=name)
    return bool(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def failure(error: BaseException) -> Refusal:
    """What is answered where the server fails."""
    return Refusal(f"The server failed ({type(error).__name__}: {error}).", status=500)
