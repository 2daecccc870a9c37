"""The demo: a tiny model with random weights learns the bundled voice's code statistics on two CPU cores.

  make demo

Expected: under five minutes, the held-out mel loss falls by more than a tenth.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import ar


def get_config() -> ConfigDict:
    config = ar.get_config()
    config.steps = 50
    config.batch_size = 8
    config.conditioning_clips = 1  # encoding six seconds of conditioning is most of a tiny model's work
    config.gradient_accumulation_steps = 1
    config.optimizer.learning_rate = 5e-3  # random weights, not fine-tuning
    config.optimizer.milestones = (40,)
    config.remat = False
    config.eval_every = 25
    config.log_every = 5
    config.sample_every = 50
    config.prompts = ("Yes.",)
    return config
