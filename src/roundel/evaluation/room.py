"""Whether an evaluation fits, known before a weight is read."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from roundel.calibrating import Offload
from roundel.errors import OutputError, PlanError
from roundel.evaluation.subject import Subject
from roundel.evaluation.text import Passage
from roundel.evaluation.travel import slab_bytes
from roundel.memory import free_memory
from roundel.planning.room import PART_TOKENS

__all__ = ["frontiers_in_memory"]

KEPT = 2  # of what a block's matrices are given and hand on, at once: attention holds scores beside it


def frontiers_in_memory(subjects: Sequence[Subject], passage: Passage, offload: Offload, scratch: Path) -> bool:
    """Whether states stay in memory.

    scratch   where they lie otherwise
    Raises PlanError when there is too little memory, OutputError when there is too little disk.
    """
    working, device = working_bytes(subjects, passage), subjects[0].device
    free, available = free_memory(), free_memory(device)
    states = sum(4 * passage.windows.numel() * subject.skeleton.hidden for subject in subjects)
    if working > available:
        raise PlanError(
            f"A block of these models takes about {_gb(working)} of memory to run, {_gb(available)} are free on "
            f"{device}. Free some, or use a shorter --window."
        )
    if device != "cpu":
        working = 0  # of the memory where states lie
    if offload == "ram" and working + states > free:
        raise PlanError(
            f"{len(passage.windows):,} windows take {_gb(states)} of memory between blocks, {_gb(working)} to run one, "
            f"and {_gb(free)} are free. Use --offload disk, or fewer windows with --limit."
        )
    if offload == "ram" or (offload == "auto" and working + states < free // 2):
        return True
    there = shutil.disk_usage(scratch).free
    if states > there:
        raise OutputError(
            f"{len(passage.windows):,} windows take {_gb(states)} on disk between blocks, {scratch.parent} has "
            f"{_gb(there)}. Set TMPDIR to a larger disk, or use fewer windows with --limit."
        )
    return False


def working_bytes(subjects: Sequence[Subject], passage: Passage) -> int:
    """Memory that is needed beside the states: the largest block and what is computed in it, or the heads."""
    largest = 0
    for subject in subjects:
        for block in subject.skeleton.blocks:
            largest = max(largest, subject.held_bytes(block) + _activations(subject, block.tensors, passage.length))
    return max(largest, slab_bytes(subjects))


def _activations(subject: Subject, tensors: Sequence[str], length: int) -> int:
    """Of the tokens that run at once. Experts see their share of tokens, and are left out."""
    shapes = [subject.checkpoint.shape(name) for name in tensors if ".experts." not in name]
    width = sum(sum(shape) for shape in shapes if len(shape) == 2)
    return 4 * max(PART_TOKENS, length) * width // KEPT


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
