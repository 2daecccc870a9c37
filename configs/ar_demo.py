"""The demo: a tiny model with random weights learns the bundled voice's code statistics on two CPU cores.

  make demo

Expected: under five minutes, the held-out mel loss falls by more than a tenth.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import ar


def get_config() -> ConfigDict:
    config = ar.get_config()
    config.steps = 60
    config.batch_size = 16
    config.accumulation = 1
    config.optimizer.learning_rate = 2e-3  # random weights, not fine-tuning
    config.optimizer.milestones = (40,)
    config.remat = False
    config.eval_every = 20
    config.log_every = 5
    config.sample_every = 60
    config.prompts = ("Yes.",)
    return config
