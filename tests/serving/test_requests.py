"""What a client may ask, and what is refused, by the field's name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from roundel.inference.text import Written, _UpToStop
from roundel.serving.answers import Answer
from roundel.serving.asked import Refusal, read_request


def asked(is_chat: bool = False, **fields: Any) -> Any:
    return read_request(json.dumps(fields).encode(), "served", is_chat=is_chat)


def test_defaults() -> None:
    found = asked(prompt="Once")
    assert (found.prompts, found.tokens, found.stop, found.stream, found.with_usage) == (
        ("Once",),
        16,
        (),
        False,
        False,
    )
    assert (found.temperature, found.top_p, found.seed) == (None, None, None)
    assert asked(True, messages=[{"role": "user", "content": "Hi"}]).drawing(70).tokens == 70


def test_prompts_are_texts_or_tokens() -> None:
    assert asked(prompt=["a", [1, 2]]).prompts == ("a", (1, 2))
    assert asked(prompt=[1, 2]).prompts == ((1, 2),)


def test_messages_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = asked(True, messages=[{"role": "developer", "content": "c"}, {"role": "user", "content": parts}])
    assert found.prompts == ([{"role": "system", "content": "c"}, {"role": "user", "content": "ab"}],)


def test_fields_that_ask_for_nothing_or_are_unknown_are_let_pass() -> None:
    assert asked(prompt="a", n=1, logit_bias={}, frequency_penalty=0.0, tools=None, min_p=0.1, model="served", user="x")


@pytest.mark.parametrize(
    ("is_chat", "fields", "param"),
    [
        (False, {}, "prompt"),
        (False, {"prompt": ""}, "prompt"),
        (False, {"prompt": [[]]}, "prompt"),
        (False, {"prompt": [-1]}, "prompt"),
        (False, {"prompt": [True]}, "prompt"),
        (False, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        (False, {"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        (False, {"prompt": "a", "max_tokens": True}, "max_tokens"),
        (False, {"prompt": "a", "temperature": "hot"}, "temperature"),
        (False, {"prompt": "a", "temperature": -1}, None),
        (False, {"prompt": "a", "top_p": 0}, None),
        (False, {"prompt": "a", "seed": 1 << 70}, "seed"),
        (False, {"prompt": "a", "stop": [""]}, "stop"),
        (False, {"prompt": "a", "stop": ["x"] * 17}, "stop"),
        (False, {"prompt": "a", "stream": "yes"}, "stream"),
        (False, {"prompt": "a", "n": 2}, "n"),
        (False, {"prompt": "a", "echo": True}, "echo"),
        (False, {"prompt": "a", "logprobs": 3}, "logprobs"),
        (False, {"prompt": "a", "model": "gpt-4"}, "model"),
        (True, {"messages": []}, "messages"),
        (True, {"messages": ["Hi"]}, "messages[0]"),
        (True, {"messages": [{"role": "tool", "content": "1"}]}, "messages[0]"),
        (True, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        (True, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (True, {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 0}, "max_completion_tokens"),
        (True, {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools"),
        (True, {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}},
         "response_format"),
    ],
)  # fmt: skip
def test_what_is_refused(is_chat: bool, fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(Refusal) as caught:
        asked(is_chat, **fields)
    assert caught.value.param == param and 400 <= caught.value.status < 500


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}'])
def test_bodies_that_are_no_request(body: bytes) -> None:
    with pytest.raises(Refusal, match="body is no JSON"):
        read_request(body, "served", is_chat=False)


@pytest.mark.parametrize("pieces", [["one STOP two"], ["one ST", "OP two"], list("one STOP two"), ["one ", "STOP"]])
def test_a_stop_text_is_cut_off_wherever_it_is_torn(pieces: list[str]) -> None:
    heard: list[str] = []
    text = _UpToStop(("STOP", "never"), heard.append)
    for number, piece in enumerate(pieces):
        text.add(piece, last=number == len(pieces) - 1)
    assert text.stopped and "".join(heard) == text.text == "one "


def test_what_only_began_like_a_stop_text_is_handed_on() -> None:
    heard: list[str] = []
    text = _UpToStop(("STOP",), heard.append)
    for piece in ("a S", "TO", "b ST"):
        text.add(piece, last=False)
    assert heard == ["a ", "STOb "]
    text.add("", last=True)
    assert "".join(heard) == "a STOb ST" and not text.stopped


def test_usage_is_of_all_choices() -> None:
    frame = Answer(model="m", is_chat=True, prompt_tokens=7)
    found = frame.whole([Written(text="a", tokens=2, ended=True), Written(text="b", tokens=3, ended=False)])
    assert found["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    assert [choice["finish_reason"] for choice in found["choices"]] == ["stop", "length"]
