"""Speaks a small vocabulary with espeak-ng: the recordings that the demo's pair is trained on, and its new voice.

  python demo/make_speech.py --out speech            six voices, 600 clips each
  python demo/make_speech.py --bundled --out demo    what is in the repository: the new voice, and unseen sentences

A sentence is two to five words in any order, so that none of the 40 unseen ones, which no clip says, can be known by
heart. espeak-ng 1.52 gives the same words in the same voices again (breath is noise, so not the same bits). Needs
`pip install espeakng-loader`.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import random
import sys
from pathlib import Path

import numpy as np
import soundfile

RATE = 22050  # what espeak-ng speaks at and TorToiSe reads
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "blue", "green", "white", "black", "yellow")
PLACES = ("london", "paris", "rome", "berlin", "madrid", "tokyo")
WORDS = DIGITS + COLOURS + PLACES
SHORTEST, LONGEST = 2, 5  # words of a sentence
UNSEEN = 40
# Speaker -> espeak-ng's voice, pitch (0 to 99) and words per minute.
BASE = {
    "alan": ("en-us", 42, 150),
    "brian": ("en-gb-x-rp+m3", 58, 160),
    "craig": ("en-gb-scotland+m7", 48, 145),
    "diana": ("en-us+f2", 48, 155),
    "emma": ("en-gb-x-rp+f4", 40, 145),
    "fiona": ("en-us+f3", 55, 160),
}
NEW = {"grace": ("en-us+f1", 52, 155)}
NEW_CLIPS = 100
UNSEEN_BY = {"emma": BASE["emma"], "grace": NEW["grace"]}  # who speaks the unseen sentences, to compare drafts with
PEAK = 0.8
SILENCE = 0.01  # of full scale, at PEAK
MARGIN = int(0.05 * RATE)  # of silence left at both ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder: wavs/ and metadata.csv")
    parser.add_argument("--clips", type=int, default=600, help="of each speaker (default %(default)s)")
    parser.add_argument("--bundled", action="store_true", help="write voice/ and unseen/ into --out instead")
    arguments = parser.parse_args()
    if arguments.bundled:
        write_bundled(arguments.out)
        return
    if arguments.out.exists():
        sys.exit(f"error: {arguments.out} exists already; remove it or give another --out")
    seconds = write(arguments.out, BASE, arguments.clips)
    print(f"{len(BASE)} x {arguments.clips} clips, {seconds / 60:.0f} min of speech in {arguments.out}")


def write_bundled(out: Path) -> None:
    write(out / "voice", NEW, NEW_CLIPS)
    synthesiser = Espeak()
    for speaker, voice in UNSEEN_BY.items():
        folder = out / "unseen" / speaker
        folder.mkdir(parents=True)
        for i, text in enumerate(unseen()):
            waveform = trimmed(synthesiser.say(text, *voice))
            soundfile.write(folder / f"{i + 1:02d}.ogg", waveform, RATE, format="OGG", subtype="VORBIS")
    (out / "unseen" / "sentences.txt").write_text("".join(f"{text}\n" for text in unseen()), encoding="utf-8")


def unseen() -> list[str]:
    """The sentences that no clip says: three or four words each."""
    draw = random.Random(0)
    return [sentence(draw, draw.choice((3, 4))) for _ in range(UNSEEN)]


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.sample(WORDS, words))


def texts(speaker: str, clips: int) -> list[str]:
    """What a speaker says; the same speaker always says the same."""
    draw, found = random.Random(speaker), []
    kept = set(unseen())
    while len(found) < clips:
        text = sentence(draw, draw.randint(SHORTEST, LONGEST))
        if text not in kept:
            found.append(text)
    return found


def write(out: Path, speakers: dict[str, tuple[str, int, int]], clips: int) -> float:
    """wavs/ and metadata.csv; returns the seconds of speech."""
    (out / "wavs").mkdir(parents=True)
    synthesiser, seconds = Espeak(), 0.0
    with (out / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("audio", "text", "speaker"))
        for speaker, (voice, pitch, pace) in speakers.items():
            for i, text in enumerate(texts(speaker, clips)):
                waveform = trimmed(synthesiser.say(text, voice, pitch, pace))
                name = f"wavs/{speaker}-{i + 1:04d}.flac"
                soundfile.write(out / name, waveform, RATE, subtype="PCM_16")
                table.writerow((name, text, speaker))
                seconds += len(waveform) / RATE
    return seconds


def trimmed(waveform: np.ndarray) -> np.ndarray:
    """At PEAK, without the silence at both ends but for MARGIN."""
    waveform = waveform * (PEAK / np.abs(waveform).max())
    loud = np.flatnonzero(np.abs(waveform) > SILENCE)
    return waveform[max(0, loud[0] - MARGIN) : loud[-1] + MARGIN]


class Espeak:
    """espeak-ng's library, as the wheel `espeakng-loader` has it with its voices."""

    SYNCHRONOUS, UTF8, PACE, PITCH = 2, 1, 1, 3  # constants of its speak_lib.h

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        rate = self._library.espeak_Initialize(self.SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        assert rate == RATE, f"espeak-ng speaks at {rate} Hz, expected {RATE}"
        self._spoken: list[np.ndarray] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = callback(self._receive)  # kept: the library holds no reference
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: ctypes._Pointer[ctypes.c_short], count: int, events: int) -> int:
        if samples and count:
            self._spoken.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, pitch: int, pace: int) -> np.ndarray:
        """The waveform (samples,) float64 at 22050 Hz. pace: words per minute."""
        self._spoken.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()):
            sys.exit(f"error: espeak-ng has no voice {voice}")
        self._library.espeak_SetParameter(self.PACE, pace, 0)
        self._library.espeak_SetParameter(self.PITCH, pitch, 0)
        content = text.encode()
        self._library.espeak_Synth(content, len(content) + 1, 0, 0, 0, self.UTF8, None, None)
        return np.concatenate(self._spoken) / 32768


if __name__ == "__main__":
    main()
