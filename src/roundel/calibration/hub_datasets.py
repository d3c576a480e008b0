"""Datasets on the Hub that go by name: where their files lie, how a row becomes a text, and how files are fetched.

huggingface_hub fetches them, whole and one at a time, into the user's own Hugging Face cache: HF_HOME, HF_ENDPOINT,
HF_TOKEN and HF_HUB_OFFLINE mean what they mean everywhere. The layout of each repository is as of November 2026.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, cast

from roundel.calibration.rows import Chat, Row, Text, row_of
from roundel.errors import RecipeError, SourceError, nearest
from roundel.io.hub_repository import offline

__all__ = ["HUB_DATASETS", "HubDataset", "HubFiles", "patterns_of", "row_from_hub"]


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A dataset repository of the Hub, and what one of its rows means.

    repo      `org/name`
    aliases   other names it goes by
    splits    name -> pattern of its files, read in the order of their names
    default   the splits read when none is named; several are read in turns, a row of each
    columns   "text": joined by blank lines; "turns": what the user says, then what the assistant answers;
              "messages": one column of turns
    shape     which of these
    joined    whether its rows are joined unless :concat=False is said: they are shorter than most samples
    only      column -> the values a row must have there to be taken
    """

    repo: str
    aliases: tuple[str, ...] = ()
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "data/train-*.parquet"})
    default: tuple[str, ...] = ("train",)
    columns: tuple[str, ...] = ("text",)
    shape: Literal["text", "turns", "messages"] = "text"
    joined: bool = False
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


HUB_DATASETS = (
    HubDataset(repo="NeelNanda/pile-10k", aliases=("pile-10k",)),
    HubDataset(
        repo="mit-han-lab/pile-val-backup",
        aliases=("pile-val-backup",),
        splits={"validation": "val.jsonl.zst"},
        default=("validation",),
    ),
    HubDataset(repo="HuggingFaceFW/fineweb-edu", aliases=("fineweb-edu",), splits={"train": "sample/10BT/*.parquet"}),
    HubDataset(
        repo="openbmb/Ultra-FineWeb",
        aliases=("Ultra-FineWeb",),
        splits={"en": "data/ultrafineweb_en/*.parquet", "zh": "data/ultrafineweb_zh/*.parquet"},
        default=("en",),
        columns=("content",),
    ),
    HubDataset(repo="BAAI/CCI3-HQ", aliases=("CCI3-HQ",), splits={"train": "data/*.jsonl"}),
    HubDataset(
        repo="madao33/new-title-chinese",
        aliases=("new-title-chinese",),
        splits={"train": "train.csv", "validation": "dev.csv"},
        columns=("content",),
    ),
    HubDataset(
        repo="codeparrot/github-code-clean",
        aliases=("github-code-clean",),
        columns=("code",),
        only={"license": ("mit", "apache-2.0")},
    ),
    HubDataset(
        repo="google-research-datasets/mbpp",
        aliases=("mbpp",),
        splits={name: f"full/{name}-*.parquet" for name in ("train", "validation", "test", "prompt")},
        default=("train", "validation", "test"),
        columns=("text", "code"),
        joined=True,
    ),
    HubDataset(
        repo="nvidia/OpenCodeInstruct",
        aliases=("opencode-instruct", "OpenCodeInstruct"),
        splits={"train": "data/*.parquet"},
        columns=("input", "output"),
        shape="turns",
        joined=True,
    ),
    HubDataset(
        repo="HuggingFaceH4/ultrachat_200k",
        aliases=("ultrachat_200k",),
        splits={name: f"data/{name}-*.parquet" for name in ("train_sft", "test_sft", "train_gen", "test_gen")},
        default=("train_sft",),
        columns=("messages",),
        shape="messages",
    ),
    HubDataset(
        repo="Salesforce/wikitext",
        aliases=("wikitext", "wikitext2", "wikitext-2-raw-v1"),
        splits={name: f"wikitext-2-raw-v1/{name}-*.parquet" for name in ("train", "validation", "test")},
        joined=True,
    ),
)


def row_from_hub(value: object, dataset: HubDataset, where: str) -> Row | None:
    """The row, or None where it is not to be taken. Raises SourceError when its columns are not there."""
    if not isinstance(value, Mapping):
        raise SourceError(f"{where} is no row of columns. Its layout has changed: pass a file instead.")
    if set(dataset.only) <= set(value) and any(value[key] not in allowed for key, allowed in dataset.only.items()):
        return None
    cells = [value.get(column) for column in dataset.columns]
    if dataset.shape == "messages":
        return row_of({"messages": cells[0]}, where)
    if not all(isinstance(cell, str) for cell in cells) or not set(dataset.only) <= set(value):
        raise SourceError(
            f"{where} lacks a text under {' or '.join((*dataset.columns, *dataset.only))}; it has "
            f"{', '.join(map(str, value))}. Its layout has changed: pass a file instead."
        )
    texts = [str(cell) for cell in cells]
    return Chat((("user", texts[0]), ("assistant", texts[1]))) if dataset.shape == "turns" else Text("\n\n".join(texts))


