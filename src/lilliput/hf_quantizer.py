"""Loads an artifact inside transformers: a registered quantization config whose quantizer replays the artifact's edits."""

from __future__ import annotations

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

        replay(model, read_architecture(self._folder(model))["edits"])
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        from lilliput.artifact import assign_tensors_, read_architecture

        folder = self._folder(model)
        assign_tensors_(model, folder, read_architecture(folder)["aliases"])
        return model

    def update_missing_keys(self, model, missing_keys, prefix=""):
        """Tied tensors are stored once and shared afterwards; the final check is ours."""
        return []

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, *args, **kwargs) -> bool:
        return False


def register() -> None:
    """Tell transformers about the quantization method `lilliput` (once)."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if "lilliput" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("lilliput")(LilliputConfig)
        register_quantizer("lilliput")(LilliputQuantizer)
