"""`roundel serve`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

__all__ = ["serve"]

PACKAGES = ("starlette", "uvicorn")


@click.command(short_help="Serve a checkpoint to tools that speak OpenAI's API.")
@click.argument("path")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Any other may be reached from outside.")
@click.option("--name", help="What clients call the model. [default: its folder's name]")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, xpu.")
@click.option("--backend", help="What multiplies by rounded weights; chosen by itself unless named.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that ships inside the checkpoint.")
def serve(
    path: str, port: int, host: str, name: str | None, device: str, backend: str | None, trust_remote_code: bool
) -> None:
    """Serve the checkpoint at PATH (a folder or a Hub id, rounded or not) over HTTP, until Ctrl-C.

    It speaks OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models, streamed or whole. One request is
    answered at a time, others wait. Give a tool the base URL that is printed, and any key.

    \b
    Examples:
      roundel serve ./out
      export OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none
      curl $OPENAI_BASE_URL/completions -H 'Content-Type: application/json' \\
          -d '{"prompt": "It was a dark night, and", "max_tokens": 20}'

    There are no keys: whoever reaches the port is answered.
    """
    from roundel.errors import RecipeError

    absent = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if absent:
        raise RecipeError(f"Serving needs {' and '.join(absent)}. Run `pip install 'roundel[serve]'`.")
    from roundel.cli.running import loaded
    from roundel.serving.server import LOOPBACK, address, listening, serve_until_interrupted

    with listening(host, port) as bound:
        model, tokenizer = loaded(path, device, backend, trust_remote_code)
        served = name or (Path(path).resolve().name if Path(path).is_dir() else path)
        click.echo(f"{served} is served at {address(host, bound)}. Ctrl-C ends it.")
        if host not in LOOPBACK:
            click.echo(f"{host} may be reached from other machines, and there are no keys.", err=True)
        serve_until_interrupted(model, tokenizer, served, host, bound)
