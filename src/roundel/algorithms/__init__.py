"""Weights -> codes; one file for each algorithm."""

from __future__ import annotations

from roundel.algorithms.algorithm import Algorithm, Rounded
from roundel.algorithms.gptq import Gptq
from roundel.algorithms.hqq import Hqq
from roundel.algorithms.opt_rtn import OptRtn
from roundel.algorithms.rtn import Rtn
from roundel.algorithms.signround import SignRound
from roundel.errors import RecipeError, nearest

__all__ = ["ALGORITHMS", "Algorithm", "Gptq", "Hqq", "OptRtn", "Rounded", "Rtn", "SignRound", "algorithm_named"]

ALGORITHMS: dict[str, Algorithm] = {a.name: a for a in (Rtn(), Gptq(), OptRtn(), Hqq(), SignRound())}


def algorithm_named(name: str) -> Algorithm:
    """An algorithm with its default hyperparameters. Raises RecipeError with the nearest known name."""
    if name not in ALGORITHMS:
        raise RecipeError(f"Unknown algorithm {name!r}.{nearest(name, ALGORITHMS)} Known are {', '.join(ALGORITHMS)}.")
    return ALGORITHMS[name]
