"""`roundel serve` on the bundled model, in a process of its own, asked by OpenAI's own client and by plain HTTP."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

import roundel
from cli.test_running import TEMPLATE
from commands import command
from roundel.data.bundled import bundled_model
from roundel.inference.drawing import Drawing
from roundel.inference.linear import QuantEmbedding
from roundel.inference.text import answered, continued, tokenizer_for
from roundel.serving.app import make_app
from roundel.serving.asked import Refusal, read_request
from roundel.serving.speaker import Speaker

PROMPT = "It was a dark night, and"
GREEDY = {"model": "out", "temperature": 0, "max_tokens": 12}
ASKED = [{"role": "user", "content": "Why?"}]


@dataclass
class Served:
    folder: Path
    port: int
    client: openai.OpenAI
    process: subprocess.Popen[str]

    def ask(self, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
        """What plain HTTP gets."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("POST", path, body, {"Content-Type": "application/json"} | headers)
            answer = connection.getresponse()
            return answer.status, answer.read()


def started(folder: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    """The server in a process of its own, and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "roundel", "serve", str(folder), "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert "is served at http://127.0.0.1:" in line, process.stderr.read()
    return process, int(line.partition("127.0.0.1:")[2].partition("/")[0])


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Ctrl-C."""
    process.send_signal(signal.SIGINT)
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, error


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served") / "out"
    roundel.quantize(bundled_model(), folder, scheme="W4A16", workers=1)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    process, port = started(folder)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    with client:
        yield Served(folder, port, client, process)
    code, error = ended(process)
    assert (code, error) == (0, "")


def test_completions(served: Served) -> None:
    model = roundel.load(served.folder)
    expected = continued(model, tokenizer_for(served.folder, model), PROMPT, str, Drawing(tokens=12, temperature=0))
    found = served.client.completions.create(prompt=PROMPT, **GREEDY)
    assert (found.choices[0].text, found.choices[0].finish_reason, found.model) == (expected, "length", "out")
    assert found.usage is not None and found.usage.completion_tokens == 12
    chunks = list(
        served.client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected and len(chunks) > 3
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage == found.usage


def test_chat(served: Served) -> None:
    model = roundel.load(served.folder)
    tokenizer = tokenizer_for(served.folder, model)
    expected = answered(model, tokenizer, ASKED, str, Drawing(tokens=12, temperature=0))
    found = served.client.chat.completions.create(messages=ASKED, **GREEDY)
    assert (found.choices[0].message.content, found.choices[0].message.role) == (expected, "assistant")
    stream = served.client.chat.completions.create(messages=ASKED, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


def test_stop_and_seed(served: Served) -> None:
    whole = served.client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    word = whole.split()[2]
    cut = served.client.completions.create(prompt=PROMPT, stop=[f" {word}"], **GREEDY).choices[0]
    assert (cut.text, cut.finish_reason) == (whole.partition(f" {word}")[0], "stop")
    drawn = [
        served.client.completions.create(prompt=PROMPT, model="out", temperature=1, top_p=0.95, seed=seed).choices[0]
        for seed in (1, 1, 2)
    ]
    assert drawn[0].text == drawn[1].text != drawn[2].text


def test_several_prompts_and_tokens(served: Served) -> None:
    model = roundel.load(served.folder)
    ids = tokenizer_for(served.folder, model).encode(PROMPT)
    one = served.client.completions.create(prompt=PROMPT, **GREEDY)
    found = served.client.completions.create(prompt=[PROMPT, "The"], **GREEDY)
    assert found.choices[0].text == one.choices[0].text != found.choices[1].text
    assert served.client.completions.create(prompt=ids, **GREEDY).choices[0].text == one.choices[0].text
    streamed = list(served.client.completions.create(prompt=[PROMPT, "The"], stream=True, **GREEDY))
    for choice in found.choices:
        pieces = [c.choices[0].text for c in streamed if c.choices[0].index == choice.index]
        assert "".join(pieces) == choice.text


def test_models(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["out"]
    assert served.client.models.retrieve("out").owned_by == "roundel"
    with pytest.raises(openai.NotFoundError, match="'out' is served"):
        served.client.models.retrieve("other")


def test_many_ask_at_once(served: Served) -> None:
    """Everyone gets what they would have got alone."""
    prompts = [f"{name} said that" for name in ("He", "She", "They", "Nobody")]
    alone = [served.client.completions.create(prompt=p, seed=3, **(GREEDY | {"temperature": 1})) for p in prompts]
    heard: dict[str, str] = {}

    def ask(prompt: str) -> None:
        answer = served.client.completions.create(prompt=prompt, seed=3, **(GREEDY | {"temperature": 1}))
        heard[prompt] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == {prompt: answer.choices[0].text for prompt, answer in zip(prompts, alone, strict=True)}


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_keeps_nobody_waiting(served: Served, stream: bool) -> None:
    def seconds() -> float:
        began = time.monotonic()
        served.client.completions.create(prompt=PROMPT, **(GREEDY | {"max_tokens": 200}))
        return time.monotonic() - began

    alone = seconds()
    body = json.dumps({"prompt": PROMPT, "max_tokens": 200, "stream": stream, "temperature": 1.5}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    for _ in range(16):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    assert seconds() < 8 * alone


def test_errors_are_openai_s(served: Served) -> None:
    create = served.client.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="gpt-4", prompt=PROMPT)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="n is not supported") as several:
        create(prompt=PROMPT, n=2, **GREEDY)
    assert several.value.type == "invalid_request_error"
    for stream in (True, False):
        with pytest.raises(openai.BadRequestError, match="the model reads 512") as long:
            create(prompt="night " * 600, stream=stream, **GREEDY)
        assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="token 99999"):
        create(prompt=[99999], **GREEDY)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "says"),
    [
        ("/v1/completions", b"{", {}, 400, b"no JSON"),
        ("/v1/completions", b"{}", {"Content-Type": "text/plain"}, 415, b"Content-Type: application/json"),
        ("/v1/completions", b" " * (17 << 20), {}, 413, b"larger than"),
        ("/v1/embeddings", b"{}", {}, 404, b"/v1/chat/completions"),
        ("/v1/models", b"{}", {}, 405, b"Method Not Allowed"),
        ("/v1/models", b"", {"Host": "a.page.somewhere"}, 400, b"Invalid host"),
    ],
)
def test_what_is_no_request(
    served: Served, path: str, body: bytes, headers: dict[str, str], status: int, says: bytes
) -> None:
    found = served.ask(path, body, **headers)
    assert found[0] == status and says in found[1]
    if b"Invalid host" not in says:
        assert set(json.loads(found[1])["error"]) == {"message", "type", "param", "code"}