class HubFiles:
    """The files of one dataset at one commit, fetched when asked for.

    commit     the sha of its main branch when this was made
    names      for each split asked for, the files to read, in order
    complete   False when `names` lists only what the user's cache holds, because the Hub was not asked
    notes      what happened on the way that the user did not ask for

    Raises SourceError, here and in `fetch`, when the Hub refuses, is out of reach or has other files than expected;
    RecipeError for a split that it does not have. With `stay_offline`, or HF_HUB_OFFLINE, only the cache is read.
    """

    commit: str
    names: tuple[tuple[str, ...], ...]
    complete: bool
    notes: tuple[str, ...] = ()

    def __init__(self, dataset: HubDataset, splits: tuple[str, ...] | None, stay_offline: bool = False) -> None:
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError

        self._dataset = dataset
        # The client freezes HF_ENDPOINT when it is imported; here the value of the moment counts.
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._local = stay_offline or offline()
        patterns = patterns_of(dataset, splits)
        try:
            self.commit, listed = self._cached() if self._local else self._listed()
        except HfHubHTTPError as error:
            raise self._explained(error) from error
        except (_http_error(), OSError, ValueError) as error:
            if self._local:
                raise self._explained(error) from error
            try:
                self.commit, listed = self._cached()
            except OSError:
                raise self._explained(error) from error
            self._local = True
            self.notes = (
                f"{self._endpoint} is out of reach ({type(error).__name__}). {dataset.repo} is read from the local "
                f"cache, at commit {self.commit}.",
            )
        self.complete = not self._local
        self.names = tuple(tuple(name for name in sorted(listed) if fnmatchcase(name, p)) for p in patterns)
        if not all(self.names):
            held = ", ".join(sorted(listed)[:6]) or "nothing"
            raise SourceError(
                f"{dataset.repo} at {self.commit} has no file {patterns[self.names.index(())]}; "
                f"{'the local cache' if self._local else 'it'} holds {held}. {_INSTEAD}."
            )

    def fetch(self, name: str) -> Path:
        """The file, whole, in the user's Hugging Face cache."""
        try:
            # Asked for by its branch, the cache remembers which commit that was, and can answer offline.
            path = None if self._local else self._download(name, None)
            return path if path is not None and self.commit in path.parts else self._download(name, self.commit)
        except (_http_error(), OSError, ValueError) as error:
            raise self._explained(error) from error

    def _download(self, name: str, revision: str | None) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(
                self._dataset.repo,
                name,
                repo_type="dataset",
                revision=revision,
                endpoint=self._endpoint,
                local_files_only=self._local,
            )
        )

    def _listed(self) -> tuple[str, list[str]]:
        """The commit of the main branch, and the names of its files, as the Hub says."""
        from huggingface_hub import HfApi, constants

        hub = HfApi(endpoint=self._endpoint, library_name="roundel")
        found = hub.dataset_info(self._dataset.repo, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        if found.sha is None or found.siblings is None:
            raise ValueError(f"{self._endpoint} names no commit or no files")
        return found.sha, [sibling.rfilename for sibling in found.siblings]

    def _cached(self) -> tuple[str, list[str]]:
        """The same as the user's cache says. Raises FileNotFoundError when it holds nothing of the dataset."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        folder = Path(constants.HF_HUB_CACHE).expanduser()
        folder /= repo_folder_name(repo_id=self._dataset.repo, repo_type="dataset")
        commit = (folder / "refs" / constants.DEFAULT_REVISION).read_text().strip()
        snapshot = folder / "snapshots" / commit
        return commit, [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]

    def _explained(self, error: Exception) -> SourceError:
        """What went wrong with the Hub, why, and what to do."""
        from huggingface_hub import errors

        repo = self._dataset.repo
        answer = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if answer is not None:
            why = f"the Hub answers {answer} at {self._endpoint}/datasets/{repo}"
            remedy = f"Run `hf auth login` if it asks for that, or try again later. {_INSTEAD}"
        elif self._local:
            why = "offline, and the local Hugging Face cache does not hold it"
            remedy = f"{_INSTEAD}; or run once while online: what was fetched stays in the cache"
        else:
            why = f"no connection to {self._endpoint}, or it broke ({type(error).__name__}: {error})"
            remedy = f"Try again, or {_INSTEAD[0].lower()}{_INSTEAD[1:]}"
        return SourceError(f"The calibration data {repo} cannot be fetched: {why}. {remedy}.")


_INSTEAD = (
    "Pass `--dataset bundled` for the text that comes with roundel, or a file of yours, such as `--dataset texts.jsonl`"
)


def patterns_of(dataset: HubDataset, splits: tuple[str, ...] | None) -> list[str]:
    """The file patterns of the splits asked for. Raises RecipeError for a split that it does not have."""
    for split in splits or ():
        if split not in dataset.splits:
            raise RecipeError(
                f"{dataset.repo} has no split {split!r}.{nearest(split, dataset.splits)} It has "
                f"{', '.join(dataset.splits)}."
            )
    return [dataset.splits[split] for split in splits or dataset.default]


def _http_error() -> type[Exception]:
    """The root of the HTTP library's errors: httpx2 under huggingface_hub 2, httpx under 1."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast("type[Exception]", HfHubHTTPError.__bases__[0])
