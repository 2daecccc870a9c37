"""The models that can be converted, one file per model. A new model is a new file and a line here.

They are converted in this order.
"""

from __future__ import annotations

from convert.tables import dvae, unified_voice
from convert.tables.model import Location, TorchModel

__all__ = ["MODELS", "Location", "TorchModel"]

MODELS: dict[str, TorchModel] = {model.part: model for model in (dvae.MODEL, unified_voice.MODEL)}
