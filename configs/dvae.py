"""Training the dVAE, which turns mels into the codes that the AR model speaks: for another language or microphone.

  python train.py --config configs/dvae.py --config.data=data --workdir=runs/dvae

From scratch, or with --config.checkpoint=checkpoints/tortoise from a converted one. A changed dVAE has changed codes,
which an AR model trained with the old ones does not know. The run says how many codes are still the same and never
writes over a checkpoint; data sets must be prepared again, and the AR model be trained on them.

A field that is None is chosen by whether there is a checkpoint to start from (tortoise_jax/training/dvae_run.py).
"""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.trains = "dvae"  # which model this configuration is for

    # What goes in.
    config.checkpoint = ""  # a converted checkpoint, or a run to start from; "" starts from random weights
    config.data = "data"  # a prepared data set (of whatever dVAE), or recordings to prepare: metadata.csv and wavs/
    config.seed = 0  # decides order, crops and the random weights; the same seed gives the same run
    config.crop_codes = 32  # of a random crop of a clip; 32 are 1.5 s

    # The dVAE's dimensions, where it starts from random weights; these are the released one's.
    config.model = ConfigDict()
    config.model.codebook_dim = 512  # numbers of a code's vector
    config.model.codes = 8192  # how many there are to choose from
    config.model.hidden = 512  # channels between the layers
    config.model.layers = 2  # each halves the frames: 2 make a code of 4 frames
    config.model.res_blocks = 3  # residual blocks of encoder and decoder

    # How long, in which portions.
    config.steps = placeholder(int)  # of the optimiser; 20000 from scratch, 1000 from a checkpoint
    config.batch_size = 64  # crops a step, over all devices; made smaller where the data set is
    config.gradient_accumulation_steps = 1  # micro-batches per step on each device; raise it when memory runs out
    config.eval_every = placeholder(int)  # steps between validation losses; a twentieth of the run
    config.save_every = 0  # steps between checkpoints besides; 0: only where there is a validation loss
    config.save_to = ""  # where the steps are saved, if not in --workdir: a folder or gs://BUCKET/… all hosts reach
    config.patience = 0  # evaluations without a better validation loss before the run ends; 0: never

    # Optimiser of encoder and decoder; the codebook has none, it follows its features by moving averages.
    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or "adafactor": optimiser state of a thousandth, for small cards
    config.optimizer.learning_rate = placeholder(float)  # 3e-4 from scratch, 1e-5 from a checkpoint
    config.optimizer.schedule = "cosine"  # to 0 at the last step; or "stepped", or "constant"
    config.optimizer.milestones = ()  # steps at which "stepped" multiplies the rate
    config.optimizer.gamma = 0.5  # what "stepped" multiplies the rate by at each milestone
    config.optimizer.warmup = 0  # steps of linear rise at the start
    config.optimizer.beta1 = 0.9  # how much of the mean gradient is kept per step
    config.optimizer.beta2 = 0.99  # and of the mean squared one
    config.optimizer.epsilon = 1e-8  # added to the root of the mean squared gradient that a step is divided by
    config.optimizer.weight_decay = 0.0  # per step, times the rate; of matrices, not of biases
    config.optimizer.clip_norm = 4.0  # longest gradient
    config.optimizer.moments = "float32"  # how AdamW keeps the two means; "bfloat16": half their memory, rounded
    config.optimizer.freeze = ""  # regular expression of parameter paths to leave alone, e.g. "encoder/.*"

    # Loss and codebook.
    config.reconstruction = "mse"  # or "smooth_l1", which is linear where the error is large
    config.commitment = 0.25  # weight of the features' mean squared distance from their codes
    # A code picked less often per step than this, on average, is moved onto a feature of the batch; 0: never. 0.05 from
    # scratch, where most codes would else never be picked; 0 from a checkpoint, whose codes have a meaning.
    config.revive_below = placeholder(float)

    # Watching and keeping.
    config.deterministic = True  # bit-identical reruns on NVIDIA too, by XLA's deterministic-ops flag; a little slower
    config.log_every = 10  # steps between lines of progress
    config.sample_every = placeholder(int)  # steps between reconstructions to hear, also of the first and last; 0: none
    config.wandb = ""  # the project of Weights & Biases to log to beside TensorBoard; "": none
    config.keep_last = 2  # how many of the newest checkpoints are kept, besides the best
    config.max_nonfinite = 10  # steps in a row with a non-finite loss or gradient before the run ends
    config.export = "dvae.pth"  # in the run's directory, written at the end where torch is installed; "" for none
    return config
