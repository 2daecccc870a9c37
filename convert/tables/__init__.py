"""The models that can be converted, one file per model. A new model is a new file and a line here.

They are converted in this order.
"""

from __future__ import annotations

from convert.tables import clvp, diffusion, dvae, hifigan, random_voice, unified_voice, vocoder
from convert.tables.model import Location, TorchModel

__all__ = ["MODELS", "Location", "TorchModel"]

MODELS: dict[str, TorchModel] = {
    model.part: model
    for model in (
        dvae.MODEL,
        unified_voice.MODEL,
        clvp.MODEL,
        diffusion.MODEL,
        vocoder.MODEL,
        hifigan.MODEL,
        random_voice.AUTO,
        random_voice.DIFFUSER,
    )
}
