"""HubSnapshot with the real client against a Hub on loopback: what is fetched when, and what survives."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hub_server import LIMIT, Cut, Hold, HubServer, point_client_at
from roundel.errors import SourceError
from roundel.io import hub_repository
from roundel.io.hub import HubSnapshot

MODEL = "org/model"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def shard(seed: int, weight_bytes: int = 200_000) -> bytes:
    header = json.dumps({f"w{seed}": {"dtype": "U8", "shape": [weight_bytes], "data_offsets": [0, weight_bytes]}})
    return len(header).to_bytes(8, "little") + header.encode() + random.Random(seed).randbytes(weight_bytes)


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "empty.txt": b"",
    "tokenizer.json": b"{}" * 500,
    "additional_chat_templates/tool.jinja": b"{{ x }}",
    "model.safetensors.index.json": json.dumps({"weight_map": {"w1": FIRST, "w2": SECOND}}).encode(),
    "figures/curve.png": b"png",
    "pytorch_model.bin": b"pickle",
    FIRST: shard(1),
    SECOND: shard(2),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        point_client_at(server, monkeypatch, tmp_path)
        monkeypatch.setattr(hub_repository, "_WAITS", (0.01,) * 4)
        server.add(MODEL, FILES)
        yield server


@pytest.fixture
def snapshot(hub: HubServer, tmp_path: Path) -> Iterator[HubSnapshot]:
    opened = HubSnapshot(MODEL, None, tmp_path / "hub")
    yield opened
    opened.close()


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors") if "header" not in path.parts)


def wait_for(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(LIMIT / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("waited in vain")


def test_opening_brings_small_files_and_no_weights(hub: HubServer, snapshot: HubSnapshot, tmp_path: Path) -> None:
    assert snapshot.commit == hub.branches[MODEL]["main"]
    assert snapshot.files == {name: len(data) for name, data in FILES.items()}
    for name in ("config.json", "empty.txt", "tokenizer.json", "additional_chat_templates/tool.jinja"):
        assert (tmp_path / "hub" / name).read_bytes() == FILES[name]
    assert not (tmp_path / "hub" / "pytorch_model.bin").exists()
    assert hub.sent() == hub.sent(".bin") == hub.sent(".png") == 0


def test_tree_of_several_pages_is_listed_whole(hub: HubServer, tmp_path: Path) -> None:
    hub.page = 3
    assert HubSnapshot(MODEL, "main", tmp_path / "hub").files == {name: len(data) for name, data in FILES.items()}


def test_header_is_read_by_range_without_a_byte_of_weights(hub: HubServer, snapshot: HubSnapshot) -> None:
    length = 8 + int.from_bytes(FILES[FIRST][:8], "little")
    assert snapshot.header(FIRST) == FILES[FIRST][:length]
    assert [request.range for request in hub.asked(FIRST)] == ["bytes=0-7", f"bytes=8-{length - 1}"]
    assert hub.sent() == length
    assert snapshot.header(FIRST) == FILES[FIRST][:length]
    assert hub.sent() == length  # kept


def test_header_of_a_whole_file_is_read_from_disk(hub: HubServer, snapshot: HubSnapshot) -> None:
    snapshot.fetch(FIRST)
    before = len(hub.requests)
    assert FILES[FIRST].startswith(snapshot.header(FIRST))
    assert len(hub.requests) == before


@pytest.mark.parametrize(
    "data",
    [b"", b"short", (1 << 40).to_bytes(8, "little") + b"{}", (3).to_bytes(8, "little") + b"{}"],
    ids=["empty", "seven", "giant", "beyond"],
)
def test_header_that_does_not_fit_is_refused(hub: HubServer, tmp_path: Path, data: bytes) -> None:
    hub.add("org/broken", {"model.safetensors": data})
    with pytest.raises(SourceError, match=r"not a safetensors file"):
        HubSnapshot("org/broken", None, tmp_path / "hub").header("model.safetensors")


def test_fetch_then_drop_frees_the_disk(hub: HubServer, snapshot: HubSnapshot, tmp_path: Path) -> None:
    path = snapshot.fetch(FIRST)
    assert path.read_bytes() == FILES[FIRST]
    assert snapshot.fetch(FIRST) == path
    assert len(hub.asked(FIRST)) == 1
    snapshot.drop(FIRST)
    assert disk_bytes(tmp_path) == 0
    assert snapshot.fetch(FIRST).read_bytes() == FILES[FIRST]
    snapshot.drop(FIRST)
    snapshot.drop(FIRST)  # twice is once


def test_files_elsewhere_in_the_repository_come_when_asked(hub: HubServer, snapshot: HubSnapshot) -> None:
    assert snapshot.fetch("figures/curve.png").read_bytes() == b"png"


def test_large_files_come_in_several_requests(
    hub: HubServer, snapshot: HubSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_repository, "_PART_BYTES", 64_000)
    assert snapshot.fetch(FIRST).read_bytes() == FILES[FIRST]
    assert len(hub.asked(FIRST)) == 4


def test_bytes_are_reported_as_they_arrive(hub: HubServer, tmp_path: Path) -> None:
    arrived = dict.fromkeys(FILES, 0)

    def count(name: str, size: int) -> None:
        arrived[name] += size

    snapshot = HubSnapshot(MODEL, None, tmp_path / "hub", on_bytes=count)
    snapshot.fetch(FIRST)
    assert arrived[FIRST] == len(FILES[FIRST])
    assert arrived["config.json"] == len(FILES["config.json"])
    assert arrived[SECOND] == 0


def test_prefetch_runs_beside_the_present_shard_and_is_joined(hub: HubServer, snapshot: HubSnapshot) -> None:
    hold = hub.holds[SECOND] = Hold(after=50_000)
    snapshot.prefetch(SECOND)
    assert hold.reached.wait(LIMIT)
    assert snapshot.fetch(FIRST).read_bytes() == FILES[FIRST]  # not behind the held one
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(snapshot.fetch, SECOND)
        assert not joined.done()
        hold.released.set()
        assert joined.result(LIMIT).read_bytes() == FILES[SECOND]
    assert len(hub.asked(SECOND)) == 1
    snapshot.drop(FIRST)
    snapshot.prefetch(FIRST)  # the last one is over: this one starts
    wait_for(lambda: len(hub.asked(FIRST)) == 2)


def test_one_prefetch_at_a_time(hub: HubServer, snapshot: HubSnapshot) -> None:
    hold = hub.holds[SECOND] = Hold(after=1)
    snapshot.prefetch(SECOND)
    assert hold.reached.wait(LIMIT)
    snapshot.prefetch(FIRST)
    snapshot.prefetch(SECOND)
    hold.released.set()
    snapshot.fetch(SECOND)
    assert len(hub.asked(FIRST)) == 0
    assert len(hub.asked(SECOND)) == 1


def test_drop_stops_a_prefetch_and_leaves_nothing(hub: HubServer, snapshot: HubSnapshot, tmp_path: Path) -> None:
    hold = hub.holds[SECOND] = Hold(after=50_000)
    snapshot.prefetch(SECOND)
    assert hold.reached.wait(LIMIT)
    threading.Timer(0.05, hold.released.set).start()
    snapshot.drop(SECOND)
    assert disk_bytes(tmp_path) == 0


def test_close_stops_a_prefetch_which_is_then_taken_up(hub: HubServer, snapshot: HubSnapshot, tmp_path: Path) -> None:
    hub.pauses[SECOND] = 0.01
    snapshot.prefetch(SECOND)
    wait_for(lambda: hub.sent() > 20_000)
    snapshot.close()
    hub.pauses.clear()
    partial = disk_bytes(tmp_path)
    assert 0 < partial < len(FILES[SECOND])
    snapshot.prefetch(SECOND)  # nothing starts any more
    again = HubSnapshot(MODEL, None, tmp_path / "hub")
    assert again.fetch(SECOND).read_bytes() == FILES[SECOND]
    assert hub.asked(SECOND)[1].range == f"bytes={partial}-{len(FILES[SECOND]) - 1}"
    assert len(hub.asked(SECOND)) == 2


def test_many_threads_share_one_download(hub: HubServer, snapshot: HubSnapshot) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(snapshot.fetch, [FIRST] * 16))
    assert len(paths) == len(hub.asked(FIRST)) == 1


def test_cut_connection_is_taken_up_where_it_broke(hub: HubServer, snapshot: HubSnapshot) -> None:
    hub.cuts[FIRST] = Cut(after=60_000, times=3)
    assert snapshot.fetch(FIRST).read_bytes() == FILES[FIRST]
    last = len(FILES[FIRST]) - 1
    assert [request.range for request in hub.asked(FIRST)] == [f"bytes={60_000 * i}-{last}" for i in range(4)]


def test_cut_header_is_read_again(hub: HubServer, snapshot: HubSnapshot) -> None:
    hub.cuts[FIRST] = Cut(after=5, times=2)
    assert FILES[FIRST].startswith(snapshot.header(FIRST))


def test_busy_server_is_waited_for(hub: HubServer, snapshot: HubSnapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.busy[FIRST] = 3
    assert snapshot.fetch(FIRST).read_bytes() == FILES[FIRST]
    snapshot.drop(FIRST)
    hub.busy[FIRST] = 100
    with pytest.raises(SourceError, match=r"The Hub answers 503 \(Busy\)\. Run again later"):
        snapshot.fetch(FIRST)


def test_server_without_ranges_still_serves(hub: HubServer, snapshot: HubSnapshot) -> None:
    hub.ranges = False
    hub.cuts[FIRST] = Cut(after=60_000, times=1)
    assert FILES[FIRST].startswith(snapshot.header(FIRST))
    assert snapshot.fetch(FIRST).read_bytes() == FILES[FIRST]


def test_retries_are_bounded_and_the_next_run_resumes(hub: HubServer, snapshot: HubSnapshot, tmp_path: Path) -> None:
    hub.cuts[FIRST] = Cut(after=1_000, times=100)
    with pytest.raises(SourceError, match=r"no connection to http://127.0.0.1:\d+, or it broke .*Run again"):
        snapshot.fetch(FIRST)
    assert len(hub.asked(FIRST)) == 5
    hub.cuts.clear()
    assert HubSnapshot(MODEL, None, tmp_path / "hub").fetch(FIRST).read_bytes() == FILES[FIRST]
    assert hub.asked(FIRST)[-1].range == f"bytes=5000-{len(FILES[FIRST]) - 1}"


def test_failed_prefetch_is_tried_again_by_fetch(hub: HubServer, snapshot: HubSnapshot) -> None:
    hub.cuts[FIRST] = Cut(after=0, times=5)
    snapshot.prefetch(FIRST)
    assert snapshot.fetch(FIRST).read_bytes() == FILES[FIRST]


def test_killed_process_leaves_a_resumable_download(hub: HubServer, tmp_path: Path) -> None:
    hold = hub.holds[FIRST] = Hold(after=150_000)
    script = "import sys, pathlib; from roundel.io.hub import HubSnapshot\n"
    script += f"HubSnapshot({MODEL!r}, None, pathlib.Path(sys.argv[1])).fetch({FIRST!r})"
    source = str(Path(hub_repository.__file__).parents[2])
    settings = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": source}
    command = [sys.executable, "-c", script, str(tmp_path / "hub")]
    process = subprocess.Popen(command, env={**os.environ, **settings})
    try:
        assert hold.reached.wait(LIMIT)
        wait_for(lambda: disk_bytes(tmp_path) > 0)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(LIMIT)
    hub.holds.clear()
    hold.released.set()
    assert not (tmp_path / "hub" / FIRST).exists()
    partial = disk_bytes(tmp_path)
    assert HubSnapshot(MODEL, None, tmp_path / "hub").fetch(FIRST).read_bytes() == FILES[FIRST]
    assert hub.asked(FIRST)[-1].range == f"bytes={partial}-{len(FILES[FIRST]) - 1}"


def test_damaged_bytes_are_refused_and_deleted(hub: HubServer, tmp_path: Path) -> None:
    hub.damaged.add(FIRST)
    snapshot = HubSnapshot(MODEL, None, tmp_path / "hub")
    with pytest.raises(SourceError, match="arrived damaged"):
        snapshot.fetch(FIRST)
    assert disk_bytes(tmp_path) == 0


def test_full_disk(hub: HubServer, snapshot: HubSnapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 99, 99))
    with pytest.raises(SourceError, match=r"disk is full .* Free space and run again"):
        snapshot.fetch(FIRST)
    assert hub.sent() == 0


def test_users_cache_is_used_and_never_deleted(hub: HubServer, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    for name in (FIRST, "config.json"):
        hf_hub_download(MODEL, name, endpoint=hub.url)
    before = len(hub.requests)
    snapshot = HubSnapshot(MODEL, None, tmp_path / "hub")
    assert FILES[FIRST].startswith(snapshot.header(FIRST))
    snapshot.prefetch(FIRST)
    path = snapshot.fetch(FIRST)
    assert path.is_relative_to(tmp_path / "cache")
    assert not any(request.name in (FIRST, "config.json") for request in hub.requests[before:])
    assert (tmp_path / "hub" / "config.json").read_bytes() == FILES["config.json"]
    snapshot.drop(FIRST)
    assert path.read_bytes() == FILES[FIRST]


def test_revision_is_pinned_when_the_folder_is_first_opened(hub: HubServer, tmp_path: Path) -> None:
    snapshot = HubSnapshot(MODEL, "main", tmp_path / "hub")
    hub.add(MODEL, {**FILES, FIRST: shard(7)})
    assert snapshot.fetch(FIRST).read_bytes() == FILES[FIRST]
    before = len(hub.requests)
    again = HubSnapshot(MODEL, "main", tmp_path / "hub")
    assert (again.commit, again.files) == (snapshot.commit, snapshot.files)
    assert HubSnapshot(MODEL, snapshot.commit, tmp_path / "hub").commit == snapshot.commit
    assert len(hub.requests) == before
    assert HubSnapshot(MODEL, "main", tmp_path / "new").fetch(FIRST).read_bytes() == shard(7)


def test_folder_of_another_model_is_refused(hub: HubServer, snapshot: HubSnapshot, tmp_path: Path) -> None:
    hub.add("org/other", FILES)
    with pytest.raises(SourceError, match="would mix with them"):
        HubSnapshot("org/other", None, tmp_path / "hub")


def test_gated_model_tells_where_to_ask(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add(MODEL)
    hub.tokens.add("hf_good")
    remedy = rf"Accept the licence at {hub.url}/{MODEL}, then run `hf auth login`"
    with pytest.raises(SourceError, match=rf"gated and the Hub answers 401.*{remedy}"):
        HubSnapshot(MODEL, None, tmp_path / "hub")
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    with pytest.raises(SourceError, match=rf"gated and the Hub answers 403.*{remedy}"):
        HubSnapshot(MODEL, None, tmp_path / "hub")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert HubSnapshot(MODEL, None, tmp_path / "hub").fetch(FIRST).read_bytes() == FILES[FIRST]
    assert {request.token for request in hub.asked(FIRST)} == {""}  # the token stays with the Hub


@pytest.mark.parametrize(
    ("repo_id", "revision", "message"),
    [
        ("org/absent", None, "there is no such model .*hf auth login.*local folder"),
        (MODEL, "v9", "at v9: .*no such revision .*Pass a branch, tag or commit"),
        ("not/a/hub/id", None, "Pass a Hub id as `org/name`, or a local folder"),
    ],
)
def test_what_is_not_there(hub: HubServer, tmp_path: Path, repo_id: str, revision: str | None, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        HubSnapshot(repo_id, revision, tmp_path / "hub")


def test_file_that_is_not_listed(snapshot: HubSnapshot) -> None:
    for use in (snapshot.fetch, snapshot.header, snapshot.prefetch, snapshot.drop):
        with pytest.raises(SourceError, match=r"no file absent\.safetensors"):
            use("absent.safetensors")


def test_no_safetensors(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/pickle", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(SourceError, match=r"no safetensors files.*pytorch_model\.bin"):
        HubSnapshot("org/pickle", None, tmp_path / "hub")


@pytest.mark.parametrize(
    "name", ["../x.json", "/x.json", "a/../../x.json", "a//x.json", "C:\\x.json", "..\\x.json", ".hub/snapshot.json"]
)
def test_paths_that_leave_the_folder_are_refused(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.add("org/hostile", {**FILES, name: b"{}"})
    with pytest.raises(SourceError, match="leaves the download folder"):
        HubSnapshot("org/hostile", None, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_no_connection(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(SourceError, match=r"no connection to .*HF_HUB_OFFLINE=1.*local folder"):
        HubSnapshot(MODEL, None, tmp_path / "hub")


def test_offline_reads_the_users_cache_and_nothing_else(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match=r"HF_HUB_OFFLINE is set and the local cache.*hf download org/model"):
        HubSnapshot(MODEL, None, tmp_path / "hub")
    for name in (FIRST, "config.json"):
        hf_hub_download(MODEL, name, endpoint=hub.url)
    before = len(hub.requests)
    snapshot = HubSnapshot(MODEL, None, tmp_path / "hub")
    assert snapshot.commit == hub.branches[MODEL]["main"]
    assert snapshot.fetch(FIRST).read_bytes() == FILES[FIRST]
    with pytest.raises(SourceError, match=r"not in the local cache, and HF_HUB_OFFLINE is set"):
        snapshot.fetch(SECOND)
    assert len(hub.requests) == before


def test_offline_in_mid_run(snapshot: HubSnapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set"):
        snapshot.fetch(FIRST)


def test_import_is_cheap() -> None:
    script = "import sys, roundel.io.hub; sys.exit('huggingface_hub' in sys.modules)"
    settings = {"PYTHONPATH": str(Path(hub_repository.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", script], env={**os.environ, **settings}, timeout=LIMIT).returncode == 0
