"""A small Hugging Face Hub on 127.0.0.1, for tests with the real client.

Serves model info, the paged file tree, and files by range: small ones at `/{id}/resolve/{commit}/{file}`, safetensors
behind a redirect to another origin, as the real Hub does with large-file storage; and the same of datasets, whose ids
begin with `datasets/` here. It can gate a model, cut connections, wait in mid-file, and ignore ranges; it records every
request. Knows nothing of roundel.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LIMIT = 10.0  # seconds nothing in a test may wait longer for


@dataclass
class Request:
    """What was asked, and what was answered: `sent` counts the bytes of the body."""

    method: str
    path: str
    range: str | None
    token: str
    name: str = ""
    status: int = 0
    sent: int = 0


@dataclass
class Cut:
    """Break the connection after this many bytes of an answer, this many times."""

    after: int
    times: int


@dataclass
class Hold:
    """Stop after this many bytes of an answer, say `reached`, go on when `released`."""

    after: int
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class HubServer:
    """The Hub: `with HubServer() as hub: hub.add("org/model", {"config.json": b"{}"})`, then HF_ENDPOINT = hub.url.

    requests     every request so far, in order of arrival
    gated        ids that need the access token in `tokens` (401 without any, 403 with another)
    cuts, holds  by file name
    pauses       seconds before each 1,024 bytes of a file, by name
    busy         how many times a file is answered with 503, by name
    damaged      names whose listed sha256 is wrong
    ranges       whether Range is understood
    page         entries per page of the tree
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Mapping[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.requests: list[Request] = []
        self.gated: set[str] = set()
        self.tokens: set[str] = set()
        self.cuts: dict[str, Cut] = {}
        self.holds: dict[str, Hold] = {}
        self.pauses: dict[str, float] = {}
        self.busy: dict[str, int] = {}
        self.damaged: set[str] = set()
        self.ranges = True
        self.page = 1000
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for hold in self.holds.values():
            hold.released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, repo_id: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Commit files to a branch of a model; returns the commit's sha."""
        content = "".join(f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(files.items()))
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits.setdefault(repo_id, {})[commit] = files
        self.branches.setdefault(repo_id, {})[branch] = commit
        return commit

    def asked(self, name: str) -> list[Request]:
        """The requests for a file that were answered with its bytes, in order."""
        return [request for request in self.requests if request.name == name and request.status in (200, 206)]

    def sent(self, suffix: str = ".safetensors") -> int:
        """Bytes sent so far of all files whose names end so."""
        return sum(request.sent for request in self.requests if request.name.endswith(suffix))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: clients that hang up in mid-answer are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.seen = Request(self.command, unquote(url.path), self.headers.get("Range"), token)
        self.hub.requests.append(self.seen)
        kind, repo = r"/api/(?:models/|(?=datasets/))", r"((?:datasets/)?[^/]+/[^/]+)"
        if found := re.fullmatch(r"/cdn/(\w+)/(.+)", self.seen.path):
            self._blob(*found.groups())
        elif found := re.fullmatch(rf"{kind}{repo}(?:/revision/(.+))?", self.seen.path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(rf"{kind}{repo}/tree/([^/]+)", self.seen.path):
            self._tree(found[1], found[2], int(parse_qs(url.query).get("cursor", ["0"])[0]))
        elif found := re.fullmatch(rf"/{repo}/resolve/([^/]+)/(.+)", self.seen.path):
            self._resolve(*found.groups())
        else:
            self._refuse(404, "NotFound")

    def _commit(self, repo_id: str, revision: str) -> str | None:
        """The commit a revision names; None once the refusal is sent."""
        if repo_id not in self.hub.commits:
            self._refuse(401, "RepoNotFound")  # as the real one, which tells strangers nothing
            return None
        commit = self.hub.branches[repo_id].get(revision, revision)
        if commit not in self.hub.commits[repo_id]:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit

    def _info(self, repo_id: str, revision: str) -> None:
        if commit := self._commit(repo_id, revision):
            names = self.hub.commits[repo_id][commit]
            self._json({"id": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in names]})

    def _tree(self, repo_id: str, revision: str, start: int) -> None:
        commit = self._commit(repo_id, revision)
        if commit is None:
            return
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "folder", "oid": "0" * 40, "size": 0}]
        for name, data in self.hub.commits[repo_id][commit].items():
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entries.append({"type": "file", "path": name, "oid": oid, "size": len(data)})
            if name.endswith(".safetensors"):
                sha256 = "0" * 64 if name in self.hub.damaged else hashlib.sha256(data).hexdigest()
                entries[-1]["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
        stop = start + self.hub.page
        link = f'<{self.hub.url}/api/models/{repo_id}/tree/{revision}?recursive=True&cursor={stop}>; rel="next"'
        self._json(entries[start:stop], {"Link": link} if stop < len(entries) else {})

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        commit = self._commit(repo_id, revision)
        if commit is None:
            return None
        if repo_id in self.hub.gated and self.seen.token not in self.hub.tokens:
            return self._refuse(403 if self.seen.token else 401, "GatedRepo")
        files = self.hub.commits[repo_id][commit]
        if name not in files:
            return self._refuse(404, "EntryNotFound")
        sha256 = hashlib.sha256(files[name]).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
        if name.endswith(".safetensors"):
            linked = {"X-Linked-Size": str(len(files[name])), "X-Linked-ETag": f'"{sha256}"'}
            self._head(302, {**headers, **linked, "Location": f"{self.hub.cdn}/cdn/{sha256}/{name}"}, 0)
        else:
            self._file(name, files[name], headers)

    def _blob(self, sha256: str, name: str) -> None:
        for commits in self.hub.commits.values():
            for commit, files in commits.items():
                if name in files and hashlib.sha256(files[name]).hexdigest() == sha256:
                    # huggingface_hub 1 tells origins apart by host alone, and asks here for the commit
                    headers = {"X-Repo-Commit": commit, "ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
                    return self._file(name, files[name], headers)
        self._refuse(404, "EntryNotFound")

    def _file(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        self.seen.name = name
        if self.hub.busy.get(name, 0) > 0:
            self.hub.busy[name] -= 1
            return self._refuse(503, "Busy")
        start, stop, status = 0, len(data), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.seen.range or "")
        if asked and self.hub.ranges:
            start, stop, status = int(asked[1]), min(len(data), int(asked[2] or len(data) - 1) + 1), 206
            if start >= stop:
                return self._head(416, {"Content-Range": f"bytes */{len(data)}"}, 0)
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        self._head(status, headers, stop - start)
        if self.command == "GET":
            self._send(name, data[start:stop])

    def _send(self, name: str, body: bytes) -> None:
        cut, hold = self.hub.cuts.get(name), self.hub.holds.get(name)
        end = len(body)
        if cut is not None and cut.times > 0 and cut.after < end:
            cut.times -= 1
            end = cut.after
        while self.seen.sent < end:
            if hold is not None and self.seen.sent >= hold.after:
                hold.reached.set()
                hold.released.wait(LIMIT)
            pause = self.hub.pauses.get(name, 0.0)
            threading.Event().wait(pause) if pause else None
            piece = 1024 if pause else end
            if hold is not None and self.seen.sent < hold.after:
                piece = min(piece, hold.after - self.seen.sent)
            piece = min(piece, end - self.seen.sent)
            self.seen.sent += piece  # first, or the client may look before it is counted
            try:
                self.wfile.write(body[self.seen.sent - piece : self.seen.sent])
            except OSError:  # the client has gone
                self.close_connection = True
                return
        if end < len(body):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._head(200, {"Content-Type": "application/json", **(headers or {})}, len(body))
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._head(status, {"X-Error-Code": code, "X-Error-Message": code}, 0)

    def _head(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self.seen.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def point_client_at(hub: HubServer, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Make huggingface_hub, in this process, know only this server, an empty cache under `home`, and no token."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Its user agent would ask the real Hub for a list of agents.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    _renew_session()


@functools.cache
def _renew_session() -> None:
    """Begin a session that knows no proxy for 127.0.0.1; once, since making one takes a tenth of a second."""
    from huggingface_hub.utils import close_session, get_session  # type: ignore[attr-defined]  # public, loaded lazily

    close_session()
    get_session()
