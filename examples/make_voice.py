"""Speaks examples/voice/metadata.csv with espeak-ng into examples/voice/wavs: `python examples/make_voice.py`.

The same version of espeak-ng gives the same files again. Needs espeak-ng on the PATH; the demo does not need this
script, for its clips are in the repository.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

VOICE = Path(__file__).parent / "voice"
ESPEAK = ["espeak-ng", "-v", "en-gb", "-s", "160", "-p", "45", "--stdin", "--stdout"]
RATE = 22050  # what espeak-ng writes and TorToiSe reads
PEAK = 0.8
SILENCE = 0.01  # of full scale, at PEAK
MARGIN = int(0.05 * RATE)  # of silence left at both ends


def main() -> None:
    if shutil.which("espeak-ng") is None:
        sys.exit("error: espeak-ng is not installed (apt-get install espeak-ng)")
    (VOICE / "wavs").mkdir(exist_ok=True)
    lines = (VOICE / "metadata.csv").read_text(encoding="utf-8").splitlines()
    seconds = 0.0
    for line in lines:
        name, _, normalised = line.split("|")
        waveform = trimmed(speak(normalised))
        soundfile.write(VOICE / "wavs" / f"{name}.flac", waveform, RATE, subtype="PCM_16")
        seconds += len(waveform) / RATE
    print(f"{len(lines)} clips, {seconds:.0f} s of speech in {VOICE / 'wavs'}")


def speak(text: str) -> np.ndarray:
    wav = subprocess.run(ESPEAK, input=text.encode(), stdout=subprocess.PIPE, check=True).stdout
    waveform, rate = soundfile.read(io.BytesIO(wav))
    if rate != RATE:
        sys.exit(f"error: espeak-ng wrote {rate} Hz, expected {RATE}; use a voice of its own, not an MBROLA voice")
    return waveform * PEAK / np.abs(waveform).max()


def trimmed(waveform: np.ndarray) -> np.ndarray:
    loud = np.flatnonzero(np.abs(waveform) > SILENCE)
    return waveform[max(0, loud[0] - MARGIN) : loud[-1] + MARGIN]


if __name__ == "__main__":
    main()
