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
    kind = device.partition(":")[0]
    asked = [BACKENDS[wanted]] if wanted else sorted(BACKENDS.values(), key=lambda b: -b.priority)
    reasons = {}
    for backend in asked:
        reason = backend.refuse(layer, kind)
        if reason is None and backend.needs is not None:
            reason = f"it is not installed ({backend.needs})"
        if reason is None:
            return backend
        reasons[backend.name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    out, width = layer.shape
    remedy = "Leave backend out to have one chosen." if wanted else "Load the checkpoint on another device."
    raise BackendError(f"{layer.name} [{out}, {width}] {layer.scheme.name} cannot be run on {device}: {told}. {remedy}")


def better_but_absent(layer: Layer, device: str, chosen: Backend) -> Backend | None:
    """The backend that would be chosen in place of `chosen` if its package were installed, or None."""
    kind = device.partition(":")[0]
    absent = [
        b
        for b in BACKENDS.values()
        if b.priority > chosen.priority and b.needs is not None and b.refuse(layer, kind) is None
    ]
    return max(absent, key=lambda b: b.priority, default=None)
