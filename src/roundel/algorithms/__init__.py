"""Weights -> codes; one file for each algorithm."""

from __future__ import annotations

from roundel.algorithms.algorithm import Algorithm, Rounded
from roundel.algorithms.gptq import Gptq
from roundel.algorithms.hqq import Hqq
from roundel.algorithms.opt_rtn import OptRtn
from roundel.algorithms.rtn import Rtn
from roundel.algorithms.signround import SignRound

__all__ = ["ALGORITHMS", "Algorithm", "Gptq", "Hqq", "OptRtn", "Rounded", "Rtn", "SignRound"]

ALGORITHMS: dict[str, Algorithm] = {a.name: a for a in (Rtn(), Gptq(), OptRtn(), Hqq(), SignRound())}
