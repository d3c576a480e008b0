"""Rows of a matrix shared out among threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch

__all__ = ["share_rows"]

WEIGHTS_A_THREAD = 1 << 18  # fewer are not worth a thread


def share_rows(work: Callable[[int, int], None], rows: int, width: int) -> None:
    """Run work(begin, end) over all rows, in as many threads as torch uses if there is enough of it."""
    threads = max(1, min(torch.get_num_threads(), rows * width // WEIGHTS_A_THREAD))
    if threads == 1:
        return work(0, rows)
    ends = [rows * i // threads for i in range(threads + 1)]
    first, *rest = pairwise(ends)
    waiting = [_pool(threads).submit(work, *part) for part in rest]
    work(*first)
    for each in waiting:
        each.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="rows")
