"""`make demo`: a tiny trained model learns a new voice, through the real commands, and is heard before and after.

demo/*.pth -> Flax -> prepared data -> fine-tuning -> a torch checkpoint that loads strictly into torch's model.
Everything is left in demo-output/; what the commands say is in demo-output/log.txt.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Before JAX is imported, and inherited by the commands: the demo is small, and the tests' extra brings compilers for
# accelerators that complain where there is none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import torch

import tortoise_jax as tj
from tests.support import spoken
from tests.support.spoken import Figures, Renderings
from tests.support.torch_reference import UnifiedVoice
from tortoise_jax.audio import read_audio
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained
from tortoise_jax.synthesis import drafts, sampler
from tortoise_jax.synthesis.speech import candidate_mels
from tortoise_jax.training.run_directory import History

ROOT = Path(__file__).parents[1]
PAIR = Path("demo")
OUT = Path("demo-output")
LOG = OUT / "log.txt"
VOICE = "grace"
TO_HEAR = 3  # of the unseen sentences
CONDITIONING = 3  # clips of the new voice
TOLERANCE = 1e-4
# What must be reached; demo/README.md has what is.
LOSS_LEFT, STOPS, SILENCE, NEAREST, RATIO = 0.4, 0.98, 0.3, 0.9, 1.1


def main() -> None:
    started = time.perf_counter()
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    (ROOT / OUT).mkdir()
    say("1/5 demo/*.pth, a tiny dVAE and AR model, to Flax")
    pair = ("--dvae", PAIR / "dvae.pth", "--ar", PAIR / "autoregressive.pth")
    run("convert/torch_to_flax.py", *pair, "--out", OUT / "tortoise")
    say("2/5 demo/voice, 100 clips of a voice it has never heard, to a data set")
    checkpoint = ("--checkpoint", OUT / "tortoise")
    run("-m", "tortoise_jax.prepare", "--data", PAIR / "voice/metadata.csv", *checkpoint, "--out", OUT / "data")
    say("3/5 fine-tuning on them (a minute or two)")
    fields = [f"--config.checkpoint={OUT / 'tortoise'}", f"--config.data={OUT / 'data'}"]
    run("train.py", "--config", "configs/ar_demo.py", *fields, f"--workdir={OUT / 'run'}")
    say("4/5 back to torch, strictly")
    shutil.copy(ROOT / OUT / "run" / "voice.pth", ROOT / OUT / "voice.pth")
    shutil.copy(ROOT / OUT / "run" / "voice.json", ROOT / OUT / "voice.json")
    shutil.copy(ROOT / OUT / "run" / "report.html", ROOT / OUT / "report.html")
    check_export(ROOT / OUT / "voice.pth")
    say("5/5 40 sentences that no clip says, before and after")
    before, after, pitch = compare()
    loss_before, loss_after = held_out_losses(ROOT / OUT / "run")
    show(before, after, pitch, loss_before, loss_after)
    print(f"\nDone in {time.perf_counter() - started:.0f} s.")
    check(after, loss_after / loss_before)


def say(line: str) -> None:
    print(f"=== {line}", flush=True)


def run(*arguments: object) -> None:
    """Runs one of the README's commands; what it says goes to LOG."""
    words = [str(argument) for argument in arguments]
    print("$ python " + shlex.join(words), flush=True)
    with (ROOT / LOG).open("a", encoding="utf-8") as log:
        log.write("$ python " + shlex.join(words) + "\n")
        log.flush()
        done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        print("".join((ROOT / LOG).read_text(encoding="utf-8").splitlines(keepends=True)[-20:]))
        sys.exit(f"demo: this command failed: python {shlex.join(words)}")


def check_export(path: Path) -> None:
    """The exported file loads strictly into the torch model, whose logits equal ours."""
    model = tj.load(ROOT / OUT / "run")
    config = model.model.config
    reference = UnifiedVoice(
        layers=config.layers,
        model_dim=config.width,
        heads=config.heads,
        max_text_tokens=config.text_positions - 2,
        max_mel_tokens=config.mel_positions - 4,
        number_mel_codes=config.mel_tokens,
        start_mel_token=config.start_mel,
        stop_mel_token=config.stop_mel,
    )
    reference.load_state_dict(torch.load(path, weights_only=True), strict=True)
    reference.eval()
    dataset = tj.Dataset.open(ROOT / OUT / "data")
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
    print(f"demo-output/voice.pth loads into the torch model; logits of a held-out clip differ by {error:.1e}")
    if not error <= TOLERANCE:
        sys.exit(f"demo: the exported model's logits differ by {error:.1e}, allowed {TOLERANCE:.0e}")


def compare() -> tuple[Figures, Figures, float]:
    """Draws every unseen sentence by the new voice before and after, and writes some to listen to and to look at.

    Returns the figures of both, and the speaker's own pitch in Hz.
    """
    models = {"before": load_pretrained(ROOT / OUT / "tortoise"), "after": load_pretrained(ROOT / OUT / "run")}
    sentences = (ROOT / PAIR / "unseen/sentences.txt").read_text(encoding="utf-8").splitlines()
    renderings = Renderings.read(ROOT / PAIR / "unseen" / VOICE, sentences, models["before"].mel_norms)
    clips = [read_audio(path) for path in sorted((ROOT / PAIR / "voice/wavs").iterdir())[:CONDITIONING]]
    drawn = {name: spoken.draw(model, clips, sentences) for name, model in models.items()}
    found = {name: spoken.figures(models[name], drawn[name], renderings) for name in models}
    write_sounds(models, drawn)
    picture(models, drawn, renderings)
    loss_curve(History.to_read(ROOT / OUT / "run"))
    figures = {name: dataclasses.asdict(one) for name, one in found.items()}
    (ROOT / OUT / "figures.json").write_text(
        json.dumps(figures | {"speaker's pitch": renderings.pitch}, indent=2) + "\n"
    )
    return found["before"], found["after"], renderings.pitch


