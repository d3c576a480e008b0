"""One revision of a model repository as the Hub serves it: what it lists, any range of bytes, and why it refuses.

huggingface_hub finds the repository, the token and the address of a file, and waits when the server is busy. The bytes
are read here, by range requests over that client's own session, because `hf_hub_download` begins a cut file anew in
the next process (huggingface_hub 2.4, `_download_to_tmp_and_move`) and a plain request for more than 50 GB is refused.
Knows nothing of what is kept on disk, save that the user has a Hugging Face cache.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import cast

from roundel.errors import SourceError

__all__ = ["HubFile", "HubRepository", "offline"]

_PART_BYTES = 1 << 30  # asked for in one request; servers refuse 50 GB
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt after a cut
_FRESH_BYTES = 1 << 20  # an attempt that brought this much begins the row of attempts again


@dataclass(frozen=True)
class HubFile:
    """One listed file: its size in bytes, and its sha256 where the Hub states one (files in large-file storage)."""

    size: int
    sha256: str | None


class HubRepository:
    """Where one revision of a repository is read from. `endpoint` is HF_ENDPOINT at the time of construction."""

    def __init__(self, repo_id: str, revision: str | None) -> None:
        from huggingface_hub import constants

        self.repo_id = repo_id
        self.revision = revision or constants.DEFAULT_REVISION
        # The client freezes HF_ENDPOINT when it is imported; here the value of the moment counts.
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

    def list(self) -> tuple[str, dict[str, HubFile]]:
        """The commit the revision names now, and every file of it; offline, what the user's cache holds of it.

        Raises SourceError when a name leaves its folder and when there are no safetensors files.
        """
        with self.explained():
            commit, files = self._list_cache() if offline() else self._list_hub()
        self._check(files)
        return commit, files

    def cached(self, commit: str, name: str) -> Path | None:
        """The file in the user's own cache, if it is there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo_id, name, revision=commit)
        return Path(found) if isinstance(found, str) else None

    def read(self, commit: str, name: str, start: int, stop: int, halt: threading.Event) -> Iterator[bytes]:
        """Bytes `start` to `stop` of a file, in order; a connection that is cut is taken up where it broke.

        Gives up after seven attempts in a row that bring next to nothing, and when `halt` is set (seen at every
        piece). Raises what `explained` explains.
        """
        from huggingface_hub.errors import HfHubHTTPError

        failures = 0
        while start < stop:
            arrived, cut = 0, None
            try:
                for piece in self._request(commit, name, start, min(stop, start + _PART_BYTES)):
                    if halt.is_set():
                        raise SourceError(f"{self.repo_id}: the download of {name} was stopped. Run again to resume.")
                    yield piece
                    start += len(piece)
                    arrived += len(piece)
            except HfHubHTTPError:
                raise  # an answer, not a cut: the client has already waited for a busy server
            except _http_error() as error:
                cut = error
            if cut is not None or not arrived:
                failures = 1 if arrived >= _FRESH_BYTES else failures + 1
                if failures > len(_WAITS):
                    raise cut or OSError(errno.EIO, "the server sends nothing")
                halt.wait(_WAITS[failures - 1])

    @contextmanager
    def explained(self, name: str = "the repository") -> Iterator[None]:
        """Raise what goes wrong inside, with the Hub or the disk, as a SourceError: what, why, what to do."""
        try:
            yield
        except (_http_error(), OSError, ValueError) as error:
            why, remedy = self._explain(error)
            raise SourceError(f"{self.repo_id} at {self.revision}: cannot read {name}. {why}. {remedy}.") from error

    def _list_hub(self) -> tuple[str, dict[str, HubFile]]:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.hf_api import RepoFile

        hub = HfApi(endpoint=self.endpoint, library_name="roundel")
        found = hub.model_info(self.repo_id, revision=self.revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        if found.sha is None:
            raise ValueError(f"{self.endpoint} names no commit")
        tree = hub.list_repo_tree(self.repo_id, recursive=True, revision=found.sha)
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
        return found.sha, {file.path: HubFile(file.size, file.lfs.sha256 if file.lfs else None) for file in files}

    def _list_cache(self) -> tuple[str, dict[str, HubFile]]:
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json"]  # a cache without the other weight formats is no less complete
        cached = Path(
            snapshot_download(self.repo_id, revision=self.revision, allow_patterns=patterns, local_files_only=True)
        )
        found = [path for path in cached.rglob("*") if path.is_file()]
        return cached.name, {p.relative_to(cached).as_posix(): HubFile(p.stat().st_size, None) for p in found}

    def _check(self, files: dict[str, HubFile]) -> None:
        outside = [name for name in files if _leaves(name)]
        if outside:
            raise SourceError(
                f"{self.repo_id} lists the file {outside[0]!r}. Its path leaves the download folder, so the repository "
                "is broken or hostile. Do not use it, and report it to the Hub."
            )
        if not any(name.endswith(".safetensors") for name in files):
            held = ", ".join(sorted(files)[:8]) or "nothing"
            raise SourceError(
                f"{self.repo_id} at {self.revision} has no safetensors files. Other weight formats are not read; it "
                f"holds {held}. Pass a revision or a repository that has them, or convert it to a local folder."
            )

    def _request(self, commit: str, name: str, start: int, stop: int) -> Iterator[bytes]:
        """One request for bytes `start` to `stop`; may end early without an error."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import (
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        if offline():
            raise OfflineModeIsEnabled(name)
        url = hf_hub_url(self.repo_id, name, revision=commit, endpoint=self.endpoint)
        headers = build_hf_headers(library_name="roundel")
        # Compressed bytes could be neither counted nor resumed.
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        # No retry on exceptions there: one in mid-body would make that generator yield a second response.
        with http_stream_backoff("GET", url, headers=headers, timeout=timeout, retry_on_exceptions=()) as response:
            hf_raise_for_status(response)
            position = start if response.status_code == 206 else 0  # 200: the server knows no ranges, begins at 0
            stated = response.headers.get("Content-Range", f"bytes {position}-")
            if not stated.startswith(f"bytes {position}-"):
                raise OSError(errno.EIO, f"asked for bytes from {start} on, the server sends {stated}")
            for chunk in response.iter_bytes():
                wanted = chunk[max(0, start - position) : max(0, stop - position)]
                position += len(chunk)
                if wanted:
                    yield wanted
                if position >= stop:
                    return

    def _explain(self, error: Exception) -> tuple[str, str]:
        """Why it went wrong, and what to do."""
        from huggingface_hub import errors

        page = f"{self.endpoint}/{self.repo_id}"
        number = error.errno if isinstance(error, OSError) else None
        answer = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if isinstance(error, errors.HFValidationError):
            return str(error).rstrip("."), "Pass a Hub id as `org/name`, or a local folder"
        if number in (errno.ENOSPC, errno.EDQUOT):
            remedy = "Free space and run again to continue where it stopped, or choose a folder on a larger disk"
            return f"The disk is full ({error})", remedy
        if offline() and number is None and answer is None:
            remedy = f"Unset HF_HUB_OFFLINE, or run `hf download {self.repo_id}` while online, or pass a local folder"
            return "HF_HUB_OFFLINE is set and the local cache does not hold it", remedy
        if isinstance(error, errors.GatedRepoError):
            why = f"The model is gated and the Hub answers {answer}: nobody is logged in, or without access to it"
            return why, f"Accept the licence at {page}, then run `hf auth login` or set HF_TOKEN"
        if isinstance(error, errors.RevisionNotFoundError):
            why = f"The repository has no such revision (the Hub answers {answer})"
            return why, f"Pass a branch, tag or commit listed at {page}/commits/main, or a local folder"
        if isinstance(error, errors.EntryNotFoundError):
            why = f"The revision has no such file (the Hub answers {answer})"
            return why, "Pass another revision, or a local folder"
        if isinstance(error, errors.RepositoryNotFoundError) or answer in (401, 403, 404):
            why = f"The Hub answers {answer}: there is no such model at {page}, or it is private"
            return why, "Check the name; if it is private, run `hf auth login` or set HF_TOKEN; or pass a local folder"
        if isinstance(error, errors.HfHubHTTPError):  # its text holds the signed address: not for a message
            said = error.server_message or error.response.reason_phrase
            return f"The Hub answers {answer} ({said})", "Run again later, or pass a local folder"
        if isinstance(error, _http_error()):
            why = f"There is no connection to {self.endpoint}, or it broke ({type(error).__name__}: {error})"
            return why, "Run again to continue, set HF_HUB_OFFLINE=1 to use the local cache, or pass a local folder"
        return f"{type(error).__name__}: {error}", "Remove the cause and run again, or pass a local folder"


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set now; the client reads it only when it is imported."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _http_error() -> type[Exception]:
    """The root of the HTTP library's errors: httpx2 under huggingface_hub 2, httpx under 1."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast("type[Exception]", HfHubHTTPError.__bases__[0])


def _leaves(name: str) -> bool:
    """Whether a listed path would leave the download folder, on any system, or enter its own `.hub`."""
    parts = re.split(r"[/\\]", name)
    return bool({"", ".", ".."} & set(parts) or "\0" in name or PureWindowsPath(name).drive or parts[0] == ".hub")
