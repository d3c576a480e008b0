"""The endpoint on a port, until Ctrl-C."""

from __future__ import annotations

import socket
from types import FrameType
from typing import Any

import uvicorn
from torch import nn

from roundel.errors import RecipeError
from roundel.serving.app import make_app
from roundel.serving.speaker import Speaker

__all__ = ["LOOPBACK", "address", "listening", "serve_until_interrupted"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PATIENCE = 5  # seconds that open connections have at the end


def listening(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to; they wait. port: 0 for a free one. Raises RecipeError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise RecipeError(
            f"{host}:{port} cannot be listened on ({error}). Choose another with --port; 0 takes a free one."
        ) from error


def address(host: str, bound: socket.socket) -> str:
    """The base URL that clients are told."""
    named = f"[{host}]" if ":" in host else host
    return f"http://{named}:{bound.getsockname()[1]}/v1"


def serve_until_interrupted(model: nn.Module, tokenizer: Any, name: str, host: str, bound: socket.socket) -> None:
    """Answer under `name` until the process is interrupted; what is being written then ends with its next token."""
    speaker = Speaker(model, tokenizer)
    hosts = ("127.0.0.1", "localhost", "[::1]") if host in LOOPBACK else ("*",)
    config = uvicorn.Config(
        make_app(speaker, name, hosts), log_level="warning", timeout_graceful_shutdown=PATIENCE, lifespan="off"
    )
    try:
        _Server(config, speaker).run(sockets=[bound])
    except KeyboardInterrupt:  # uvicorn hands the signal on, once it has ended
        pass
    finally:
        speaker.close()


class _Server(uvicorn.Server):  # type: ignore[misc]
    """uvicorn's, which tells the speaker when it is to end."""

    def __init__(self, config: uvicorn.Config, speaker: Speaker) -> None:
        super().__init__(config)
        self._speaker = speaker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._speaker.stopping.set()
        super().handle_exit(sig, frame)
