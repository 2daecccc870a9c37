"""What runs in a judge's own process: its torch never meets our JAX, and it may be another Python's.

  PYTHON judging.py words|likeness|quality FOLDER

FOLDER holds clips.npz, waveforms float32 (samples,) at 16 kHz named "0", "1", …, and options.json. It is given
answers.json: {"answers": one for each clip, "by": who judges}, or {"missing": why nobody can}. Nothing of this project
is imported here.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16000
CLIPS, OPTIONS, ANSWERS = "clips.npz", "options.json", "answers.json"
PAUSE = RATE // 5  # samples before and after a clip, for a recogniser that expects to be waited for
HISS = 1e-4  # of full scale, as any room has: of digital silence pocketsphinx makes words: twice the errors
GRAMMAR = "#JSGF V1.0; grammar words; public <said> = ( {} )+;"

Answers = tuple[list[Any], str]


def words(clips: Sequence[np.ndarray], options: dict[str, Any]) -> Answers:
    """The words of each clip, as one string.

    options: "whisper", the folder of a model, or "", and the "language" it is to recognise; "vocabulary", all words
    that can be said, or none where they are many.
    """
    if options["whisper"]:
        return whisper_words(clips, options["whisper"], options["language"])
    return sphinx_words(clips, options["vocabulary"])


def sphinx_words(clips: Sequence[np.ndarray], vocabulary: Sequence[str]) -> Answers:
    import pocketsphinx

    decoder, by = pocketsphinx.Decoder(samprate=RATE, loglevel="FATAL"), "pocketsphinx"
    known = [word for word in vocabulary if decoder.lookup_word(word)]
    if known:
        decoder.add_jsgf_string("words", GRAMMAR.format(" | ".join(known)))
        decoder.activate_search("words")
        unknown = sorted(set(vocabulary) - set(known))
        by += f" with a grammar of {len(known)} words" + (f", without {', '.join(unknown)}" if unknown else "")
    said, random = [], np.random.default_rng(0)
    for clip in clips:
        sound = np.pad(clip, PAUSE)
        sound += HISS * random.standard_normal(len(sound), np.float32)
        decoder.start_utt()
        decoder.process_raw(np.rint(np.clip(sound, -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        said.append(found.hypstr if found else "")
    return said, by


def whisper_words(clips: Sequence[np.ndarray], folder: str, language: str) -> Answers:
    from faster_whisper import WhisperModel

    model = WhisperModel(folder, device="cpu", compute_type="int8", local_files_only=True)
    parts = (model.transcribe(clip, language=language)[0] for clip in clips)
    return [" ".join(part.text.strip() for part in clip) for clip in parts], f"faster-whisper, {Path(folder).name}"


def likeness(clips: Sequence[np.ndarray], options: dict[str, Any]) -> Answers:
    """Each clip's embedding of its speaker, of length one."""
    # It cuts pauses out, by a package that no longer loads beside a current setuptools. Clips of a sentence have none.
    sys.modules.setdefault("webrtcvad", types.ModuleType("webrtcvad"))
    import resemblyzer
    from resemblyzer import hparams
    from resemblyzer.audio import normalize_volume

    encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)
    level = hparams.audio_norm_target_dBFS
    embed = lambda clip: encoder.embed_utterance(normalize_volume(clip, level, increase_only=True))
    return [embed(clip).tolist() for clip in clips], "Resemblyzer"


def quality(clips: Sequence[np.ndarray], options: dict[str, Any]) -> Answers:
    """What listeners would say of each clip as a whole, from 1 to 5."""
    from speechmos import dnsmos

    return [float(dnsmos.run(np.clip(clip, -1, 1), RATE)["ovrl_mos"]) for clip in clips], "DNSMOS"


JUDGES: dict[str, Callable[[Sequence[np.ndarray], dict[str, Any]], Answers]] = {
    "words": words,
    "likeness": likeness,
    "quality": quality,
}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    with np.load(folder / CLIPS) as file:
        clips = [file[str(i)] for i in range(len(file.files))]
    try:
        answers, by = JUDGES[name](clips, json.loads((folder / OPTIONS).read_text()))
        found: dict[str, Any] = {"answers": answers, "by": by}
    except ImportError as error:
        found = {"missing": str(error)}
    (folder / ANSWERS).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
