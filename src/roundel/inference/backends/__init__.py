"""One file for each backend; which one runs a layer is decided here."""

from __future__ import annotations

from roundel.errors import BackendError, RecipeError, nearest
from roundel.inference.backends.ark import Ark
from roundel.inference.backends.backend import Backend
from roundel.inference.backends.exllamav2 import Exllamav2
from roundel.inference.backends.marlin import Marlin
from roundel.inference.backends.numba import Numba
from roundel.inference.backends.torch import Torch
from roundel.inference.backends.triton import Triton
from roundel.unit import Layer

__all__ = ["BACKENDS", "Backend", "better_but_absent", "choose"]

BACKENDS: dict[str, Backend] = {b.name: b for b in (Torch(), Ark(), Numba(), Exllamav2(), Triton(), Marlin())}


def choose(layer: Layer, device: str, wanted: str | None = None) -> Backend:
    """The backend of the highest priority that takes a layer on a device ("cpu", "cuda:0"), or the one that is wanted.

    Raises RecipeError for an unknown name, and BackendError with every backend's reason when none, or not the wanted
    one, takes it.
    """
    if wanted is not None and wanted not in BACKENDS:
        raise RecipeError(f"Unknown backend {wanted!r}.{nearest(wanted, BACKENDS)} Known are {', '.join(BACKENDS)}.")
    best_first = sorted(BACKENDS.values(), key=lambda b: -b.priority)
    reasons = {b.name: _reason(b, layer, device.partition(":")[0]) for b in best_first}
    taking = [name for name, reason in reasons.items() if reason is None]
    if wanted is None and taking:
        return BACKENDS[taking[0]]
    if wanted in taking:
        return BACKENDS[wanted]
    out, width = layer.shape
    this = f"{layer.name} [{out}, {width}] {layer.scheme.name} cannot be run on {device}"
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)
    if wanted is None:
        raise BackendError(f"{this}: {told}. Load the checkpoint on another device.")
    told = f"{wanted}: {reasons.pop(wanted)}. Of the others, {', '.join(taking) or 'none'} can"
    told += "".join(f"; {name}: {reason}" for name, reason in reasons.items() if reason is not None)
    raise BackendError(f"{this}: {told}. Leave backend out to have one chosen.")


def _reason(backend: Backend, layer: Layer, kind: str) -> str | None:
    """Why a backend cannot run a layer on a kind of device here, or None."""
    reason = backend.refuse(layer, kind)
    if reason is None and backend.needs is not None:
        return f"it is not installed ({backend.needs})"
    return reason


def better_but_absent(layer: Layer, device: str, chosen: Backend) -> Backend | None:
    """The backend that would be chosen in place of `chosen` if its package were installed, or None."""
    kind = device.partition(":")[0]
    absent = [
        b
        for b in BACKENDS.values()
        if b.priority > chosen.priority and b.needs is not None and b.refuse(layer, kind) is None
    ]
    return max(absent, key=lambda b: b.priority, default=None)
