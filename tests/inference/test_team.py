"""A team runs every row once, whoever asks, and leaves torch's threads as they were."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numba
import numpy as np
import pytest
import torch
from torch import nn

from roundel.inference.numba import team
from roundel.inference.numba.team import PART, pointer_to, share_parts, spare_processors

ENOUGH = 1 << 30  # weights, so that every thread is wanted


@numba.cfunc(PART, nogil=True)
def count_rows(given, begin, end):  # type: ignore[no-untyped-def]
    rows = numba.carray(pointer_to(numba.carray(pointer_to(given, np.int64), 2)[0], np.int64), end)
    for row in range(begin, end):
        rows[row] += 1


def counted(rows: int, times: int = 1) -> np.ndarray:
    found = np.zeros(rows, np.int64)
    given = np.array([found.ctypes.data, rows], np.int64)
    for _ in range(times):
        share_parts(count_rows.address, given, rows, ENOUGH)
    return found


@pytest.fixture(params=[1, 2, 3, 5])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 1000])
def test_every_row_is_run_once(threads: int, rows: int) -> None:
    assert (counted(rows, times=500) == 500).all()


def test_several_may_ask_at_once(threads: int) -> None:
    found: list[np.ndarray] = []
    callers = [threading.Thread(target=lambda: found.append(counted(64, times=500))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert len(found) == 4 and all((rows == 500).all() for rows in found)


def test_who_sleeps_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(team, "LOOKS", 1)
    monkeypatch.setattr(team, "_team", lambda threads, process: made)
    made = team._Team(3)
    try:
        assert (counted(64, times=2000) == 2000).all()
    finally:
        made._end()
    assert not any(helper.is_alive() for helper in made._helpers)


PROGRAM = """
import os, sys
import torch
torch.set_num_threads(3)
sys.path.insert(0, sys.argv[1])
from test_team import counted
assert (counted(64, times=100) == 100).all()
child = os.fork()
if child == 0:
    fine = bool((counted(64, times=100) == 100).all())
    os._exit(0 if fine else 1)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_has_a_team_of_its_own_and_the_program_ends() -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, os.path.dirname(__file__)]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


class Watched(nn.Module):
    """Says how many threads torch had."""

    def forward(self, input_ids: torch.Tensor) -> int:
        if input_ids.numel() == 3:
            raise ValueError("three")
        return torch.get_num_threads()


def test_torch_has_one_thread_for_a_token_and_all_for_a_prompt() -> None:
    model, before = Watched(), torch.get_num_threads()
    spare_processors(model)
    torch.set_num_threads(2)
    try:
        assert model(input_ids=torch.zeros((1, 1))) == 1 and torch.get_num_threads() == 2
        assert model(torch.zeros((1, 64))) == 2
        with pytest.raises(ValueError, match="three"):
            model(torch.zeros((1, 3)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
