"""Fine-tuning the released AR model on a card of 8 GB: configs/ar.py, with what makes it small.

  python train.py --config configs/ar_small_gpu.py --config.data=data --workdir=runs/voice

Hardware: an NVIDIA card of 8 GB that computes bfloat16 (RTX 30 and 40), of which JAX takes 6 GiB.
To see it before: --plan --topology rtx3070-8g
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import ar


def get_config() -> ConfigDict:
    config = ar.get_config()
    return config
