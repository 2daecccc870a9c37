"""Judges in their own processes: what they are given, and what is said where they cannot be asked.

Stand-ins have the packages' own names and calls; tests/test_evaluate_demo.py asks the real ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tortoise_jax.audio import SAMPLE_RATE
from tortoise_jax.errors import UserError
from tortoise_jax.evaluation import judges
from tortoise_jax.evaluation.judges import UnavailableError

NOISE = np.random.default_rng(0).standard_normal(SAMPLE_RATE).astype(np.float32) * 0.1
WORDS = {"whisper": "", "language": "en", "vocabulary": []}
PACKAGES = {
    "pocketsphinx.py": """
class Decoder:
    def __init__(self, samprate, loglevel): self.said = f"{samprate}"
    def lookup_word(self, word): return None if word == "xyzzy" else "W ER D"
    def add_jsgf_string(self, name, grammar): self.grammar = (name, grammar)
    def activate_search(self, name): assert name == self.grammar[0]; self.said = self.grammar[1]
    def start_utt(self): self.samples = 0
    def process_raw(self, data, full_utt): assert full_utt; self.samples = len(data) // 2
    def end_utt(self): pass
    def hyp(self):
        import types
        return types.SimpleNamespace(hypstr=f"{self.said} {self.samples}")
""",
    "resemblyzer/__init__.py": """
import webrtcvad, numpy
class VoiceEncoder:
    def __init__(self, device, verbose): assert (device, verbose) == ("cpu", False)
    def embed_utterance(self, clip): return numpy.array([len(clip), 0.5], numpy.float32)
""",
    "resemblyzer/hparams.py": "audio_norm_target_dBFS = -30",
    "resemblyzer/audio.py": "def normalize_volume(clip, level, increase_only): assert level == -30; return clip",
    "speechmos/__init__.py": "",
    "speechmos/dnsmos.py": """
import numpy
def run(clip, rate): return {"ovrl_mos": numpy.float64(3.25), "length": len(clip) / rate}
""",
    "faster_whisper.py": """
import types
class WhisperModel:
    def __init__(self, folder, device, compute_type, local_files_only): self.folder = folder
    def transcribe(self, clip, language):
        parts = (types.SimpleNamespace(text=text) for text in (" Guten", " Tag."))
        return parts, None
""",
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins that judges' processes import from."""
    for name, code in PACKAGES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("judge", "options", "answer", "by"),
    [
        ("words", WORDS, "16000 22400", "pocketsphinx"),
        (
            "words",
            WORDS | {"vocabulary": ["one", "two", "xyzzy"]},
            "#JSGF V1.0; grammar words; public <said> = ( one | two )+; 22400",
            "pocketsphinx with a grammar of 2 words, without xyzzy",
        ),
        ("words", WORDS | {"whisper": "/models/small", "language": "de"}, "Guten Tag.", "faster-whisper, small"),
        ("likeness", {}, [16000, 0.5], "Resemblyzer"),
        ("quality", {}, 3.25, "DNSMOS"),
    ],
)
def test_a_judge_hears_each_clip(packages: Path, judge: str, options: dict[str, Any], answer: Any, by: str) -> None:
    """At 16 kHz; clips of which nothing can be said are kept from him."""
    clips = [NOISE, np.zeros(0, np.float32), NOISE[:2000], np.zeros(SAMPLE_RATE, np.float32), NOISE]
    assert judges.ask(judge, clips, options) == judges.Answers([answer, None, None, None, answer], by)


def test_a_judge_who_is_not_there_is_named(packages: Path) -> None:
    (packages / "pocketsphinx.py").write_text("raise ModuleNotFoundError(\"No module named 'pocketsphinx'\")")
    with pytest.raises(UnavailableError, match=r"^No module named 'pocketsphinx'$"):
        judges.ask("words", [NOISE], WORDS)
    (packages / "speechmos" / "dnsmos.py").write_text("def run(clip, rate): raise ValueError('no model')")
    with pytest.raises(UnavailableError, match=r"^quality failed: ValueError: no model$"):
        judges.ask("quality", [NOISE], {})
    with pytest.raises(UnavailableError, match=r"^/no/python cannot be started: No such file"):
        judges.ask("words", [NOISE], WORDS, "/no/python")


def test_judges_leave_our_process_alone(packages: Path) -> None:
    judges.ask("likeness", [NOISE], {})
    assert not {"resemblyzer", "webrtcvad", "pocketsphinx"} & sys.modules.keys()


@pytest.mark.parametrize(("python", "why"), [("words", "No such file or directory"), ("false", "exit code 1")])
def test_what_is_no_python_is_refused(python: str, why: str) -> None:
    judges.check_python(sys.executable)
    with pytest.raises(UserError, match=rf"^--judges {python}: .*{why}; .*\(words, likeness, quality\)"):
        judges.check_python(python)
