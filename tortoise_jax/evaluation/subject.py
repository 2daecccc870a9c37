"""What an evaluation is of: a run with its checkpoints, the speaker it was trained on, and what drafts are to say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tortoise_jax.checkpoints.parts import AR
from tortoise_jax.checkpoints.pretrained import (
    METADATA,
    RUN_CONFIG,
    Pretrained,
    load_pretrained,
    read_metadata,
    trained_part,
)
from tortoise_jax.checkpoints.run_checkpoints import RunCheckpoints, is_run
from tortoise_jax.data.dataset import Dataset, is_dataset
from tortoise_jax.errors import UserError
from tortoise_jax.evaluation.measures import words_of
from tortoise_jax.evaluation.sounds import Sentence
from tortoise_jax.files import read_json
from tortoise_jax.synthesis.prompts import max_text_ids
from tortoise_jax.text.cleaners import recorded
from tortoise_jax.training.run_data import digests_of, prepared_beside

SMALL_VOCABULARY = 300  # words: a recogniser is told that there are no others


def run_settings(run: Path) -> dict[str, Any]:
    """What a run of the AR model was begun with. Raises UserError where there is no such run."""
    metadata = read_metadata(run)
    if not is_run(run) or not (run / RUN_CONFIG).exists():
        raise UserError(f"--run {run} is a converted checkpoint, not a run; hear it: python -m tortoise_jax.speak")
    if trained_part(metadata) != AR:
        raise UserError(f"--run {run} trains the dVAE, which says nothing; its report has how much the codes lose")
    return dict(read_json(run / RUN_CONFIG))


def find_dataset(given: Path | None, settings: dict[str, Any], run: Path) -> Dataset:
    """The data set that a run was trained on. Raises UserError where it is not there, or another one is."""
    source = given or Path(settings["data"])
    if source.exists() and not is_dataset(source):
        source = prepared_beside(source)
    if not source.exists():
        raise UserError(f"{source}, which {run} was trained on, is not there; give --data")
    dataset = Dataset.open(source)
    if any(settings[name] != digest for name, digest in digests_of(dataset).items()):
        raise UserError(f"{source} is not what {run} was trained on: it holds, or holds out, other clips; give --data")
    return dataset


def find_speaker(given: str | None, dataset: Dataset) -> str:
    """The speaker of this name, else who has most clips to train on. Raises UserError."""
    clips = Counter(dataset.clips[i].speaker for i in dataset.split("train"))
    if given is not None and given not in clips:
        raise UserError(f"--speaker {given}: the speakers of {dataset.path} are {', '.join(sorted(clips))}")
    return given if given is not None else min(clips, key=lambda speaker: (-clips[speaker], speaker))


def find_sentences(
    file: Path | None, prompts: Sequence[str], dataset: Dataset, references: Sequence[int]
) -> list[Sentence]:
    """What drafts say: the lines of a file, else prompts, and the texts of those references that are held out."""
    try:
        lines = prompts if file is None else file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {file}: cannot be read: {error}") from None
    held_out = {
        dataset.clips[i].text: Sentence(dataset.clips[i].text, index)
        for index, i in enumerate(references)
        if dataset.clips[i].split == "validation"
    }
    given = dict.fromkeys(line.strip() for line in lines if line.strip())
    sentences = [*(Sentence(text) for text in given if text not in held_out), *held_out.values()]
    if not sentences:
        raise UserError("there is nothing to say: no clip is held out, and no sentence given; give --text FILE")
    return sentences


def check_sentences(sentences: Sequence[Sentence], pretrained: Pretrained) -> None:
    """Raises UserError for a text that the model does not know or has no room for."""
    cleaner, room = recorded(pretrained.source), max_text_ids(pretrained.ar.config)
    for sentence in sentences:
        unknown = pretrained.tokenizer.unknown_in_words(sentence.text, cleaner)
        tokens = len(pretrained.tokenizer.encode(sentence.text, cleaner))
        if unknown:
            raise UserError(f"{sentence.text!r} holds characters the tokenizer does not know: {unknown}")
        if not 0 < tokens <= room:
            raise UserError(f"{sentence.text!r} has {tokens} text tokens, the model has room for 1 to {room}")


def small_vocabulary(dataset: Dataset, sentences: Sequence[Sentence], cleaner: str) -> list[str]:
    """All words of the data set and the sentences, sorted; none where they are many."""
    texts = [*(clip.text for clip in dataset.clips), *(sentence.text for sentence in sentences)]
    words = sorted({word for text in texts for word in words_of(text, cleaner)})
    return words if len(words) <= SMALL_VOCABULARY else []


def steps_of(run: Path) -> list[int]:
    """The steps to evaluate: the start, and every checkpoint that the run kept."""
    return sorted({0, *RunCheckpoints.to_read(run).steps()})


def checkpoint(run: Path, settings: dict[str, Any], step: int, common: Pretrained) -> Pretrained:
    """What a run had at a step; the start, where it was not kept, is read from the checkpoint that it began with.

    common: what all steps share. Raises UserError.
    """
    if step or 0 in RunCheckpoints.to_read(run).steps():
        return common.with_part(AR, load_pretrained(run, (AR,), step).ar)
    origin = Path(settings["checkpoint"])
    if not (origin / METADATA).exists():
        raise UserError(f"{origin}, which the run began with, is not there")
    found = load_pretrained(origin, (AR,)).ar
    if found.config != common.ar.config:
        raise UserError(f"{origin} is no longer what the run began with")
    return common.with_part(AR, found)
