"""Fine-tuning the AR model on recordings of a voice: DLAS's recipe, fitted to the size of the data set.

  python train.py --config configs/ar.py --config.data=data --workdir=runs/voice

Hardware: any. With the released model (421 M parameters), float32 state and gradients take 6.8 GB; see what fits with
--plan. Every field can be given on the command line: --config.optimizer.learning_rate=5e-6
A field that is None is chosen by the size of the data set (tortoise_jax/training/presets.py) and printed; what you give
is kept.
"""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()

    # What goes in.
    config.checkpoint = "checkpoints/tortoise"  # a converted checkpoint, or a run to start from
    config.data = "data"  # a prepared data set, or recordings to prepare: metadata.csv and wavs/
    config.seed = 0  # decides order, crops and dropout; the same seed gives the same run

    # How long, in which portions.
    config.steps = placeholder(int)  # of the optimiser; DLAS's users overfit small sets long before its 2000
    config.batch_size = placeholder(int)  # clips per step, over all devices; lowered where the data set has fewer
    config.gradient_accumulation_steps = 4  # micro-batches per step on each device; raise it when memory runs out
    config.eval_every = placeholder(int)  # steps between validation losses, and the checkpoints they judge
    config.save_every = 0  # steps between further checkpoints; 0: only after evaluations
    config.save_to = ""  # where the steps are saved, if not in --workdir: a folder or gs://BUCKET/… all hosts reach
    config.patience = 5  # evaluations without a better validation loss before the run ends; 0: never

    # Optimiser: DLAS's numbers where not said otherwise.
    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or "adafactor": optimiser state of a thousandth, for small cards
    config.optimizer.learning_rate = placeholder(float)  # the highest; 1e-5 of DLAS is too high for a few hundred clips
    config.optimizer.schedule = "stepped"  # or "cosine" to 0 at the last step, or "constant"
    config.optimizer.milestones = placeholder(tuple)  # steps at which "stepped" multiplies the rate
    config.optimizer.gamma = 0.5  # what "stepped" multiplies the rate by at each milestone
    config.optimizer.warmup = 0  # steps of linear rise at the start
    config.optimizer.beta1 = 0.9  # how much of the mean gradient is kept per step
    config.optimizer.beta2 = 0.96  # and of the mean squared one: less than Adam's 0.999, for runs are short
    config.optimizer.epsilon = 1e-8  # added to the root of the mean squared gradient that a step is divided by
    config.optimizer.weight_decay = 1e-2  # per step, times the rate; of matrices, not of biases, norms and embeddings
    config.optimizer.clip_norm = 4.0  # longest gradient, of decayed and of undecayed parameters each
    config.optimizer.moments = "float32"  # how AdamW keeps the two means; "bfloat16": half their memory, rounded
    config.optimizer.freeze = ""  # regular expression of parameter paths to leave alone, e.g. "conditioning_encoder/.*"

    # Adapters (LoRA): low-rank additions to the GPT's products with weights, trained in place of all else, then merged.
    config.lora = ConfigDict()
    config.lora.rank = 0  # of the adapters, e.g. 16; 0: all parameters are trained
    config.lora.alpha = 16.0  # the adapters are added times alpha / rank; their rate is ten times the recipe's
    config.lora.also_train = ""  # regular expression of what is trained beside them, e.g. "text_.*" for a new alphabet

    # What is kept, evaluated and exported.
    config.ema = 0.0  # how much of the parameters' moving average is kept per step, e.g. 0.999; 0: the parameters

    # Loss and regularisation.
    config.text_weight = 0.01  # of the text loss beside the mel loss's 1
    config.embed_dropout = 0.1  # share of the embeddings set to zero; GPT-2's, active in upstream's training
    config.residual_dropout = 0.1  # the same of what each layer adds
    config.attention_dropout = 0.0  # the same of the attention weights; 0.1 upstream, fused attention has none
    config.conditioning_clips = 1  # other clips of the speaker, averaged into one vector as at synthesis

    # How it is computed.
    config.dtype = "auto"  # bfloat16 where the hardware is fast at it, else float32
    config.remat = "full"  # recomputed in the backward pass: all ("full"), all but products ("dots"), "none"
    config.attention = "auto"  # "cudnn" (NVIDIA, bfloat16), "by_heads" (CPU), "xla", or "plain", which alone can drop
    config.deterministic = True  # bit-identical reruns on NVIDIA too, by XLA's deterministic-ops flag; a little slower

    # Watching and keeping.
    config.log_every = 10  # steps between lines of progress
    config.sample_every = placeholder(int)  # steps between drafts to listen to, also of the first and last; 0: none
    config.prompts = (  # what the drafts say; the one-word prompt shows whether the model stops
        "The quick brown fox jumps over the lazy dog.",
        "Yes.",
        "I never thought that it would come to this, but here we are.",
    )
    config.sample_preset = "draft"  # how drafts become sound: hifigan, ultra_fast …, if the checkpoint has the parts
    config.wandb = ""  # the project of Weights & Biases to log to beside TensorBoard; "": none
    config.keep_last = 2  # how many of the newest checkpoints are kept, besides the best
    config.max_nonfinite = 10  # steps in a row with a non-finite loss or gradient before the run ends
    config.export = "voice.pth"  # in the run's directory, written at the end where torch is installed; "" for none
    return config
