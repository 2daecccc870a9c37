"""`make demo`: the whole way once, with tiny random checkpoints and the bundled voice, through the real commands.

torch checkpoints -> Flax -> prepared data -> fine-tuning -> a torch checkpoint that loads strictly into torch's model.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from tests.support.torch_reference import DiscreteVAE, UnifiedVoice, log_mel
from tortoise_jax.audio import default_mel_norms, read_audio

ROOT = Path(__file__).parents[1]
DEMO = Path("demo")
VOICE = Path("examples/voice")
HEADS = 4
DVAE = dict(hidden_dim=32, num_layers=2, num_resnet_blocks=3, codebook_dim=64, num_tokens=64)
AR = dict(
    layers=3,
    model_dim=64,
    heads=HEADS,
    max_text_tokens=120,
    max_mel_tokens=120,
    number_mel_codes=66,
    start_mel_token=64,
    stop_mel_token=65,
)
TOLERANCE = 1e-4
EXPECTED_FALL = 0.9  # of the held-out mel loss


def main() -> None:
    started = time.perf_counter()
    shutil.rmtree(ROOT / DEMO, ignore_errors=True)
    say("1. Torch checkpoints: upstream's names, tiny, random weights")
    ar, dvae = make_checkpoints()
    say("2. Torch to Flax")
    run("convert/torch_to_flax.py", "--dvae", dvae, "--ar", ar, "--heads", HEADS, "--out", DEMO / "tortoise")
    say("3. Recordings to a data set")
    run("-m", "tortoise_jax.prepare", "--data", VOICE, "--checkpoint", DEMO / "tortoise", "--out", DEMO / "dataset")
    say("4. Fine-tuning")
    fields = [f"--config.checkpoint={DEMO / 'tortoise'}", f"--config.data={DEMO / 'dataset'}"]
    run("train.py", "--config", "configs/ar_demo.py", *fields, f"--workdir={DEMO / 'run'}")
    say("5. Back to torch, strictly")
    check_export(DEMO / "run" / "voice.pth")
    check_learning(DEMO / "run")
    say(f"Done in {time.perf_counter() - started:.0f} s. What was made:")
    for path in ("autoregressive.pth", "dvae.pth", "tortoise", "dataset", "run", "run/voice.pth", "run/voice.json"):
        print(f"  {DEMO / path}")


def say(line: str) -> None:
    print(f"\n=== {line}", flush=True)


def run(*arguments: object) -> None:
    """Runs one of the README's commands, shown as it would be typed."""
    words = [str(argument) for argument in arguments]
    print("$ python " + shlex.join(words), flush=True)
    if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        sys.exit(f"demo: this command failed: python {shlex.join(words)}")


def make_checkpoints() -> tuple[Path, Path]:
    torch.manual_seed(0)
    (ROOT / DEMO).mkdir()
    dvae = DiscreteVAE(**DVAE)
    spread_codes(dvae)
    ar_path, dvae_path = DEMO / "autoregressive.pth", DEMO / "dvae.pth"
    torch.save(UnifiedVoice(**AR).state_dict(), ROOT / ar_path)
    torch.save(dvae.state_dict(), ROOT / dvae_path)
    return ar_path, dvae_path


@torch.no_grad()
def spread_codes(dvae: DiscreteVAE) -> None:
    """Puts the codes where the random encoder puts the voice's frames; anywhere else one code would stand for all."""
    clips = sorted((ROOT / VOICE / "wavs").iterdir())
    norms = torch.tensor(default_mel_norms())
    mel = torch.cat([log_mel(torch.tensor(read_audio(clip)), norms) for clip in clips], dim=1)
    features = dvae.encode(mel[None])[0][0]
    picked = torch.randperm(len(features))[: DVAE["num_tokens"]]
    for name in ("embed", "embed_avg"):
        getattr(dvae.codebook, name).copy_(features[picked].T)


def check_export(path: Path) -> None:
    """The exported file loads strictly into the torch model, whose logits equal ours."""
    import tortoise_jax as tj

    reference = UnifiedVoice(**AR)
    reference.load_state_dict(torch.load(ROOT / path, weights_only=True), strict=True)
    reference.eval()
    model = tj.load(ROOT / DEMO / "run")
    dataset = tj.Dataset.open(ROOT / DEMO / "dataset")
    index = int(dataset.split("validation")[0])
    text_ids, codes = dataset.text_ids(index).astype(np.int64), dataset.codes(index).astype(np.int64)
    waveform = dataset.waveform(index).astype(np.float32) / 32768
    mel = np.asarray(model.log_mel(waveform))
    with torch.no_grad():
        vector = reference.conditioning_latent(torch.tensor(mel.T[None, None]))[0]
        _, expected = reference.row_logits(vector, torch.tensor(text_ids), torch.tensor(codes))
    conditioning = model.model.apply({"params": model.params}, mel[None, None], method="condition")[:, 0]
    row = model.batch([(text_ids, codes)])
    logits = np.asarray(model.outputs(conditioning, row)["mel_logits"])[0]
    first = 1 + len(text_ids) + 2
    found = logits[first : first + len(codes) + 1]
    expected_rows = expected.numpy()[: len(codes) + 1]
    error = float(np.abs(found - expected_rows).max() / np.abs(expected_rows).max())
    print(f"{path} loads strictly into the torch model; logits of a held-out clip differ by {error:.1e} of the largest")
    if not error <= TOLERANCE:
        sys.exit(f"demo: the exported model's logits differ by {error:.1e}, allowed {TOLERANCE:.0e}")


def check_learning(run_folder: Path) -> None:
    """The held-out loss must have fallen clearly."""
    losses = json.loads((ROOT / run_folder / "summary.json").read_text())["validation_mel"]
    first, last = losses[0][1], losses[-1][1]
    print(f"held-out mel loss: {first:.3f} before, {last:.3f} after")
    if not last < EXPECTED_FALL * first:
        sys.exit(f"demo: the held-out loss fell from {first:.3f} to {last:.3f} only")


if __name__ == "__main__":
    main()
