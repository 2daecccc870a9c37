"""The whole way with the released files, checked step by step against tortoise-tts: what the tests cannot do.

  make verify VOICE=data             sets up what it needs, then runs:
  python convert/verify.py --voice data --tortoise .venv-tortoise/bin/python

Fetches the published files that are missing (4.3 GB, said first), checks their hashes where one is published, converts
them, compares every model with tortoise-tts's own classes value by value, trains twenty steps on the voice, exports,
loads the export strictly into tortoise-tts, speaks, and prints a table to paste into a report. Every step is a command
that is shown as it would be typed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from convert import download
from convert.command_line import positive
from convert.tables import MODELS
from tortoise_jax import __version__, api, parallel
from tortoise_jax.checkpoints.parts import (
    AR,
    CLVP,
    DIFFUSION,
    DVAE,
    HIFIGAN,
    PART_TYPES,
    RANDOM_AR,
    RANDOM_DIFFUSION,
    VOCODER,
)
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained
from tortoise_jax.data.manifests import read_inputs
from tortoise_jax.errors import Parser, UserError, exit_with_one_line
from tortoise_jax.models.clvp import CLVP as Clvp
from tortoise_jax.models.diffusion import DiffusionDecoder
from tortoise_jax.models.hifigan import Hifigan
from tortoise_jax.models.random_voice import RandomVoice
from tortoise_jax.models.unified_voice import CONDITIONING_VECTORS
from tortoise_jax.models.vocoder import UnivNet

ROOT = Path(__file__).parents[1]
LIMIT = 1e-3  # largest difference over largest value; float32 through thirty layers gives some 1e-6 to 1e-4
TEXT, CODES, FRAMES = 12, 40, 30
# The arrays that are compared, in words.
NAMES = {
    "voice": "AR model: vector of a voice",
    "latents": "AR model: hidden states at the codes",
    "scores": "CLVP: score",
    "diffusion_voice": "diffusion decoder: vector of a voice",
    "denoised": "diffusion decoder: one step",
    "waveform": "vocoder: waveform",
    "fast_waveform": "fast path's decoder: waveform",
    "random_voice": "random voices: AR half",
    "random_diffusion_voice": "random voices: diffusion half",
}
COMPARED = (AR, CLVP, DIFFUSION, VOCODER, HIFIGAN, RANDOM_AR, RANDOM_DIFFUSION)
SENTENCE = "Hello there, this is a test."
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the table. good: None where a step has nothing to be right or wrong about."""

    what: str
    found: str
    good: bool | None
    seconds: float = 0.0


