"""Runs that are killed, for real: a process is forked, and SIGKILLs itself before its n-th call that changes the disk.

As a program it serves such deaths: it imports roundel once, reads one request a line, and forks for each, so that a
death costs no more than a fork. `Victims` is the other end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Victims"]

CALLS = (
    "mkdir",
    "posix_fallocate",
    "pwrite",
    "copy_file_range",
    "write",
    "fdatasync",
    "fsync",
    "rename",
    "replace",
    "unlink",
)


class Victims:
    """A served program, until it is closed."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def calls(self, model: Path, out: Path, **options: Any) -> int:
        """Quantize undisturbed; how many calls changed the disk."""
        return self._ask(None, model, out, options)

    def killed_at(self, number: int, model: Path, out: Path, **options: Any) -> bool:
        """Quantize in a process that dies before its n-th call; whether it died, and did not come to its end before."""
        status = self._ask(number, model, out, options)
        assert status in (0, signal.SIGKILL), f"wait status {status}"
        return status != 0

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def _ask(self, number: int | None, model: Path, out: Path, options: dict[str, Any]) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([number, str(model), str(out), options]) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


def _counted(count: list[int], number: int | None) -> dict[str, Callable[..., Any]]:
    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return real(*args, **kwargs)

        return call

    return {name: counting(getattr(os, name)) for name in CALLS}


def _serve() -> None:
    import torch

    from roundel import committer, quantize

    torch.set_num_threads(1)
    committer.FLUSH_BYTES = 1  # every piece of work is journaled at once
    real, warm = {name: getattr(os, name) for name in CALLS}, False
    for line in sys.stdin:
        number, model, out, options = json.loads(line)
        if "algorithm" in options and not warm:  # what children share: imports and compiled kernels
            with tempfile.TemporaryDirectory() as folder:
                data = {name: options[name] for name in ("dataset", "nsamples", "seqlen", "batch_size", "scheme")}
                quantize(model, Path(folder) / "out", algorithm="smoothquant,gptq", **data)
            warm = True
        count, here, pipe = [0], number is None and "algorithm" not in options, os.pipe()
        child = 0 if here else os.fork()  # what computes runs in a child always: threads do not survive a fork
        if child == 0:
            vars(os).update(_counted(count, number))
            quantize(model, out, **options)
            vars(os).update(real)
        if child == 0 and not here:
            os.write(pipe[1], str(count[0]).encode())
            os._exit(0)
        os.close(pipe[1])
        status = 0 if here else os.waitpid(child, 0)[1]
        counted = count[0] if here else int(os.read(pipe[0], 32) or 0)
        os.close(pipe[0])
        print(counted if number is None else status, flush=True)


if __name__ == "__main__":
    _serve()
