"""`roundel list`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from roundel.scheme import Grid, Scheme

__all__ = ["list_"]


@click.command("list", short_help="List schemes, formats, algorithms or families.")
@click.argument("what", type=click.Choice(["schemes", "formats", "algorithms", "families"]))
@click.option("--why", is_flag=True, help="With formats: why each refused cell is refused.")
@click.option("--markdown", is_flag=True, help="With formats: the support matrix as a Markdown table.")
def list_(what: str, why: bool, markdown: bool) -> None:
    """List what exists. The support matrix of `formats` is asked from the formats themselves.

    \b
    Examples:
      roundel list schemes
      roundel list formats --why
    """
    {"schemes": _schemes, "algorithms": _algorithms, "families": _families}.get(what, lambda: _formats(why, markdown))()


def _schemes() -> None:
    from roundel.cli.show import console, table
    from roundel.scheme import MIXES, PRESETS, describe_block

    shown = table("scheme", "weights", "block", "scale", "bits/weight (4096×4096)", "inputs at run time")
    for name, scheme in PRESETS.items():
        grid = scheme.weight
        shown.add_row(
            name,
            grid.element.name,
            describe_block(grid.block),
            _scale(grid.scale),
            f"{grid.bits_per_weight((4096, 4096)):.3f}",
            _inputs(scheme),
        )
    for mix in MIXES.values():
        shown.add_row(mix.name, f"{mix.experts} for routed experts, {mix.others} for the rest", "", "", "", "")
    console.print(shown)
    console.print(
        "Any W<bits>A16[G<group>][_ASYM|_HQQ] is a scheme too, such as W3A16G64_ASYM: 2 to 8 bits, with _HQQ (float16 "
        "zero points) 1 to 6 or 8. G-1 is one scale per row."
    )


def _inputs(scheme: Scheme) -> str:
    from roundel.scheme import describe_block

    if scheme.input is None:
        return "16 bits"
    block = describe_block(scheme.input.block).replace("channel", "token")
    ceiling = ", exponents rounded up" if scheme.input.exponent == "rceil" else ""
    return f"{scheme.input.element.name}, {block}{ceiling}{', scale stored' if scheme.stores_input_scale else ''}"


def _scale(scale: str | Grid) -> str:
    """`F16`, or `dynamic8 by 256 (F32)` for scales that are on a grid themselves."""
    if isinstance(scale, str):
        return scale
    block = f"by {scale.block[1]}" if scale.block[1] else "by tensor"
    return f"{scale.element.name} {block} ({_scale(scale.scale)})"


def _formats(why: bool, markdown: bool) -> None:
    from roundel.cli.show import console, table
    from roundel.formats import FORMATS
    from roundel.formats.gguf.mixtures import MIXTURES
    from roundel.support import NOT_LOADED, support_rows

    rows = support_rows()
    names = list(rows[0][1])
    marked = [(scheme, name, why) for (name, scheme), why in NOT_LOADED.items()]

    def cell(scheme: str, name: str, reason: str | None, otherwise: str) -> str:
        return otherwise if reason is not None else "(yes)" if (name, scheme) in NOT_LOADED else "yes"

    if markdown:
        click.echo("| scheme | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
        for scheme, cells in rows:
            click.echo(f"| {scheme} | " + " | ".join(cell(scheme, n, cells[n], "") for n in names) + " |")
        return
    shown = table("scheme", *names)
    for scheme, cells in rows:
        shown.add_row(scheme, *(cell(scheme, n, cells[n], (cells[n] or "") if why else "·") for n in names))
    console.print(shown)
    for scheme, name, reason in marked:
        console.print(f"(yes) {name}, {scheme}: stored and read back, but not seen to load elsewhere: {reason}")
    for format in FORMATS.values():
        console.print(f"{format.name}: {format.summary}")
    console.print(f"gguf:TYPE, where TYPE is one of {', '.join(MIXTURES)}")


def _algorithms() -> None:
    from roundel.algorithms import ALGORITHMS
    from roundel.cli.show import console

    for algorithm in ALGORITHMS.values():
        console.print(f"{algorithm.name}: {algorithm.summary} ({algorithm.paper})")


def _families() -> None:
    from roundel.cli.show import console
    from roundel.families import family_of, known_types

    for name in known_types():
        console.print(f"{name}: {family_of({'model_type': name}).name}")
    console.print("any other model_type: a guess by general rules, which the plan says")
