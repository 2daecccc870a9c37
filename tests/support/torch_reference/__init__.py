"""The torch models this project is held against, rebuilt on torch.nn with upstream's key names.

Layouts are torch's: mel (b, m, t), everything else batch first.
"""

from tests.support.torch_reference.builders import (
    TINY_DVAE,
    TINY_UNIFIED_VOICE,
    random_batch,
    randomize,
    record_outputs,
    tiny_dvae,
    tiny_unified_voice,
)
from tests.support.torch_reference.dvae import DiscreteVAE
from tests.support.torch_reference.mel import log_mel, mel_filters
from tests.support.torch_reference.recipe import HISTORY_COLUMNS, Recipe, Trainer, parameter_groups, train
from tests.support.torch_reference.unified_voice import SAMPLES_PER_CODE, UnifiedVoice

__all__ = [
    "HISTORY_COLUMNS",
    "SAMPLES_PER_CODE",
    "TINY_DVAE",
    "TINY_UNIFIED_VOICE",
    "DiscreteVAE",
    "Recipe",
    "Trainer",
    "UnifiedVoice",
    "log_mel",
    "mel_filters",
    "parameter_groups",
    "random_batch",
    "randomize",
    "record_outputs",
    "tiny_dvae",
    "tiny_unified_voice",
    "train",
]
