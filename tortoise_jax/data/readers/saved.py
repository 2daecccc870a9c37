"""What Hugging Face's datasets library saved: Arrow files, the recordings inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from tortoise_jax import arrow
from tortoise_jax.data.clips import Clip
from tortoise_jax.data.filters import Reason
from tortoise_jax.data.readers.names import CONTAINERS, clip_at, files_below, id_of, speaker_of
from tortoise_jax.data.readers.tables import TRANSCRIPTIONS
from tortoise_jax.data.splits import NAMES
from tortoise_jax.errors import UserError

SPEAKERS = ("speaker", "speaker_id")


def read_saved(folder: Path) -> Iterator[Clip]:
    """What `save_to_disk` wrote: one data set, or several in folders named after their splits. A clip for each row."""
    for file in saved_files(folder):
        yield from _clips(file, folder)


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder, without what the library keeps beside them of its own computations."""
    return [path for path in files_below(folder) if path.suffix == arrow.SUFFIX and not path.name.startswith("cache-")]


def _clips(file: Path, root: Path) -> Iterator[Clip]:
    recordings = arrow.recordings(file)
    said, whose = _column(file, TRANSCRIPTIONS), _column(file, SPEAKERS)
    if said is None:
        found = ", ".join(arrow.columns(file))
        raise UserError(f"{file}: no column of texts; expected one of {', '.join(TRANSCRIPTIONS)}, found {found}")
    texts = arrow.texts(file, said)
    speakers = arrow.texts(file, whose) if whose else [""] * len(texts)
    split = next((NAMES[part.lower()] for part in file.parent.relative_to(root).parts if part.lower() in NAMES), "")
    nobody = speaker_of(file, (*CONTAINERS, *NAMES, "data"))
    for number, (recording, text, speaker) in enumerate(zip(recordings, texts, speakers, strict=True), start=1):
        name = f"{file.stem}:{number}" if recording is None else id_of(recording.name)
        clip = clip_at(file, number, name, recording or file, text.strip())
        clip = dataclasses.replace(clip, speaker=speaker.strip() or nobody, split=split)
        yield (
            clip if recording else dataclasses.replace(clip, reason=Reason.MISSING, detail="the row holds no recording")
        )


def _column(file: Path, names: Sequence[str]) -> str | None:
    """The column with the first of these names, in whatever case."""
    lower = {column.lower(): column for column in arrow.columns(file)}
    return next((lower[name] for name in names if name in lower), None)