class Steps:
    """Commands, run one after another, each with a row in the table; the first that fails ends them."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def run(self, what: str, *words: object) -> None:
        """A command of this project, or of the other Python where the first word names one."""
        started, command = time.perf_counter(), [str(word) for word in words]
        shown = shlex.join(command)
        print(f"\n$ {shown}", flush=True)
        done = subprocess.run(command, cwd=ROOT, check=False)
        self.lines.append(Line(what, "done" if not done.returncode else f"exit code {done.returncode}",
                               not done.returncode, time.perf_counter() - started))  # fmt: skip
        if done.returncode:
            raise UserError(f"{what}: failed with exit code {done.returncode}; its own words are above: {shown}")

    def check(self, what: str, found: str, good: bool | None) -> None:
        self.lines.append(Line(what, found, good))


# --- values -----------------------------------------------------------------------------------------------------------


def inputs_for(pretrained: Pretrained, seed: int = 0) -> Arrays:
    """What both sides compute from, of the sizes that the models have: the same for every run."""
    draw = np.random.default_rng(seed)
    ar = pretrained.ar.config

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape, np.float32)

    given: Arrays = {
        "mel": normal(100, ar.mel_channels) - 3,
        "text": draw.integers(1, ar.start_text, TEXT),
        "codes": draw.integers(0, ar.codes, CODES),
    }
    if CLVP in pretrained.parts:
        clvp = pretrained.part(CLVP).config
        given |= {"clvp_text": draw.integers(1, clvp.text_tokens, TEXT)}
        given |= {"clvp_codes": draw.integers(0, clvp.speech_tokens, CODES)}
    if DIFFUSION in pretrained.parts:
        diffusion = pretrained.part(DIFFUSION).config
        given |= {"latents": normal(CODES, diffusion.latent_width), "mel_24k": normal(FRAMES, diffusion.mel_channels)}
        given |= {"noise": normal(4 * CODES, diffusion.mel_channels), "step": np.array([1234])}
    if VOCODER in pretrained.parts:
        vocoder = pretrained.part(VOCODER).config
        given |= {"vocoder_mel": normal(FRAMES, vocoder.mel_channels) - 5}
        given |= {"vocoder_noise": normal(FRAMES, vocoder.noise_channels)}
    if HIFIGAN in pretrained.parts:
        hifigan = pretrained.part(HIFIGAN).config
        given |= {"fast_latents": normal(FRAMES, hifigan.latent_width), "fast_voice": normal(hifigan.voice_width)}
    if RANDOM_AR in pretrained.parts:
        given |= {"random_noise": normal(pretrained.part(RANDOM_AR).config.width)}
    if RANDOM_DIFFUSION in pretrained.parts:
        given |= {"random_diffusion_noise": normal(pretrained.part(RANDOM_DIFFUSION).config.width)}
    return given


def ours(pretrained: Pretrained, given: Arrays) -> Arrays:
    """By the names of tortoise_reference.py."""
    found: Arrays = {}
    model, rows = api.Tortoise(pretrained), lambda name: given[name][None]
    apply = lambda module, name, *arrays, **options: module.apply(pretrained.part(name).variables, *arrays, **options)
    voice = apply(model.model, AR, given["mel"][None, None], method="condition")[0, 0]
    row = model.batch([([int(i) for i in given["text"]], [int(c) for c in given["codes"]])])
    first = CONDITIONING_VECTORS + len(given["text"]) + 2
    hidden = model.outputs(voice[None], row)["hidden"][0, first : first + len(given["codes"])]
    found |= {"voice": np.asarray(voice), "latents": np.asarray(hidden)}
    if CLVP in pretrained.parts:
        module = Clvp(pretrained.part(CLVP).config)
        scores = apply(module, CLVP, rows("clvp_text").astype(np.int32), rows("clvp_codes").astype(np.int32))
        found["scores"] = np.asarray(scores["similarity"])
    if DIFFUSION in pretrained.parts:
        decoder = DiffusionDecoder(pretrained.part(DIFFUSION).config)
        vector = apply(decoder, DIFFUSION, given["mel_24k"][None, None], method="condition")
        aligned = apply(decoder, DIFFUSION, rows("latents"), vector, len(given["noise"]), method="align")["aligned"]
        steps = given["step"].astype(np.int32)
        denoised = apply(decoder, DIFFUSION, rows("noise"), steps, aligned, method="estimate")
        found |= {"diffusion_voice": np.asarray(vector[0]), "denoised": np.asarray(denoised[0])}
    if VOCODER in pretrained.parts:
        univnet = UnivNet(pretrained.part(VOCODER).config)
        found["waveform"] = np.asarray(
            apply(univnet, VOCODER, rows("vocoder_mel"), rows("vocoder_noise"))["waveform"][0]
        )
    if HIFIGAN in pretrained.parts:
        hifigan = Hifigan(pretrained.part(HIFIGAN).config)
        heard = apply(hifigan, HIFIGAN, rows("fast_latents"), rows("fast_voice"))
        found["fast_waveform"] = np.asarray(heard["waveform"][0])
    for part, name, noise in (
        (RANDOM_AR, "random_voice", "random_noise"),
        (RANDOM_DIFFUSION, "random_diffusion_voice", "random_diffusion_noise"),
    ):
        if part in pretrained.parts:
            converter = RandomVoice(pretrained.part(part).config)
            found[name] = np.asarray(apply(converter, part, rows(noise))[0])
    return found


def compare(of: str, mine: Arrays, theirs: Arrays) -> list[Line]:
    """A line for each array: the largest difference over the largest value."""
    lines = []
    for name, value in mine.items():
        what = f"{of} {NAMES[name]}"
        if name not in theirs or theirs[name].shape != value.shape:
            there = f"of shape {theirs[name].shape}" if name in theirs else "not computed"
            lines.append(Line(what, f"{there} there, {value.shape} here", False))
            continue
        apart = float(np.abs(value - theirs[name]).max() / max(np.abs(theirs[name]).max(), 1e-30))
        lines.append(Line(what, f"{apart:.1e} apart, at most {LIMIT:.0e}", apart <= LIMIT))
    return lines


# --- the whole way ----------------------------------------------------------------------------------------------------


def files(steps: Steps, folder: Path) -> None:
    """A line for each published file that is there: its size, and its hash where one is published."""
    for model in MODELS.values():
        path = folder / model.file
        if not path.exists():
            steps.check(model.file, "not there", None)
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        published = download.CHECKSUMS.get(model.file)
        known = "as published" if found == published else f"published is {published}" if published else "none published"
        size = path.stat().st_size / 1e6
        steps.check(
            model.file, f"{size:,.1f} MB, sha256 {found[:16]}… ({known})", None if not published else found == published
        )


def verify(
    folder: Path, voice: Path, tortoise: Path, out: Path, train_steps: int, sizes: Path | None, steps: Steps
) -> None:
    """Everything, in order. Raises UserError where a step fails."""
    python = sys.executable
    checkpoint, data, run, exported = (out / name for name in ("tortoise", "data", "run", "exported"))
    exported.mkdir(parents=True, exist_ok=True)
    files(steps, folder)
    if (checkpoint / "tortoise.json").exists():
        steps.check("converted", f"by an earlier verify; remove {checkpoint} to convert again", None)
    else:
        steps.run("converted", python, "convert/torch_to_flax.py", "--models", folder, "--out", checkpoint)
    values(steps, "released", checkpoint, folder, tortoise, out / "released", sizes)
    steps.check(f"released {PART_TYPES[DVAE].title}", "not compared: tortoise-tts has no class of it", None)
    prepare = ("-m", "tortoise_jax.prepare", "--data", voice, "--checkpoint", checkpoint, "--out", data)
    steps.run("prepared", python, *prepare)
    fields = [f"--config.{name}={value}" for name, value in {
        "checkpoint": checkpoint, "data": data, "steps": train_steps, "eval_every": train_steps, "export": "",
        "sample_every": 0, "patience": 0,
    }.items()]  # fmt: skip
    steps.run(
        f"trained {train_steps} steps", python, "train.py", "--config", "configs/ar.py", *fields, f"--workdir={run}"
    )
    target = exported / MODELS[AR].file
    steps.run("exported", python, "convert/flax_to_torch.py", run, "--out", target, "--step", train_steps)
    values(steps, "fine-tuned", run, exported, tortoise, out / "fine-tuned", sizes, train_steps)
    preset = (
        "ultra_fast" if all((folder / MODELS[part].file).exists() for part in (CLVP, DIFFUSION, VOCODER)) else "draft"
    )
    sound, step = out / "spoken.wav", ("--step", train_steps)
    steps.run(f"spoken ({preset}): {sound}", python, "-m", "tortoise_jax.speak", "--checkpoint", run, *step,
              "--text", SENTENCE, "--voice", clips_of(voice), "--preset", preset, "--out", sound)  # fmt: skip


def clips_of(voice: Path) -> Path:
    """The folder that the first of the recordings is in. Raises UserError where prepare would not read them."""
    [given] = read_inputs([voice])
    found = next((clip.audio.parent for clip in given.clips if clip.audio.is_file() and not clip.reason), None)
    if found is None:
        raise UserError(f"--voice {voice}: none of its recordings is a file; give a folder of recordings")
    return found


def values(
    steps: Steps,
    of: str,
    checkpoint: Path,
    folder: Path,
    tortoise: Path,
    out: Path,
    sizes: Path | None,
    step: int | None = None,
) -> None:
    """Compares the models of a checkpoint with tortoise-tts's, which load the torch files of a folder strictly."""
    metadata = load_pretrained(checkpoint, ())
    wanted = [name for name in COMPARED if (folder / MODELS[name].file).exists()]
    pretrained = load_pretrained(checkpoint, wanted, step).only(*(name for name in wanted if name in metadata.parts))
    given, theirs = inputs_for(pretrained), out.with_suffix(".theirs.npz")
    np.savez(out.with_suffix(".inputs.npz"), **given)  # type: ignore[arg-type]
    more = [sizes] if sizes else []
    reference = ROOT / "convert" / "tortoise_reference.py"
    steps.run(
        f"{of}: loaded strictly by tortoise-tts",
        tortoise,
        reference,
        folder,
        out.with_suffix(".inputs.npz"),
        theirs,
        *more,
    )
    with jax.default_matmul_precision("highest"):
        steps.lines += compare(of, ours(pretrained, given), dict(np.load(theirs)))


