"""The endpoint: /v1/models, /v1/completions, /v1/chat/completions, and /health.

Requests must be JSON by their content type and name this machine as their host, so that a page in the user's browser
cannot ask on its own. There are no keys: who reaches the port is answered.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from roundel.inference.text import Written
from roundel.serving.answers import Answer, error_body, model_entry
from roundel.serving.asked import Asked, Refusal, failure, read_request
from roundel.serving.speaker import Speaker

__all__ = ["make_app"]

BODY = 16 << 20  # bytes of a request at most
LISTENING = 0.2  # seconds between looks at whether a client is still there
GONE = 499  # as some servers call it when nobody is left to answer to


def make_app(speaker: Speaker, name: str, hosts: Iterable[str]) -> Starlette:
    """The application that serves a model under a name. hosts: what clients may call this machine; "*" for anything."""
    since = int(time.time())

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_entry(name, since)]})

    async def model(request: Request) -> Response:
        wanted = request.path_params["name"]
        if wanted != name:
            raise Refusal(f"There is no model {wanted!r} here; {name!r} is served.", status=404, code="model_not_found")
        return JSONResponse(model_entry(name, since))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def answering(*, is_chat: bool) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            asked = read_request(await _body(request), name, is_chat=is_chat)
            jobs = speaker.read(asked)
            frame = Answer(model=name, is_chat=is_chat, prompt_tokens=sum(len(ids) for ids, _ in jobs))
            if asked.stream:
                return StreamingResponse(_stream(speaker, asked, jobs, frame), media_type="text/event-stream")
            made = await _while_there(request, _all(speaker, asked, jobs))
            return Response(status_code=GONE) if made is None else JSONResponse(frame.whole(made))

        return answer

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", answering(is_chat=False), methods=["POST"]),
            Route("/v1/chat/completions", answering(is_chat=True), methods=["POST"]),
            Route("/health", health),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)],
        exception_handlers={Refusal: _refused, HTTPException: _not_found, Exception: _failed},
    )


Jobs = list[tuple[list[int], Any]]


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal("Send JSON, with the header `Content-Type: application/json`.", status=415)
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > BODY:
            raise Refusal(f"The body is larger than {BODY} bytes.", status=413)
    return bytes(found)


async def _all(speaker: Speaker, asked: Asked, jobs: Jobs) -> list[Written]:
    made = []
    for ids, drawing in jobs:
        async for item in speaker.speak(ids, drawing, asked.stop):
            if isinstance(item, Written):
                made.append(item)
    return made


async def _while_there(request: Request, work: Any) -> Any:
    """What the work gives, or None once the client has gone; then the work is ended."""
    task = asyncio.ensure_future(work)
    while not (await asyncio.wait([task], timeout=LISTENING))[0]:
        if await request.is_disconnected():
            task.cancel()
            await asyncio.wait([task])
            return None
    return task.result()


async def _stream(speaker: Speaker, asked: Asked, jobs: Jobs, frame: Answer) -> AsyncIterator[str]:
    """Server-sent events."""
    made: list[Written] = []
    try:
        for index, (ids, drawing) in enumerate(jobs):
            for chunk in frame.beginning(index):
                yield _event(chunk)
            async for item in speaker.speak(ids, drawing, asked.stop):
                if isinstance(item, Written):
                    made.append(item)
                    yield _event(frame.end(index, item))
                else:
                    yield _event(frame.piece(index, item))
        if asked.with_usage:
            yield _event(frame.last(made))
        yield "data: [DONE]\n\n"
    except Refusal as refusal:
        yield _event(error_body(refusal))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return JSONResponse(error_body(refusal), status_code=refusal.status)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = f"{request.method} {request.url.path}: {error.detail}. There are /v1/models, /v1/completions and "
    refusal = Refusal(told + "/v1/chat/completions.", status=error.status_code)
    return JSONResponse(error_body(refusal), status_code=error.status_code, headers=error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(failure(error)), status_code=500)
