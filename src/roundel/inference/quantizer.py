"""transformers' way of loading a checkpoint that is rounded, with roundel's reading and roundel's layers.

`from_pretrained` builds the model on the meta device, hands it to the quantizer, reads the files into it, and hands it
over again. Here it is handed out empty, so that nothing is read into it, and is filled at the end by `loading.fill`,
which takes each layer from its file to its place. See `registration.py` for when this is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from roundel.checkpoint import Checkpoint, open_checkpoint
from roundel.errors import BackendError
from roundel.inference.backends import Backend
from roundel.inference.kept import Kept
from roundel.inference.loading import chosen_backends, device_named, fill
from roundel.inference.room import check_room

__all__ = ["Packed"]

SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")


class Packed(Kept):
    """Loads a model for one device, its rounded layers packed, in the dtype that transformers was asked for.

    The config's `backend`, where it has one ("auto" aside), names the backend, as `load` takes it.
    Raises what `load` raises; BackendError also for a model that is to be spread over devices.
    """

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._checkpoint: Checkpoint | None = None
        self._backends: Mapping[str, Backend] = {}
        self._modules: dict[str, nn.Module] = {}
        self._attributes: dict[str, Any] = {}
        self._device, self._dtype = "cpu", torch.float32

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        """One device for everything; transformers' "auto" is the first accelerator, or the CPU."""
        if isinstance(device_map, str) and device_map in SPREADING:
            found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            return {"": torch.device("cpu" if found is None else f"{found.type}:0")}
        places = list(dict.fromkeys(map(str, device_map.values()))) if device_map else []
        if len(places) > 1 or "disk" in places:
            raise BackendError(
                f"device_map names {', '.join(places)}, and rounded layers are loaded for one device. Name one, such "
                "as device_map='cuda:0'."
            )
        return device_map

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        return []

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: Sequence[str] | None = None,
        device_map: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Any:
        if not checkpoint_files:
            raise BackendError("A rounded model is loaded from its files. Name its folder, not a state_dict.")
        place = next(iter(device_map.values())) if device_map else "cpu"
        self._device = device_named(f"cuda:{place}" if isinstance(place, int) else place)
        self._checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent)
        wanted = vars(self.quantization_config).get("backend") or "auto"
        self._backends = chosen_backends(self._checkpoint, self._device, None if wanted == "auto" else str(wanted))
        check_room(self._checkpoint, self._device, self._dtype)
        self._empty(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self._refill(model)
        assert self._checkpoint is not None
        try:
            fill(model, self._checkpoint, self._device, self._dtype, self._backends)
        finally:
            self._checkpoint.close()
            self._checkpoint, self._backends = None, {}
        model.config._experts_implementation = "eager"  # as in `empty_model`
        return model.eval()

    def _empty(self, model: Any) -> None:
        """Take a model's modules away, and what transformers says of them: it reads nothing into what is not there."""
        self._modules = dict(model._modules)
        names = ("all_tied_weights_keys", "_keys_to_ignore_on_load_unexpected")
        self._attributes = {name: vars(model)[name] for name in names}
        model._modules.clear()
        model.all_tied_weights_keys, model._keys_to_ignore_on_load_unexpected = {}, {"."}

    def _refill(self, model: Any) -> None:
        model._modules.update(self._modules)
        vars(model).update(self._attributes)
        self._modules, self._attributes = {}, {}