def test_ctrl_c_ends_what_is_being_written(served: Served) -> None:
    process, port = started(bundled_model(), "--name", "mine")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    with client:
        stream = client.completions.create(model="mine", prompt=PROMPT, max_tokens=480, stream=True, temperature=1)
        next(iter(stream))
        began = time.monotonic()
        code, error = ended(process)
        assert (code, error) == (0, "") and time.monotonic() - began < 30


def test_a_model_whose_embedding_is_rounded(tmp_path: Path) -> None:
    roundel.quantize(bundled_model(), tmp_path, recipe=roundel.Recipe(formats=("gguf:q4_0",)), workers=1)
    model = roundel.load(tmp_path)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    speaker = Speaker(model, tokenizer_for(tmp_path, model))
    try:
        ids, _ = speaker.read(read_request(b'{"prompt": [2047]}', "out", is_chat=False))[0]
        assert ids == [2047]
        with pytest.raises(Refusal, match="the model's end at 2047"):
            speaker.read(read_request(b'{"prompt": [2048]}', "out", is_chat=False))
    finally:
        speaker.close()


def test_what_fails_while_it_is_streamed_is_told() -> None:
    model: Any = roundel.load(bundled_model())
    speaker = Speaker(model, tokenizer_for(bundled_model(), model))
    client = TestClient(make_app(speaker, "out", "*"), raise_server_exceptions=False)

    def failing(*_: Any, **__: Any) -> None:
        raise ValueError("No such thing")

    model.generate = failing
    try:
        whole = client.post("/v1/completions", json={"prompt": PROMPT})
        streamed = client.post("/v1/completions", json={"prompt": PROMPT, "stream": True})
    finally:
        speaker.close()
    assert whole.status_code == 500 and "ValueError: No such thing" in whole.json()["error"]["message"]
    assert json.loads(streamed.text.removeprefix("data: ")) == whole.json()


def test_without_a_chat_template(tmp_path: Path) -> None:
    process, port = started(bundled_model())
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tinybook", messages=ASKED)
    assert ended(process) == (0, "")


def test_a_port_that_is_taken(served: Served) -> None:
    done = command("serve", served.folder, "--port", served.port)
    assert done.code == 2 and "cannot be listened on" in done.error and "--port" in done.error


def test_what_cannot_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("serve", tmp_path / "none", "--port", 0).code == 5
    assert command("serve", bundled_model(), "--port", 0, "--host", "no.such.host.invalid").code == 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = command("serve", bundled_model())
    assert done.code == 2 and "pip install 'roundel[serve]'" in done.error


def test_help_says_how_to_point_a_tool_at_it() -> None:
    told = command("serve", "--help").output
    assert "OPENAI_BASE_URL=http://127.0.0.1:8000/v1" in told
