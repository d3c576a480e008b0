"""`roundel verify`."""

from __future__ import annotations

import click

__all__ = ["verify"]


@click.command(short_help="Read a written checkpoint back and compare it with its source.")
@click.argument("out", type=click.Path())
@click.option(
    "--against", metavar="SOURCE", help="The model it was made from: adds signal to noise, and checks what was kept."
)
@click.option("--all", "show_all", is_flag=True, help="Show every layer, not one row for each kind.")
def verify(out: str, against: str | None, show_all: bool) -> None:
    """Read every packed weight of OUT back. Exit code 0 when all is well, 7 when something is missing, not finite or
    changed.

    \b
    Examples:
      roundel verify ./out
      roundel verify ./out --against ./model
    """
    from rich.markup import escape
    from rich.status import Status

    from roundel.cli.show import console, decibel, folded, table
    from roundel.errors import VerificationError
    from roundel.verification import verify as run

    with Status("reading", console=console) as status:
        found = run(out, against, progress=lambda name: status.update(f"reading {escape(name)}"))
    packed = [c for c in found.checks if c.scheme not in ("BF16", "F16", "F32")]
    shown = table("layer", "count", "scheme", "lowest signal to noise" if not show_all else "signal to noise")
    if show_all:
        for check in packed:
            shown.add_row(escape(check.name), "1", check.scheme, decibel(check.sqnr))
    else:
        lowest: dict[tuple[str, ...], float] = {}
        for check in packed:
            key = (folded([(check.name,)])[0][0], check.scheme)
            if check.sqnr is not None:
                lowest[key] = min(lowest.get(key, check.sqnr), check.sqnr)
        for pattern, count, (scheme,) in folded((c.name, c.scheme) for c in packed):
            shown.add_row(escape(pattern), str(count), scheme, decibel(lowest.get((pattern, scheme))))
    console.print(shown)
    if found.problems:
        lines = "\n".join(f"  - {p}" for p in found.problems[:20])
        more = f"\n  and {len(found.problems) - 20} more" if len(found.problems) > 20 else ""
        raise VerificationError(
            f"{found.name} does not hold what it should:\n{lines}{more}\nQuantize again with --overwrite, or copy "
            f"the files again."
        )
    mean = found.mean_sqnr
    quality = f", signal to noise {decibel(mean)} on average against {found.against}" if mean is not None else ""
    if mean is not None and found.rescaled:
        quality += ", whose weights a transform rescaled: no measure of quality"
    console.print(
        f"[green]ok[/] {escape(found.name)}: {len(packed)} layers and {len(found.checks) - len(packed)} other tensors "
        f"are whole and finite{escape(quality)}"
    )
