"""Fine-tuning the AR model on recordings of a voice: DLAS's recipe.

  python train.py --config configs/ar.py --config.checkpoint=checkpoints/tortoise --config.data=data --workdir=runs/voice

Hardware: any. With the released model (421 M parameters) state and gradients take 6.8 GB in float32; one micro-batch of
4 clips fits a 16 GB card. Every field can be given on the command line: --config.optimizer.learning_rate=5e-6
"""

from __future__ import annotations

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    # What goes in.
    config.checkpoint = "checkpoints/tortoise"  # a converted checkpoint, or a run to start from
    config.data = "data"  # a prepared data set, or recordings to prepare: metadata.csv and wavs/
    config.seed = 0  # decides order, crops and dropout; the same seed gives the same run

    # How long. DLAS's stepped rate ends at 1800 steps; more teaches little.
    config.steps = 2000
    config.batch_size = 128  # clips a step, over all devices; made smaller where the data set is
    config.accumulation = 4  # micro-batches a step on each device: raise it when memory runs out

    # Optimiser: DLAS's numbers (the people who used it with 180 clips found 1e-5 too high and 1e-6 safer).
    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or "adafactor": a third of the memory
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "stepped"  # or "cosine" to 0 at the last step, or "constant"
    config.optimizer.milestones = (500, 1000, 1400, 1800)  # steps at which "stepped" multiplies the rate
    config.optimizer.gamma = 0.5  # … by this
    config.optimizer.warmup = 0  # steps of linear rise at the start
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.96  # shorter memory than Adam's 0.999: runs are short
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 1e-2  # on matrices only, not on biases, norms and embeddings
    config.optimizer.clip_norm = 4.0  # of decayed and undecayed parameters separately
    config.optimizer.freeze = ""  # regular expression of parameter paths to leave alone, e.g. "conditioning_encoder/.*"

    # Loss and regularisation.
    config.text_weight = 0.01  # of the text loss beside the mel loss's 1
    config.embed_dropout = 0.1  # GPT-2's defaults, active in upstream's training
    config.residual_dropout = 0.1
    config.attention_dropout = 0.0  # 0.1 upstream; fused attention has none
    config.conditioning_clips = 2  # other clips of the speaker, averaged into one vector as at synthesis

    # How it is computed.
    config.dtype = "auto"  # bfloat16 where the hardware is fast at it, else float32
    config.remat = True  # recompute activations in the backward pass: a fifth slower, a fraction of the memory
    config.attention = "plain"  # or "xla", "cudnn" (NVIDIA, bfloat16, no attention dropout)

    # Watching and keeping.
    config.log_every = 10  # steps
    config.eval_every = 100  # steps between validation losses, and the checkpoints they judge
    config.keep_last = 2  # checkpoints; the best is kept besides
    config.export = "voice.pth"  # in the run's directory, written at the end where torch is installed; "" for none
    return config
