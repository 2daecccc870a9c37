"""Fine-tuning all of the released AR model on a card of 8 GB: configs/ar.py with a small optimiser and small portions.

  python train.py --config configs/ar_small_gpu.py --config.data=data --workdir=runs/voice

Hardware: an NVIDIA card of 8 GB that computes bfloat16 (RTX 30 series or newer). JAX takes 6 GiB of it; the program
needs 5, which `--plan --topology rtx3070-8g` shows. For less, add --config.lora.rank=16: 2 GiB, adapters alone.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import ar


def get_config() -> ConfigDict:
    config = ar.get_config()
    config.batch_size = 32  # clips per step, as configs/ar.py has it for hundreds of clips
    config.gradient_accumulation_steps = 16  # two clips at a time: a longer clip costs more memory than a larger batch
    config.optimizer.name = "adafactor"  # no moments, which alone would take 3.1 GiB; the same rates as AdamW
    config.dtype = "bfloat16"  # half of what is kept for the backward pass; slow on cards without it, such as the T4
    config.remat = "full"  # computed again in the backward pass: each block's input is all that is kept
    config.keep_last = 1  # besides the best: a checkpoint is 1.7 GB
    return config
