"""A model on the Hub is streamed: planned without weights, each shard fetched once and dropped after use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import roundel
from hub_server import Cut, HubServer, point_client_at
from models.pico import build
from roundel.errors import SourceError
from roundel.io import hub_repository

MODEL = "org/tiny"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return build("llama", tmp_path / "local", shards=5, num_hidden_layers=8)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, local: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        point_client_at(server, monkeypatch, tmp_path)
        monkeypatch.setattr(hub_repository, "_WAITS", (0.01,) * 4)
        server.add(MODEL, {p.name: p.read_bytes() for p in local.iterdir()})
        yield server


def digests(folder: Path) -> dict[str, str]:
    """Weights alone: cards and reports name the source, which differs."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}


def shard_bytes(local: Path) -> int:
    return sum(p.stat().st_size for p in local.glob("*.safetensors"))


def test_planning_fetches_no_weights(hub: HubServer) -> None:
    plan = roundel.plan(MODEL, scheme="W4A16G32")
    assert plan.source_name == MODEL
    assert hub.sent() < 20_000  # headers


@pytest.mark.parametrize("workers", [1, 3])
def test_the_disk_holds_few_shards_at_a_time(hub: HubServer, local: Path, tmp_path: Path, workers: int) -> None:
    held: list[int] = []
    work = tmp_path / "o.download"

    def look(*_: object) -> None:
        sizes = []
        for path in work.rglob("*.safetensors"):
            if "header" not in path.parts:
                with suppress(FileNotFoundError):  # another worker, or the download, may just have moved it
                    sizes.append(path.stat().st_size)
        held.append(sum(sizes))

    roundel.quantize(MODEL, tmp_path / "o", scheme="W4A16G32", workers=workers, progress=look)
    roundel.quantize(local, tmp_path / "l", scheme="W4A16G32")
    assert digests(tmp_path / "o") == digests(tmp_path / "l")
    largest = max(p.stat().st_size for p in local.glob("*.safetensors"))
    assert max(held) <= (2 + workers) * largest
    assert max(held) < shard_bytes(local) or workers > 1
    assert not work.exists(), "nothing that was fetched is left"
    assert hub.sent() < 1.2 * shard_bytes(local), "no shard was fetched twice"


def test_a_cut_connection_is_survived(hub: HubServer, local: Path, tmp_path: Path) -> None:
    hub.cuts["model-00002-of-00005.safetensors"] = Cut(after=5000, times=2)
    roundel.quantize(MODEL, tmp_path / "o", scheme="W4A16G32")
    roundel.quantize(local, tmp_path / "l", scheme="W4A16G32")
    assert digests(tmp_path / "o") == digests(tmp_path / "l")


def test_a_lost_hub_keeps_what_is_done_and_the_same_call_continues(hub: HubServer, local: Path, tmp_path: Path) -> None:
    hub.cuts["model-00004-of-00005.safetensors"] = Cut(after=4000, times=10_000)  # more than a header
    with pytest.raises(SourceError):
        roundel.quantize(MODEL, tmp_path / "o", scheme="W4A16G32", workers=1)
    assert not (tmp_path / "o" / "config.json").exists()
    hub.cuts.clear()
    report = roundel.quantize(MODEL, tmp_path / "o", scheme="W4A16G32")
    assert report.resumed > 0
    roundel.quantize(local, tmp_path / "l", scheme="W4A16G32")
    assert digests(tmp_path / "o") == digests(tmp_path / "l")
