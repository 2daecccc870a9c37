"""Which lines become clips, and why the others do not. Every line is one or the other, with one reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from tortoise_jax.data.manifests import Line
from tortoise_jax.data.recordings import Sound
from tortoise_jax.text.tokenizer import STOP_ID, Tokenizer, clean, letters_changed

# Nobody speaks more characters a second, and a transcript with fewer leaves out what is said. The slack is for
# clips of a word or two, and for silence around them.
MAX_CHARACTERS_PER_SECOND, CHARACTERS_SLACK = 35.0, 10
MIN_CHARACTERS_PER_SECOND, SECONDS_SLACK = 1.5, 2.0

REASONS = (
    "malformed line",
    "no transcript",
    "missing",
    "unreadable",
    "outside the recording",
    "too short",
    "too long",
    "silent",
    "empty text",
    "unknown characters",
    "text too long",
    "text too long for the audio",
    "text too short for the audio",
    "duplicate",
)


@dataclasses.dataclass(frozen=True)
class Rejection:
    line: Line
    reason: str
    detail: str
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Kept:
    """A line that becomes a clip. cleaned: its text as the model is given it; place: of its sound among all sounds."""

    line: Line
    place: int
    sound: Sound
    cleaned: str
    text_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Changed:
    """A text of which the cleaner changed letters of another language."""

    line: Line
    before: str
    after: str
    letters: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Verdict:
    kept: list[Kept]
    rejected: list[Rejection]
    changed: list[Changed]


def judge(
    lines: Sequence[Line],
    places: Sequence[int | None],
    sounds: Sequence[Sound],
    tokenizer: Tokenizer,
    cleaner: str,
    max_text: int,
) -> Verdict:
    """lines[i] was found at sounds[places[i]], or nowhere. The order of lines alone decides which duplicate stays."""
    verdict = Verdict([], [], [])
    first_with: dict[str, Line] = {}
    for line, place in zip(lines, places, strict=True):
        sound = Sound("") if place is None else sounds[place]
        cleaned = clean(line.text, cleaner)
        ids = tuple(tokenizer.encode_cleaned(cleaned))
        found = (
            _problem_of_line(line)
            or _problem_of_sound(sound)
            or _problem_of_text(cleaned, ids, tokenizer, max_text)
            or _problem_of_both(cleaned, sound)
            or _problem_of_duplicates(line, first_with.get(sound.key))
        )
        if found:
            verdict.rejected.append(Rejection(line, *found, sound.seconds))
            continue
        assert place is not None
        first_with[sound.key] = line
        verdict.kept.append(Kept(line, place, sound, cleaned, ids))
        letters = letters_changed(line.text, cleaner)
        if letters:
            verdict.changed.append(Changed(line, line.text, cleaned, letters))
    return verdict


Found = tuple[str, str] | None


def _problem_of_line(line: Line) -> Found:
    return (line.reason, line.problem) if line.reason else None


def _problem_of_sound(sound: Sound) -> Found:
    return (sound.reason, sound.detail) if sound.reason else None


def _problem_of_text(cleaned: str, ids: Sequence[int], tokenizer: Tokenizer, max_text: int) -> Found:
    if not any(character.isalnum() for character in cleaned):
        return "empty text", f'no letter or digit in "{cleaned}"'
    unknown = tokenizer.unknown_characters(cleaned, "none")
    if unknown or tokenizer.unknown_id in ids or STOP_ID in ids:
        return "unknown characters", f"the tokenizer does not know {_listed(unknown)}"
    if len(ids) > max_text:
        return "text too long", f"{len(ids)} tokens, at most {max_text}"
    return None


def _listed(characters: Iterable[str]) -> str:
    return (
        " ".join(f"{c} (U+{ord(c):04X})" if c.isprintable() else f"U+{ord(c):04X}" for c in characters)
        or "a token of it"
    )


def _problem_of_both(cleaned: str, sound: Sound) -> Found:
    characters, seconds = len(cleaned.strip()), sound.seconds
    pace = f"{characters} characters in {seconds:.1f} s"
    if characters > MAX_CHARACTERS_PER_SECOND * seconds + CHARACTERS_SLACK:
        return "text too long for the audio", f"{pace}: more than {MAX_CHARACTERS_PER_SECOND:g} a second"
    if characters < MIN_CHARACTERS_PER_SECOND * (seconds - SECONDS_SLACK):
        return "text too short for the audio", f"{pace}: fewer than {MIN_CHARACTERS_PER_SECOND:g} a second"
    return None


def _problem_of_duplicates(line: Line, first: Line | None) -> Found:
    if first is None:
        return None
    text = "same text" if first.text == line.text else f'there with the text "{first.text}"'
    return "duplicate", f"the same recording as {first.where}, {text}"
