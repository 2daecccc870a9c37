"""Makes demo/dvae.pth and demo/autoregressive.pth from nothing: `make pair`, about an hour, 7 GB of disk.

Every step is a command that is shown as it would be typed. All seeds are fixed; espeak-ng 1.52 speaks the same clips
again. Another machine or version ends near the files in the repository, not at them: demo/README.md says how near.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tortoise_jax.checkpoints.parts import AR, DVAE, Part
from tortoise_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from tortoise_jax.models.unified_voice import UnifiedVoice, UnifiedVoiceConfig

ROOT = Path(__file__).parents[1]
SEED = 0
CODEC_CLIPS = 600  # of each of the six voices, to train the dVAE on
CODEC = {
    "model.codes": 256,
    "model.codebook_dim": 64,
    "model.hidden": 64,
    "steps": 360,
    "batch_size": 16,
    "optimizer.learning_rate": 1e-3,
    "eval_every": 60,
    "sample_every": 180,
}
CLIPS = 12000  # of each voice, to train the AR model on: with fewer it learns them by heart
SPEECH = {
    "steps": 7500,
    "batch_size": 16,
    "gradient_accumulation_steps": 1,
    "conditioning_clips": 1,
    "remat": "none",
    "embed_dropout": 0.1,
    "residual_dropout": 0.05,
    "optimizer.learning_rate": 2e-3,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 200,
    "optimizer.milestones": "()",
    # Six seconds of conditioning are most of a small model's work, and random features tell voices apart already.
    "optimizer.freeze": "conditioning_encoder/.*",
    "eval_every": 500,
    "sample_every": 0,
    "patience": 0,
}
MODEL = UnifiedVoiceConfig(
    layers=8, width=128, heads=2, text_tokens=256, mel_tokens=258, text_positions=62, mel_positions=134
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/pair"), help="where all of it happens (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where the two files go (%(default)s)")
    arguments = parser.parse_args()
    work, out = arguments.work, arguments.out
    run("demo/make_speech.py", "--clips", CODEC_CLIPS, "--out", work / "codec-speech")
    codec = {"data": work / "codec-speech/metadata.csv"} | CODEC
    run("train.py", "--config", "configs/dvae.py", *fields(codec), f"--workdir={work / 'dvae'}")
    begin(work / "dvae", work / "start")
    speech = {"checkpoint": work / "start", "data": prepared(work)} | SPEECH
    run("train.py", "--config", "configs/ar.py", *fields(speech), f"--workdir={work / 'ar'}")
    for part, name in ((DVAE, "dvae"), (AR, "autoregressive")):
        half = ("--dtype", "float16")  # as many bytes as a repository should hold
        run("convert/flax_to_torch.py", work / part, "--part", part, *half, "--out", out / f"{name}.pth")


def prepared(work: Path) -> Path:
    """A data set of what all voices say."""
    run("demo/make_speech.py", "--clips", CLIPS, "--out", work / "speech")
    source = ("--data", work / "speech/metadata.csv", "--checkpoint", work / "start")
    run("-m", "tortoise_jax.prepare", *source, "--out", work / "data")
    return work / "data"


def fields(values: dict[str, object]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in values.items()]


def run(*arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    print("$ python " + shlex.join(words), flush=True)
    if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        sys.exit(f"make_pair: this command failed: python {shlex.join(words)}")


def begin(dvae: Path, out: Path) -> None:
    """A checkpoint of the trained dVAE and an AR model with random weights."""
    row = jnp.zeros((1, 4), jnp.int32)
    mel = jnp.zeros((1, 1, 8, MODEL.mel_channels))
    variables = jax.jit(UnifiedVoice(MODEL).init)(jax.random.key(SEED), mel, row, row, row)
    part = Part.of_tree(MODEL, jax.tree.map(np.asarray, variables["params"]))
    save_pretrained(load_pretrained(dvae, (DVAE,)).with_part(AR, part), out)
    print(f"{out}: the trained dVAE and an AR model with random weights (seed {SEED})", flush=True)


if __name__ == "__main__":
    main()
