"""What will happen, exactly, before the first weight is read: the contract between a recipe and a model.

A plan knows every output tensor's name, dtype, shape and file offset. So impossible wishes fail at once and all
together, files are written header first in any order, and resuming is a list of finished names.
"""

from roundel.planning.building import build_plan
from roundel.planning.plan import Copy, Kept, Output, Plan, Work

__all__ = ["Copy", "Kept", "Output", "Plan", "Work", "build_plan"]
