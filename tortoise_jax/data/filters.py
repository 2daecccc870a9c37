"""Which clips are kept, and why the others are not: every reason and every rule. A clip has one reason at most."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np

from tortoise_jax.audio import MIN_SECONDS, SAMPLE_RATE, SILENT_DB
from tortoise_jax.data.clips import Clip, Sound
from tortoise_jax.text.cleaners import clean
from tortoise_jax.text.tokenizer import STOP_ID, Tokenizer

MAX_SECONDS, MAX_TEXT = 11.6, 200  # DLAS's
# Nobody speaks more characters per second, and a transcript with fewer leaves out what is said. The slack is for
# clips of a word or two, and for silence around them.
MAX_CHARACTERS_PER_SECOND, CHARACTERS_SLACK = 35.0, 10
MIN_CHARACTERS_PER_SECOND, SECONDS_SLACK = 1.5, 2.0


class Reason(enum.StrEnum):
    """Why a clip is rejected, in the order of the checks; reports and files show these words."""

    MALFORMED = "malformed line"
    NO_TRANSCRIPT = "no transcript"
    MISSING = "missing"
    UNREADABLE = "unreadable"
    OUTSIDE = "outside the recording"
    TOO_SHORT = "too short"
    TOO_LONG = "too long"
    SILENT = "silent"
    EMPTY_TEXT = "empty text"
    UNKNOWN_CHARACTERS = "unknown characters"
    TEXT_TOO_LONG = "text too long"
    TEXT_TOO_LONG_FOR_AUDIO = "text too long for the audio"
    TEXT_TOO_SHORT_FOR_AUDIO = "text too short for the audio"
    DUPLICATE = "duplicate"


Rejection = tuple[str, str]  # (reason, detail)
ACCEPTED: Rejection = ("", "")


@dataclasses.dataclass(frozen=True)
class ClipLimits:
    """The longest clip, in seconds, and the longest text, in tokens; how recordings are heard.

    trim_silence: silent ends do not count, for they are cut off. channel: what is read of several, see `read_audio`.
    """

    seconds: float = MAX_SECONDS
    text_tokens: int = MAX_TEXT
    trim_silence: bool = False
    channel: int | str = 1


# --- clips with their sounds ------------------------------------------------------------------------------------------


def filter_clips(
    clips: Sequence[Clip], tokenizer: Tokenizer, cleaner: str, max_text: int
) -> tuple[list[Clip], list[Clip]]:
    """Measured clips -> (the kept ones, with their text ids; the rejected ones, with a reason), both in order.

    Of several clips of one sound the first is kept.
    """
    kept: list[Clip] = []
    rejected: list[Clip] = []
    first_with: dict[str, Clip] = {}
    for clip in clips:
        cleaned = clean(clip.text, cleaner)
        ids = tuple(tokenizer.encode_cleaned(cleaned))
        reason, detail = (
            _rejected_before(clip)
            or _rejected_for_text(clip.text, cleaned, ids, tokenizer, cleaner, max_text)
            or _rejected_for_pace(cleaned, clip.seconds)
            or _rejected_as_duplicate(clip, first_with.get(clip.sound.key))
            or ACCEPTED
        )
        if reason:
            rejected.append(dataclasses.replace(clip, reason=reason, detail=detail))
            continue
        first_with[clip.sound.key] = clip
        kept.append(dataclasses.replace(clip, cleaned=cleaned, text_ids=ids, text_tokens=len(ids)))
    return kept, rejected


def _rejected_before(clip: Clip) -> Rejection | None:
    """By the reader of its manifest, else by the measurement of its sound."""
    if clip.reason:
        return clip.reason, clip.detail
    return (clip.sound.reason, clip.sound.detail) if clip.sound.reason else None


def _rejected_for_text(
    text: str, cleaned: str, ids: Sequence[int], tokenizer: Tokenizer, cleaner: str, max_text: int
) -> Rejection | None:
    if not any(character.isalnum() for character in cleaned):
        return Reason.EMPTY_TEXT, f'no letter or digit in "{cleaned}"'
    if tokenizer.unknown_characters(cleaned, "none") or tokenizer.unknown_id in ids or STOP_ID in ids:
        unknown = tokenizer.unknown_in_words(text, cleaner) or "a token of it"
        return Reason.UNKNOWN_CHARACTERS, f"the tokenizer does not know {unknown}"
    if len(ids) > max_text:
        return Reason.TEXT_TOO_LONG, f"{len(ids)} tokens, at most {max_text}"
    return None


def _rejected_for_pace(cleaned: str, seconds: float) -> Rejection | None:
    characters = len(cleaned.strip())
    pace = f"{characters} characters in {seconds:.1f} s"
    if characters > MAX_CHARACTERS_PER_SECOND * seconds + CHARACTERS_SLACK:
        return Reason.TEXT_TOO_LONG_FOR_AUDIO, f"{pace}: more than {MAX_CHARACTERS_PER_SECOND:g} a second"
    if characters < MIN_CHARACTERS_PER_SECOND * (seconds - SECONDS_SLACK):
        return Reason.TEXT_TOO_SHORT_FOR_AUDIO, f"{pace}: fewer than {MIN_CHARACTERS_PER_SECOND:g} a second"
    return None


def _rejected_as_duplicate(clip: Clip, first: Clip | None) -> Rejection | None:
    if first is None:
        return None
    text = "same text" if first.text == clip.text else f'there with the text "{first.text}"'
    return Reason.DUPLICATE, f"the same recording as {first.where}, {text}"


# --- one sound --------------------------------------------------------------------------------------------------------


def rejected_for_span(span: tuple[float, float] | None, recording: np.ndarray) -> Rejection | None:
    """A span (seconds) that ends more than a second after its recording (samples,)."""
    length = len(recording) / SAMPLE_RATE
    if span is None or span[1] <= length + 1:
        return None
    return Reason.OUTSIDE, f"from {span[0]:.2f} to {span[1]:.2f} s, but the recording ends at {length:.2f} s"


def rejected_as_short(sound: Sound) -> Rejection | None:
    return (Reason.TOO_SHORT, f"{_length(sound)}, at least {MIN_SECONDS} s") if sound.seconds < MIN_SECONDS else None


def rejected_as_long(sound: Sound, limits: ClipLimits) -> Rejection | None:
    if sound.seconds > limits.seconds:
        return Reason.TOO_LONG, f"{_length(sound)}, at most {limits.seconds:g} s"
    return None


def _length(sound: Sound) -> str:
    whole = (sound.samples + sound.trimmed) / SAMPLE_RATE
    return f"{sound.seconds:.2f} s" + (f" ({whole:.2f} s before trimming)" if sound.trimmed else "")


def rejected_as_silent(sound: Sound) -> Rejection | None:
    if sound.loudness_db < SILENT_DB:
        return Reason.SILENT, f"loudness {sound.loudness_db:.0f} dB, at least {SILENT_DB:.0f} dB"
    return None
