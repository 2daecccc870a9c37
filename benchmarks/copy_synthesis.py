"""How close a draft is to the recording it copies: the mean log-mel distance in dB, after each step of the copying.

  python -m benchmarks.copy_synthesis                    with a small dVAE, trained here on the other clips
  python -m benchmarks.copy_synthesis --checkpoint DIR   with a converted one

recording -> mel -> codes -> mel -> Griffin-Lim -> waveform, on the example voice's last clips, which the small dVAE was
not trained on. The mel of random codes is the distance to beat. --out FOLDER keeps the sounds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from tests.support.distance import distance
from tortoise_jax.audio import default_mel_norms, griffin_lim, log_mel, read_audio
from tortoise_jax.checkpoints.pretrained import load_pretrained
from tortoise_jax.errors import exit_with_one_line
from tortoise_jax.models.compiled import apply
from tortoise_jax.models.dvae import DiscreteVAE, DVAEConfig, move_codebook
from tortoise_jax.synthesis.drafts import decode_mel, draft, write_wav

Tree = Any
VOICE = Path(__file__).parent.parent / "examples" / "voice" / "wavs"
HELD_OUT = 3  # clips
SMALL = DVAEConfig(codebook_dim=64, codes=256, hidden=64, layers=2, res_blocks=1)
WINDOW, ROWS = 128, 16  # frames and rows of a training batch
COMMITMENT = 0.25


def train(mel: np.ndarray, config: DVAEConfig, steps: int, seed: int = 0) -> Tree:
    """dVAE parameters, trained on random windows of a log-mel (t, m)."""
    random = np.random.default_rng(seed)
    model = DiscreteVAE(config)

    def windows() -> np.ndarray:
        return np.stack([mel[start : start + WINDOW] for start in random.integers(len(mel) - WINDOW, size=ROWS)])

    params = model.init(jax.random.key(seed), windows())["params"]
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params: Tree, codebook: Tree, opt_state: Any, mel: jax.Array) -> tuple[Tree, Tree, Any, jax.Array]:
        def loss(params: Tree) -> tuple[jax.Array, dict[str, Any]]:
            outputs: Any = model.apply({"params": params, "codebook": {"codebook": codebook}}, mel)
            commitment = jnp.mean((outputs["quantized"] - outputs["features"]) ** 2)
            return jnp.mean((outputs["out"] - mel) ** 2) + COMMITMENT * commitment, outputs

        (value, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        picked = jax.nn.one_hot(outputs["codes"], config.codes)
        moved = move_codebook(codebook, picked.sum((0, 1)), jnp.einsum("bce,bcn->en", outputs["features"], picked))
        return optax.apply_updates(params, updates), moved, opt_state, value

    features: Any = model.apply({"params": params}, windows(), method=DiscreteVAE.features)
    picked = random.permutation(np.asarray(features).reshape(-1, config.codebook_dim))[: config.codes].T
    codebook = {"embed": jnp.array(picked), "embed_avg": jnp.array(picked), "cluster_size": jnp.ones(config.codes)}
    for _ in tqdm(range(steps), unit="step", desc="training a small dVAE", leave=False, disable=None):
        params, codebook, opt_state, _ = step(params, codebook, opt_state, windows())
    return {"params": params, "codebook": {"codebook": codebook}}


def compare(
    variables: Tree, config: DVAEConfig, mel_norms: np.ndarray, waveforms: list[np.ndarray], out: Path | None = None
) -> dict[str, float]:
    """The mean distance to recordings (samples,) after each step of the copying."""
    mel_of = lambda waveform: np.asarray(log_mel(waveform, mel_norms))
    found: dict[str, list[float]] = {}
    for number, waveform in enumerate(waveforms):
        mel = mel_of(waveform)
        codes = np.asarray(apply(DiscreteVAE(config), "encode", variables, mel[None]))[0]
        other = np.random.default_rng(number).integers(0, config.codes, len(codes))
        made = {
            "mel -> waveform": griffin_lim(mel, mel_norms),
            "codes -> waveform": draft(variables, config, mel_norms, codes),
        }
        mels = {name: mel_of(sound) for name, sound in made.items()}
        mels["codes -> mel"] = decode_mel(variables, config, codes[None])[0]
        mels["random codes -> mel"] = decode_mel(variables, config, other[None])[0]
        for name, copy in mels.items():
            found.setdefault(name, []).append(distance(mel, copy, mel_norms))
        if out:
            for name, sound in ({"recording": waveform} | made).items():
                write_wav(out / f"{number + 1} {name.replace(' -> ', ' to ')}.wav", sound)
    return {name: float(np.mean(values)) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a converted dVAE, or a run")
    parser.add_argument("--steps", type=int, default=1500, help="of training without one (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to keep the sounds")
    arguments = parser.parse_args()
    waveforms = [read_audio(path) for path in sorted(VOICE.iterdir())]
    if arguments.checkpoint:
        pretrained = load_pretrained(arguments.checkpoint, ("dvae",))
        variables, config, mel_norms = pretrained.dvae.variables, pretrained.dvae.config, pretrained.mel_norms
    else:
        config, mel_norms = SMALL, default_mel_norms()
        mels = [log_mel(waveform, mel_norms) for waveform in waveforms[:-HELD_OUT]]
        variables = train(np.concatenate(mels), config, arguments.steps)
    start = time.perf_counter()
    found = compare(variables, config, mel_norms, waveforms[-HELD_OUT:], arguments.out)
    seconds = sum(map(len, waveforms[-HELD_OUT:])) / 22050
    print(f"{HELD_OUT} clips of {seconds:.1f} s together, each said twice, in {time.perf_counter() - start:.1f} s")
    for name, value in found.items():
        print(f"{name:22}{value:6.2f} dB from the recording")


if __name__ == "__main__":
    exit_with_one_line(main)