def table(lines: list[Line]) -> str:
    """Markdown, to paste."""
    good = {True: "yes", False: "**NO**", None: "–"}
    rows = [
        f"| {line.what} | {line.found} | {good[line.good]} | {f'{line.seconds:.0f} s' if line.seconds else ''} |"
        for line in lines
    ]
    machine = f"{parallel.describe()}, Python {platform.python_version()}, {platform.platform()}"
    about = f"tortoise_jax {__version__}, JAX {jax.__version__}, {machine}"
    return "\n".join([about, "", "| what | found | good | time |", "|---|---|---|---|", *rows])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--voice", type=Path, required=True, metavar="DIR", help="recordings with transcripts, as for prepare"
    )
    parser.add_argument(
        "--tortoise", type=Path, required=True, metavar="PYTHON", help="of an environment with tortoise-tts"
    )
    parser.add_argument(
        "--models", type=Path, default=Path("checkpoints"), metavar="DIR", help="of the published files (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("verify-output"), metavar="DIR", help="what is made (%(default)s)"
    )
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="to train (%(default)s)")
    parser.add_argument(
        "--sizes", type=Path, metavar="JSON", help="of other models than the released: see tortoise_reference.py"
    )
    parser.add_argument("--no_download", action="store_true", help="only the files that are there")
    arguments = parser.parse_args()
    for path, flag in ((arguments.voice, "--voice"), (arguments.tortoise, "--tortoise")):
        if not path.exists():
            raise UserError(f"{flag} {path}: there is no such file or folder")
    clips_of(arguments.voice)  # before gigabytes are fetched
    steps = Steps()
    try:
        if not arguments.no_download:
            for line in download.fetch(list(download.LOCATIONS), arguments.models):
                print(line, flush=True)
        verify(
            arguments.models.absolute(),
            arguments.voice.absolute(),
            arguments.tortoise.absolute(),  # not resolved: by its place Python knows its environment
            arguments.out.absolute(),
            arguments.steps,
            arguments.sizes.absolute() if arguments.sizes else None,
            steps,
        )
    finally:
        if steps.lines:
            print(f"\n{table(steps.lines)}", flush=True)
    wrong = [line.what for line in steps.lines if line.good is False]
    if wrong:
        raise UserError(f"not as it should be: {'; '.join(wrong)}; please report the table above")
    print("\nall is as it should be; the table above is what to paste into a report")


if __name__ == "__main__":
    exit_with_one_line(main)
