"""The report as one HTML page that needs nothing else: beside report.json, to be read offline.

Style and script come from data/page.css and data/page.js and stand in the page; its policy forbids the browser to fetch
anything or to run another script.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path

from roundel import __version__
from roundel.card import command_of, size
from roundel.page.figures import costs_of_units, plots
from roundel.page.findings import Cost, Findings, counted, decibel, duration, fallbacks
from roundel.page.tables import kept_table, layer_table, remarks_table
from roundel.recipe import Recipe
from roundel.report import Report, Row

__all__ = ["PAGE", "document", "page"]

PAGE = "report.html"
NAMED = 6  # layers named for each note
_DATA = Path(__file__).resolve().parents[1] / "data"


def page(report: Report, output: int, costs: Mapping[str, Cost] | None = None) -> str:
    """The page of one format. costs: as `read_costs` finds them."""
    plan, told = report.plan, Findings(report, report.plan.outputs[output], costs or {})
    title = f"{plan.source_name}, {plan.recipe.label}"
    body = "".join(
        (
            f"<h1>{escape(title)}</h1>\n<p class=sub>{_made(plan.recipe)} by roundel "
            f"{escape(__version__)}, stored as {escape(told.output.format.name)}.</p>\n",
            _tiles(told),
            _notes(told),
            _facts(told),
            plots(told),
            costs_of_units(told),
            layer_table(told),
            kept_table(plan),
            remarks_table(report),
        )
    )
    return document(title, body)


def _made(recipe: Recipe) -> str:
    return "Converted" if recipe.conversion else f"Rounded with {escape(recipe.algorithm)}"


def document(title: str, body: str) -> str:
    """A page that needs nothing else. title: as text; body: as HTML."""
    style, script = ((_DATA / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>\n{style}</style></head>\n<body><main>\n{body}</main>\n<script>{script}</script></body></html>\n"
    )


def _tiles(told: Findings) -> str:
    """The numbers to take away; those that call for a look stand out."""
    report, plan = told.report, told.report.plan
    found: list[tuple[str, str, bool]] = []
    stored = sum(told.bits[name] * layer.parameters for name, layer in told.layers.items())
    found.append((f"{stored / max(1, plan.parameters):.3f}", "bits per rounded weight", False))
    share = told.output.nbytes / max(1, plan.source_bytes)
    found.append((size(told.output.nbytes), f"{share:.0%} of the source's {size(plan.source_bytes)}", False))
    found.append((decibel(report.mean_sqnr), "signal to noise, mean over layers", False))
    if report.worst is not None:
        found.append((decibel(report.worst.sqnr), f"lowest: {report.worst.name}", False))
    if told.relative:
        mean = sum(told.relative.values()) / len(told.relative)
        found.append((f"{mean:.3f}", "mean error, plain rounding is 1", mean > 1))
    count = len(fallbacks(report))
    found.append((str(count), "layer fell back" if count == 1 else "layers fell back", count > 0))
    found.append((duration(report.seconds), "time of the last run" if report.resumed else "time", False))
    memory = [cost.peak_memory for cost in told.costs.values() if cost.peak_memory is not None]
    if memory:
        found.append((size(max(memory)), "peak memory", False))
    tiles = (
        f'<div class="tile{" warn" if warn else ""}"><b>{escape(value)}</b><span>{escape(name)}</span></div>\n'
        for value, name, warn in found
    )
    return f'<div class="tiles">\n{"".join(tiles)}</div>\n'


def _notes(told: Findings) -> str:
    """Everything the reader should not miss. Notes that differ in their numbers alone share a line."""
    alike: dict[str, list[Row]] = {}
    for row in fallbacks(told.report):
        alike.setdefault(re.sub(r"\d[\d.,e+-]*", "#", row.note or ""), []).append(row)
    found = list(told.report.plan.notes)
    for pattern, rows in alike.items():
        note = rows[0].note if len({row.note for row in rows}) == 1 else pattern
        found.append(f"{_some([row.name for row in rows])}: {note}")
    worse = [name for name, value in told.relative.items() if value > 1]
    if worse:
        found.append(f"error above plain rounding's: {_some(worse)}")
    if not found:
        return ""
    items = "".join(f"<li>{escape(note)}\n" for note in found)
    return f'<section class="notes"><h2>To know</h2><ul>\n{items}</ul></section>\n'


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _facts(told: Findings) -> str:
    """What was made, of what, and how."""
    plan, recipe = told.report.plan, told.report.plan.recipe
    steps = []
    for step in recipe.chain.steps:
        options = ", ".join(f"{f.name} {getattr(step, f.name)}" for f in fields(step))  # type: ignore[arg-type]
        steps.append(f"{step.name} ({options})" if options else step.name)
    found = [
        ("source", plan.source_name + (f" at {plan.source_revision}" if plan.source_revision else "")),
        ("family", plan.family),
        ("scheme", ", ".join(counted(layer.scheme.name for layer in plan.layers))),
        ("algorithm", ", then ".join(steps)),
    ]
    if recipe.reads_activations:
        text = f"{recipe.dataset}: {recipe.nsamples} samples of {recipe.seqlen} tokens asked for, seed {recipe.seed}"
        found.append(("calibration", text + (f"; tokens' sha256 {plan.calibration}" if plan.calibration else "")))
    files = ", ".join(f"{shard.name} ({size(shard.nbytes)})" for shard in told.output.shards)
    found += [
        ("format", f"{told.output.format.name}: {told.output.format.summary}"),
        ("files", files),
        ("weights", f"{plan.parameters:,} rounded, in {len(plan.layers)} layers".replace(",", " ")),
        ("kept", "; ".join(counted(kept.reason for kept in plan.kept)) or "no matrix"),
    ]
    if told.report.resumed:
        found.append(("continued", f"{told.report.resumed} of {len(plan.works)} pieces were done by an earlier run"))
    found.append(("fingerprint", plan.fingerprint))
    rows = "".join(f"<tr><th>{escape(name)}<td>{escape(value)}\n" for name, value in found)
    command = command_of(recipe, plan.source_name, revision=plan.source_revision)
    return f'<h2>What was made</h2>\n<table class="facts">\n{rows}</table>\n<pre>{escape(command)}</pre>\n'
