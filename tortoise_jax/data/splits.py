"""Which clips are held out: about the same part of every speaker, and never a text that is also trained on."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

SPLITS = TRAIN, VALIDATION = "train", "validation"
VALIDATION_PART = 0.05
NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "test"), VALIDATION),
}


def assign_splits(
    speakers: Sequence[str], texts: Sequence[str], given: Sequence[str], seed: int, part: float = VALIDATION_PART
) -> list[str]:
    """The split of each clip, from its speaker, its cleaned text and the split its line gives ("": none).

    If any line asks for validation, the lines decide: every other clip is trained on, unless its text is held out.
    Otherwise texts are held out by a hash of (seed, text) until every speaker has `part` of
    his clips held out, at least one; nobody's last text to train on is taken. Adding clips moves few others.
    """
    held_out = {text for text, split in zip(texts, given, strict=True) if split == VALIDATION}
    if not held_out:
        held_out = _chosen_texts(speakers, texts, seed, part)
    return [VALIDATION if text in held_out else TRAIN for text in texts]


def _chosen_texts(speakers: Sequence[str], texts: Sequence[str], seed: int, part: float) -> set[str]:
    clips = Counter(speakers)
    speakers_of: dict[str, Counter[str]] = defaultdict(Counter)
    texts_of: dict[str, set[str]] = defaultdict(set)
    for speaker, text in zip(speakers, texts, strict=True):
        speakers_of[text][speaker] += 1
        texts_of[speaker].add(text)
    held_out: set[str] = set()
    held_clips: Counter[str] = Counter()
    for speaker in sorted(clips):
        wanted = max(1, round(part * clips[speaker])) if part > 0 else 0
        for text in sorted(texts_of[speaker], key=lambda text: _rank(seed, text)):
            if held_clips[speaker] >= wanted:
                break
            leaves_train = all(held_clips[who] + count < clips[who] for who, count in speakers_of[text].items())
            if text not in held_out and leaves_train:
                held_out.add(text)
                held_clips += speakers_of[text]
    return held_out


def _rank(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed} {text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def moved_to_validation(splits: Sequence[str], given: Sequence[str]) -> int:
    """How many clips were asked to be trained on but share a held-out text."""
    return sum(split == VALIDATION and wanted == TRAIN for split, wanted in zip(splits, given, strict=True))
