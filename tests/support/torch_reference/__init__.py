"""The torch models this project is held against, rebuilt on torch.nn with upstream's key names.

Layouts are torch's: mel (b, m, t), everything else batch first.
"""

from tests.support.torch_reference.builders import (
    TINY_DVAE,
    TINY_UNIFIED_VOICE,
    random_batch,
    randomize,
    record_outputs,
    tiny_clvp,
    tiny_diffusion,
    tiny_dvae,
    tiny_hifigan,
    tiny_random_voice,
    tiny_unified_voice,
    tiny_vocoder,
)
from tests.support.torch_reference.clvp import CLVP
from tests.support.torch_reference.diffusion import DiffusionTts
from tests.support.torch_reference.dvae import DiscreteVAE
from tests.support.torch_reference.mel import log_mel, mel_filters
from tests.support.torch_reference.recipe import HISTORY_COLUMNS, Recipe, Trainer, parameter_groups, train
from tests.support.torch_reference.unified_voice import SAMPLES_PER_CODE, UnifiedVoice
from tests.support.torch_reference.vocoders import Hifigan, RandomLatentConverter, UnivNet

__all__ = [
    "CLVP",
    "HISTORY_COLUMNS",
    "SAMPLES_PER_CODE",
    "TINY_DVAE",
    "TINY_UNIFIED_VOICE",
    "DiffusionTts",
    "DiscreteVAE",
    "Hifigan",
    "RandomLatentConverter",
    "Recipe",
    "Trainer",
    "UnifiedVoice",
    "UnivNet",
    "log_mel",
    "mel_filters",
    "parameter_groups",
    "random_batch",
    "randomize",
    "record_outputs",
    "tiny_clvp",
    "tiny_diffusion",
    "tiny_dvae",
    "tiny_hifigan",
    "tiny_random_voice",
    "tiny_unified_voice",
    "tiny_vocoder",
    "train",
]