def write_sounds(models: dict[str, Pretrained], drawn: dict[str, sampler.Samples]) -> None:
    for name, model in models.items():
        for i in range(TO_HEAR):
            dvae = model.dvae
            waveform = drafts.draft(dvae.variables, dvae.config, model.mel_norms, drawn[name].row(i))
            drafts.write_wav(ROOT / OUT / f"{i + 1}-{name}.wav", waveform)
    for i in range(TO_HEAR):
        original = read_audio(ROOT / PAIR / "unseen" / VOICE / f"{i + 1:02d}.ogg")
        drafts.write_wav(ROOT / OUT / f"{i + 1}-original.wav", original)


def picture(models: dict[str, Pretrained], drawn: dict[str, sampler.Samples], renderings: Renderings) -> None:
    """before-after.png: log-mels of the sentences to hear, as the model said them before and after, and the speaker."""
    from matplotlib.figure import Figure

    norms = models["before"].mel_norms
    rows: dict[str, Sequence[np.ndarray]] = {name: candidate_mels(models[name], drawn[name]) for name in models}
    rows["the speaker"] = renderings.mels
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(len(rows), TO_HEAR, sharey=True)
    longest = max(len(mel) for mels in rows.values() for mel in mels[:TO_HEAR])
    for number, (line, (name, mels)) in enumerate(zip(axes, rows.items(), strict=True), start=1):
        for i, (panel, mel) in enumerate(zip(line, mels, strict=False)):
            panel.imshow((mel * norms).T, origin="lower", aspect="auto", cmap="magma", vmin=-11.5, vmax=2)
            panel.set(xlim=(0, longest), xticks=[], yticks=[])
            if number == len(rows):
                panel.set_xlabel(f'"{renderings.sentences[i]}"', fontsize=13)
        line[0].set_ylabel(name, fontsize=13)
    figure.suptitle("Mel spectrograms (0 to 8 kHz) of three sentences that no clip says, one scale of time")
    figure.savefig(ROOT / OUT / "before-after.png", dpi=80)


def loss_curve(history: History) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*history.curve("train", "mel"), strict=True), alpha=0.5, label="training")
    axes.plot(*zip(*history.curve("validation", "mel"), strict=True), marker="o", label="held out")
    axes.set(xlabel="step", ylabel="mel loss, nats per code", title="Learning the new voice", ylim=(0, None))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(ROOT / OUT / "loss-curve.png", dpi=80)


def held_out_losses(run_folder: Path) -> tuple[float, float]:
    """The mel loss before, and of the best checkpoint."""
    losses = json.loads((run_folder / "summary.json").read_text())["validation_mel"]
    return losses[0][1], min(loss for _, loss in losses)


def show(before: Figures, after: Figures, pitch: float, loss_before: float, loss_after: float) -> None:
    lines = {
        "held-out mel loss": (f"{loss_before:.2f}", f"{loss_after:.2f}", "nats per code"),
        "say their own sentence": (f"{before.nearest:.0%}", f"{after.nearest:.0%}", "nearest of 40"),
        "distance to the speaker": (f"{before.ratio:.2f}", f"{after.ratio:.2f}", "1 is what the codes alone lose"),
        "stop by themselves": (f"{before.stops:.0%}", f"{after.stops:.0%}", ""),
        "pitch": (f"{before.pitch:.0f}", f"{after.pitch:.0f}", f"Hz; the speaker's is {pitch:.0f}"),
        "mean spectrum": (f"{before.level:.1f}", f"{after.level:.1f}", "dB away from the speaker's"),
    }
    print(f"\n{'':26}{'before':>8}{'after':>8}")
    for name, (first, second, what) in lines.items():
        print(f"  {name:24}{first:>8}{second:>8}  {what}")
    print("\nListen, in this order (demo-output/):")
    print("  1-before.wav    most words are right, the voice is another's")
    print("  1-after.wav     the same words by the new voice: a little lower, with another timbre")
    print("  1-original.wav  the synthesiser itself, whom the model heard say other sentences; then 2-… and 3-…")
    print("All of it sounds as through a telephone: 256 codes and Griffin-Lim. Look at before-after.png and")
    print("loss-curve.png; report.html plays the drafts of the run; voice.pth is the model for torch.")


def check(after: Figures, loss_left: float) -> None:
    """Ends with an error where the demo did not do what it is to show."""
    wrong = {
        f"the held-out loss fell to {loss_left:.0%} of the start's only": loss_left > LOSS_LEFT,
        f"only {after.stops:.0%} stop": after.stops < STOPS,
        f"a draft ends in {after.silence:.1f} s of silence": after.silence >= SILENCE,
        f"only {after.nearest:.0%} say their sentence": after.nearest < NEAREST,
        f"drafts are {after.ratio:.2f} x as far from the speaker as the codes alone": after.ratio > RATIO,
    }
    found = [what for what, is_so in wrong.items() if is_so]
    if found:
        sys.exit(f"demo: {'; '.join(found)}")


if __name__ == "__main__":
    main()
