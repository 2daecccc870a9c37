"""Manifests and recordings that nobody wrote on purpose: each ends in a report or in one line.

No other error, no hang, and no more than 2 GB. The quick profile is CI's; `make test-slow` runs 2,000 cases.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.recordings import RECORDINGS
from tortoise_jax.audio import read_audio
from tortoise_jax.errors import line_for_user
from tortoise_jax.prepare import main

QUICK, ALL = 60, 1000
LONGEST_SECONDS = 20
MOST_BYTES = 2 * 10**9


# --- manifests --------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    (
        *("", " ", "a", "a.wav", "wavs/a.flac", "A.WAV", "b", "nowhere.mp3", "/", "/etc/passwd", "..", "../../x", "."),
        *("a\0b", "x" * 300, "é" * 200 + ".wav", "\ud800", "\udc80.wav", "\u202e", "\x1b[2J", "\ufeff", "\u2028"),
        *('"', '"a', "'", "Hello there.", "R&B at 50%", "日本語", "① 🅰", "1" * 5000, "$1,2.3.4", "1e400", "NaN", "-1"),
        *("train", "dev", "odd"),
    )
)
TEXT = st.one_of(WORDS, st.text(max_size=20))
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 10**400, 1e308, float("inf"), float("nan"), True, None, "1"]), st.floats(), st.integers()
)
JSON = st.recursive(st.one_of(NUMBERS, TEXT), lambda inner: st.lists(inner, max_size=3), max_leaves=5)
SEPARATORS = st.sampled_from(["|", "\t", ",", ";", " | "])
ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\0"])
NAMES = ["audio", "text", "speaker", "split", "audio_file", "speaker_name", "client_id", "path", "sentence"]
NAMES += ["id", "raw_text", "normalized_text", "speaker_id", "start", "end", "Audio", "TEXT"]
NAMES += ["file_name", "transcription", "audio_filepath", "offset", "duration"]
ENCODINGS = st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "shift-jis"])
FILES = [
    "metadata.csv",
    "list.txt",
    "val.txt",
    "data.csv",
    "data.tsv",
    "data.jsonl",
    "a.json",
    "a.srt",
    "a.txt",
    "x",
    "metadata.jsonl",
]


@st.composite
def tables(draw: st.DrawFn) -> str:
    separator, end = draw(SEPARATORS), draw(ENDS)
    header = draw(st.lists(st.sampled_from(NAMES), max_size=5))
    rows = draw(st.lists(st.lists(TEXT, max_size=5), max_size=6))
    return end.join(separator.join(row) for row in [header, *rows])


@st.composite
def json_lines(draw: st.DrawFn) -> str:
    fields = st.fixed_dictionaries({}, optional=dict.fromkeys(["audio", "text", *NAMES], JSON) | {"segments": JSON})
    usual = st.fixed_dictionaries({"audio": TEXT, "text": TEXT, "start": NUMBERS, "end": NUMBERS})
    of_nemo = st.fixed_dictionaries({"audio_filepath": TEXT, "text": TEXT, "offset": NUMBERS, "duration": NUMBERS})
    segments = st.fixed_dictionaries({"segments": st.lists(st.one_of(usual, JSON), max_size=4)})
    rows = draw(st.lists(st.one_of(fields, usual, of_nemo, segments), max_size=4))
    return "\n".join(json.dumps(row) for row in rows) + draw(st.sampled_from(["", "{", "]" * 9, "[" * 20_000]))


@st.composite
def subtitles(draw: st.DrawFn) -> str:
    time = st.from_regex(r"[0-9]{1,6}:[0-9]{2}:[0-9]{2}[,.][0-9]{3}", fullmatch=True)
    blocks = draw(st.lists(st.tuples(TEXT, st.one_of(time, TEXT), st.one_of(time, TEXT), TEXT), max_size=4))
    return "\n\n".join(f"{number}\n{start} --> {end}\n{text}" for number, start, end, text in blocks)


@st.composite
def manifests(draw: st.DrawFn) -> tuple[str, bytes]:
    """The name and the bytes of a file."""
    text = draw(st.one_of(tables(), json_lines(), subtitles(), st.text(max_size=50)))
    content = text.encode(draw(ENCODINGS), draw(st.sampled_from(["replace", "backslashreplace"])))
    return draw(st.sampled_from(FILES)), draw(st.one_of(st.just(content), st.just(content), st.binary(max_size=60)))


# --- recordings -------------------------------------------------------------------------------------------------------


def encoded(suffix: str) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, read_audio(RECORDINGS[0])[:16_000], 22050, format=suffix.upper())
    return content.getvalue()


SOUNDS = {suffix: encoded(suffix) for suffix in ("wav", "flac", "ogg", "mp3")}
EDGES = st.sampled_from([0, 1, 2, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1])


@st.composite
def recordings(draw: st.DrawFn) -> tuple[str, bytes]:
    """The suffix and the bytes of a recording whose header was changed, or that was cut or grown."""
    suffix = draw(st.sampled_from(sorted(SOUNDS)))
    content = bytearray(SOUNDS[suffix])
    for _ in range(draw(st.integers(0, 4))):
        size, order = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from(["little", "big"]))
        place = draw(st.integers(0, min(len(content), 120) - size))
        value = draw(st.one_of(EDGES, st.integers(0, 2**32 - 1))) % 256**size
        content[place : place + size] = value.to_bytes(size, order)
    cut = draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    return suffix, bytes(content[:cut]) + draw(st.one_of(st.just(b""), st.binary(max_size=40)))


# --- what must come of them -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def assert_report_or_one_line(*data: Path) -> None:
    """`python -m tortoise_jax.prepare --data … --check`, in this process."""
    out, given = io.StringIO(), sys.argv
    sys.argv = ["prepare", "--data", *map(str, data), "--check", "--workers", "0", "--max_rejected", "1"]
    try:
        with within(LONGEST_SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            main()
    except Exception as error:
        line = line_for_user(error)
        if not line:
            raise
        assert "\n" not in line
        assert len(line) < 3000
    else:
        assert "kept" in out.getvalue()
    finally:
        sys.argv = given
    out.getvalue().encode()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak < MOST_BYTES, f"{peak / 1e9:.1f} GB"


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A new one with two good recordings."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "wavs").mkdir()
        for target in ("a.wav", "wavs/a.flac"):
            (Path(name) / target).write_bytes(SOUNDS[target[-3:].replace("lac", "flac")])
        yield Path(name)


def test_good_files_are_kept() -> None:
    """The fuzz would show nothing if whatever it begins with were rejected."""
    with folder() as root, contextlib.redirect_stdout(io.StringIO()) as out:
        shutil.copy(RECORDINGS[1], root / "b.flac")
        (root / "list.txt").write_text("b.flac|Hello there, you.\n")
        sys.argv, given = ["prepare", "--data", str(root / "list.txt"), "--check", "--workers", "0"], sys.argv
        try:
            main()
        finally:
            sys.argv = given
    assert "kept                                    1" in out.getvalue()


@pytest.mark.parametrize("cases", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)])
def test_any_manifest_ends_in_a_report_or_one_line(cases: int) -> None:
    @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck))
    @given(manifests(), st.booleans())
    @example(("data.jsonl", b'{"audio": "a.wav", "text": "x", "start": 0, "end": 1e400}'), True)
    @example(("data.jsonl", b'{"audio": "a.wav", "text": "x\\ud800"}'), True)
    @example(("metadata.csv", b"a\tb\t" + b"c" * 400), False)
    @example(("list.txt", "a.wav|x\n".encode("utf-16-le")), True)
    def case(file: tuple[str, bytes], alone: bool) -> None:
        with folder() as root:
            name, content = file
            (root / name).write_bytes(content)
            assert_report_or_one_line(root / name if alone else root)

    case()


@pytest.mark.parametrize("cases", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)])
def test_any_recording_ends_in_a_report_or_one_line(cases: int) -> None:
    @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck))
    @given(recordings())
    @example(("wav", SOUNDS["wav"][:24] + (1).to_bytes(4, "little") + SOUNDS["wav"][28:]))
    def case(recording: tuple[str, bytes]) -> None:
        with folder() as root:
            suffix, content = recording
            (root / f"b.{suffix}").write_bytes(content)
            (root / "b.txt").write_text("Hello there, you.")
            assert_report_or_one_line(root)

    case()


@pytest.mark.parametrize("suffix", sorted(SOUNDS))
def test_nothing_but_a_header_is_no_recording(suffix: str) -> None:
    for length in (0, 1, 12, 44, 60):
        with folder() as root:
            (root / f"b.{suffix}").write_bytes(SOUNDS[suffix][:length])
            (root / "b.txt").write_text("Hello there, you.")
            assert_report_or_one_line(root)


def test_the_sounds_are_sound() -> None:
    for suffix, content in SOUNDS.items():
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / f"a.{suffix}"
            path.write_bytes(content)
            assert np.abs(read_audio(path)).max() > 0.01
