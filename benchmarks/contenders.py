"""Who is measured against whom by accuracy.py: the peers' ways, and which of ours answers to each.

A peer's way is a program in peers/, an environment under .peers/ (`make peers`), and what the tool is told besides the
scheme. Its settings are documented in its program, and recorded by it in what it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["GRIDS", "Duel", "Peer", "Scheme", "duels"]

GRIDS = ("sym", "asym")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Integers of `bits` bits, a scale (and a zero point, unless symmetric) for `group_size` consecutive inputs."""

    bits: int
    group_size: int
    symmetric: bool

    @classmethod
    def parse(cls, name: str, grid: str) -> Scheme:
        """From W2G64 and sym or asym."""
        bits, _, group_size = name.upper().removeprefix("W").partition("G")
        return cls(bits=int(bits), group_size=int(group_size), symmetric=grid == "sym")

    def __str__(self) -> str:
        return f"W{self.bits}G{self.group_size} {'sym' if self.symmetric else 'asym'}"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way of one tool.

    looks_at_data   False: the same for every seed
    grids           those that it has
    """

    name: str
    environment: str
    program: str
    options: Mapping[str, Any] = field(default_factory=dict)
    looks_at_data: bool = True
    grids: tuple[str, ...] = GRIDS


@dataclass(frozen=True, kw_only=True)
class Duel:
    """One of our ways, as options of `roundel quantize`, and the peers' ways that it has to equal.

    float_zeros   zero points are float16, as HQQ's files have them
    """

    algorithm: str
    options: tuple[str, ...] = ()
    float_zeros: bool = False
    looks_at_data: bool = True
    peers: tuple[Peer, ...]

    @property
    def name(self) -> str:
        return " ".join((self.algorithm, *self.options)) + (", float zeros" if self.float_zeros else "")


def _auto_round(name: str, looks_at_data: bool = True, grids: tuple[str, ...] = GRIDS, **options: Any) -> Peer:
    return Peer(
        name=f"auto-round {name}",
        environment="auto-round",
        program="auto_round_calibrated.py",
        options={"bf16": False} | options,
        looks_at_data=looks_at_data,
        grids=grids,
    )


def _gptqmodel(name: str, **options: Any) -> Peer:
    return Peer(name=f"GPTQModel {name}", environment="gptqmodel", program="gptqmodel_gptq.py", options=options)


def _llm_compressor(name: str, looks_at_data: bool = True, **options: Any) -> Peer:
    return Peer(
        name=f"llm-compressor {name}",
        environment="llmcompressor",
        program="llm_compressor_oneshot.py",
        options=options,
        looks_at_data=looks_at_data,
    )


def _hqq(name: str, **options: Any) -> Peer:
    return Peer(
        name=name,
        environment="hqq",
        program="hqq_solver.py",
        options=options,
        looks_at_data=False,
        grids=("asym",),
    )


def duels(iters: int) -> tuple[Duel, ...]:
    """All of them; `iters` steps of SignRound on both sides. Where auto-round has no optimized rounding, on asymmetric
    grids, it is the plain one that `--iters 0` gives there."""
    plain = _auto_round("RTN", iters=0, opt_rtn=False, looks_at_data=False)
    return (
        Duel(
            algorithm="rtn",
            looks_at_data=False,
            peers=(plain, _llm_compressor("RTN", modifier="rtn", looks_at_data=False)),
        ),
        *(
            Duel(
                algorithm="opt-rtn",
                options=options,
                peers=(
                    _auto_round("opt-RTN", iters=0, opt_rtn=True, grids=("sym",)),
                    _auto_round("opt-RTN, bfloat16", iters=0, opt_rtn=True, bf16=True, grids=("sym",)),
                    Peer(**{**vars(plain), "grids": ("asym",)}),
                ),
            )
            for options in (("--imatrix",), ("--imatrix", "--unbiased", "1"))
        ),
        Duel(
            algorithm="signround",
            options=("--iters", str(iters)),
            peers=(_auto_round(f"SignRound, {iters} iters", iters=iters),),
        ),
        Duel(
            algorithm="gptq",
            peers=(
                _gptqmodel("GPTQ, GAR (default)"),
                _gptqmodel("GPTQ, in order", act_group_aware=False),
                _gptqmodel("GPTQ, GAR, mse 2.4", mse=2.4),
                _llm_compressor("GPTQ, static order (default)", modifier="gptq"),
                _llm_compressor("GPTQ, in order", modifier="gptq", actorder=None),
            ),
        ),
        Duel(
            algorithm="gptq",
            options=("--act-order", "--format", "auto_gptq"),  # that one stores the group of each input
            peers=(_gptqmodel("GPTQ, act-order", desc_act=True),),
        ),
        Duel(
            algorithm="awq,rtn",
            peers=(_llm_compressor("AWQ + RTN", modifier="awq"),),
        ),
        Duel(
            algorithm="hqq",
            looks_at_data=False,
            peers=(_hqq("HQQ, rounded zeros", integer_zero=True),),
        ),
        Duel(
            algorithm="hqq",
            options=("--format", "hqq"),
            float_zeros=True,
            looks_at_data=False,
            peers=(_hqq("HQQ, float zeros (default)", integer_zero=False),),
        ),
    )
