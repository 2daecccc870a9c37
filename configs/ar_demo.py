"""The demo: a tiny trained model learns a voice it has never heard, on two CPU cores, in a minute or two.

  make demo

Expected: the held-out mel loss falls by 62 %.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import ar


def get_config() -> ConfigDict:
    config = ar.get_config()
    config.steps = 120
    config.batch_size = 8
    config.conditioning_clips = 2
    config.gradient_accumulation_steps = 1
    config.embed_dropout = 0.2
    config.residual_dropout = 0.05
    config.attention_dropout = 0.1
    config.ema = 0.95  # a hundred clips: the mean of the last twenty steps is better than any of them
    config.optimizer.learning_rate = 7e-4  # of a tiny model; the released one asks for a hundredth
    config.optimizer.schedule = "cosine"
    config.optimizer.milestones = ()
    config.optimizer.freeze = "conditioning_encoder/.*"  # six seconds of conditioning are most of a tiny model's work
    config.remat = "none"
    config.eval_every = 20
    config.log_every = 10
    config.sample_every = 120  # at the start and at the end: before and after
    config.patience = 0
    config.prompts = ("white one eight london", "green nine yellow blue", "london four nine")  # no clip says them
    return config
