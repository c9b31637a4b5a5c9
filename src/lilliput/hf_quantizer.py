"""Loads an artifact inside transformers: a registered quantization config whose quantizer replays the edits."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class LilliputConfig(QuantizationConfigMixin):
    """What `config.json` of an artifact says under `quantization_config`."""

    def __init__(self, version: int = 1, **kwargs: Any):
        self.quant_method = "lilliput"  # type: ignore[assignment]
        self.version = version


class LilliputQuantizer(HfQuantizer):
    """Replays the edits before the weights are loaded and shares tied tensors afterwards."""

    requires_calibration = True

    def _folder(self, model) -> Path:
        return Path(model.config._name_or_path or model.name_or_path)

    def _process_model_before_weight_loading(self, model, **kwargs):
        from lilliput.artifact import read_architecture
        from lilliput.edits import replay

        architecture = read_architecture(self._folder(model))
        replay(model, architecture["edits"])
        model._keys_to_ignore_on_load_missing = _patterns(
            model._keys_to_ignore_on_load_missing, architecture["aliases"]
        )
        buffers = [name for name, _ in model.named_buffers()]
        model._keys_to_ignore_on_load_unexpected = _patterns(model._keys_to_ignore_on_load_unexpected, buffers)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        from lilliput.artifact import assign_tensors_, read_architecture

        folder = self._folder(model)
        assign_tensors_(model, folder, read_architecture(folder)["aliases"], any_dtype=True)
        return model

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, *args, **kwargs) -> bool:
        return False


def _patterns(known: Iterable[str] | None, names: Iterable[str]) -> set[str]:
    return set(known or ()) | {re.escape(name) for name in names}


def register() -> None:
    """Tell transformers about the quantization method `lilliput` (once)."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if "lilliput" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("lilliput")(LilliputConfig)
        register_quantizer("lilliput")(LilliputQuantizer)
