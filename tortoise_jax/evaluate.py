"""Which checkpoint of a run sounds best: drafts of unseen sentences by each, measured and judged beside recordings.

  python -m tortoise_jax.evaluate --run runs/voice

Losses do not say it. What does: how many drafts stop, silence after them, pitch and pace; and, each where its package
is installed (pip install 'tortoise_jax[evaluate]'), how many words a recogniser gets wrong (pocketsphinx, English), how
like the speaker the voice is (Resemblyzer) and how good it sounds (DNSMOS, 1 to 5). The same is asked of the speaker's
recordings and of the recordings through the dVAE's codes: no draft can be expected to be better. Writes a table to the
terminal, evaluation.json and the clips to the run, and adds both to its report.html.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tortoise_jax.checkpoints.parts import DVAE
from tortoise_jax.checkpoints.pretrained import load_pretrained
from tortoise_jax.errors import Parser, UserError, count_of, exit_with_one_line
from tortoise_jax.evaluation import judges, results, sounds, subject, table
from tortoise_jax.files import check_writable, locked
from tortoise_jax.synthesis.prompts import max_codes
from tortoise_jax.synthesis.sampler import SamplingOptions
from tortoise_jax.text.cleaners import recorded
from tortoise_jax.training import report
from tortoise_jax.training.drafts import conditioning_clips

ENGLISH = ("tortoise", "english")  # cleaners


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)

    # 1. The run, its data, and what is to be said, before anything large is read.
    run, settings = arguments.run, subject.run_settings(arguments.run)
    folder = (run / report.EVALUATION).parent
    check_writable(folder, "--run")
    pretrained = load_pretrained(run, (DVAE,))
    cleaner = recorded(pretrained.source)
    dataset = subject.find_dataset(arguments.data, settings, run)
    speaker = subject.find_speaker(arguments.speaker, dataset)
    references = sounds.reference_clips(dataset, speaker, arguments.clips)
    sentences = subject.find_sentences(arguments.text, settings["prompts"], dataset, references)
    subject.check_sentences(sentences, pretrained)
    options = SamplingOptions(temperature=arguments.temperature, repetition_penalty=arguments.repetition_penalty)
    options = dataclasses.replace(options, max_codes=min(options.max_codes, max_codes(pretrained.ar.config)))

    with locked(folder, "--run"):
        # 2. Recordings to compare with, and drafts by every checkpoint.
        evaluated = [sounds.recordings(dataset, references), sounds.copies(pretrained, dataset, references)]
        evaluated += sounds.other_speakers(dataset, speaker, arguments.others, arguments.clips)
        voice = conditioning_clips(dataset, speaker)
        for step in subject.steps_of(run):
            print(f"step {step}: {count_of(len(sentences), 'draft')}", flush=True)
            try:
                checkpoint = subject.checkpoint(run, settings, step, pretrained)
                evaluated.append(sounds.drafts(checkpoint, step, sentences, voice, arguments.seed, options))
            except UserError as error:
                print(f"step {step} is left out: {error}", flush=True)
        if evaluated[-1].step is None:
            raise UserError(f"--run {run}: no checkpoint can be evaluated; the lines above say why")

        # 3. Judges, each asked once for all.
        vocabulary = subject.small_vocabulary(dataset, sentences, cleaner)
        ask = functools.partial(ask_judge, arguments, cleaner, vocabulary)
        opinions = table.ask_all(ask, [waveform for one in evaluated for waveform in one.waveforms])

        # 4. What was found.
        rows = table.rows_of(evaluated, opinions, cleaner, table.held_out_losses(run))
        notes = [describe(speaker, dataset, references), *table.notes(opinions)]
        found = results.Findings(rows, table.advice(rows, str(run)), notes)
        print("\n".join(["", table.as_text(rows), "", *notes, "", found.advice]))
        print(results.leave(run, found, evaluated, opinions))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    usual = SamplingOptions()
    parser = Parser(__doc__, prog="python -m tortoise_jax.evaluate")
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="RUN", help="of the AR model")
    add("--data", type=Path, metavar="DATASET", help="what it was trained on, if that was moved")
    add("--text", type=Path, metavar="FILE", help="sentences to say, one per line, in place of the run's prompts")
    add("--speaker", metavar="NAME", help="of the data set (default: who has most clips)")
    add("--others", type=Path, metavar="DIR", help="clips of other speakers, where the data set has none")
    add("--clips", type=int, default=16, metavar="N", help="recordings to compare with (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the drafts (default: %(default)s)")
    add("--temperature", type=float, default=usual.temperature, help="of the drafts (default: %(default)s)")
    add("--repetition_penalty", type=float, default=usual.repetition_penalty, help="1: off (default: %(default)s)")
    add("--whisper", type=Path, metavar="DIR", help="a faster-whisper model, which recognises words in any language")
    add("--language", default="en", help="for --whisper (default: %(default)s)")
    add("--judges", default=sys.executable, metavar="PYTHON", help="the Python that has the judges, if not this one")
    arguments = parser.parse_args(argv)
    if arguments.clips < 1:
        raise UserError(f"--clips is {arguments.clips}, expected at least 1")
    if arguments.judges != sys.executable:
        judges.check_python(arguments.judges)
    if arguments.whisper and not (arguments.whisper / "model.bin").is_file():
        raise UserError(f"--whisper {arguments.whisper} holds no model.bin; give the folder of a faster-whisper model")
    return arguments


def ask_judge(
    arguments: argparse.Namespace, cleaner: str, vocabulary: list[str], judge: str, waveforms: Sequence[np.ndarray]
) -> judges.Answers:
    """What a judge says of all clips. Raises judges.UnavailableError."""
    options: dict[str, Any] = {}
    if judge == judges.WORDS:
        if cleaner not in ENGLISH and not arguments.whisper:
            raise judges.UnavailableError("pocketsphinx knows English alone; give --whisper DIR and --language")
        whisper = str(arguments.whisper.absolute()) if arguments.whisper else ""
        options = {"vocabulary": vocabulary, "whisper": whisper, "language": arguments.language}
    print(f"{judge}: {count_of(len(waveforms), 'clip')}", flush=True)
    return judges.ask(judge, waveforms, options, arguments.judges)


def describe(speaker: str, dataset: Any, references: Sequence[int]) -> str:
    held_out = sum(dataset.clips[i].split == "validation" for i in references)
    return f"recordings: {count_of(len(references), 'clip')} of {speaker or 'the voice'}, {held_out} of them held out"


if __name__ == "__main__":
    exit_with_one_line(main)
