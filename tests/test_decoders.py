"""Recordings that soundfile does not read, and those with several channels."""

from __future__ import annotations

import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from tests.support.recordings import RECORDINGS
from tortoise_jax import audio, decoders
from tortoise_jax.audio import read_audio
from tortoise_jax.data.filters import ClipLimits
from tortoise_jax.data.preparation import Options
from tortoise_jax.data.recordings import Recording, load_clips
from tortoise_jax.errors import UserError

RATE = 48_000
CODECS = {"a.m4a": "aac", "a.aac": "aac", "a.opus": "libopus", "a.webm": "libopus", "a.mka": "pcm_s16le"}


@pytest.fixture(scope="module")
def stereo() -> np.ndarray:
    """Two recordings, one on each channel, (2, samples) at 48 kHz."""
    sounds = [read_audio(path)[:30_000] for path in RECORDINGS[:2]]
    at = np.arange(65_000) * audio.SAMPLE_RATE / RATE
    return np.stack([np.interp(at, np.arange(len(sound)), sound) for sound in sounds])


def write(path: Path, sound: np.ndarray, codec: str) -> None:
    layout = {1: "mono", 2: "stereo"}[len(sound)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, layout=layout)
        for start in range(0, sound.shape[1], RATE // 10):
            samples = np.rint(sound[:, start : start + RATE // 10] * 32767).astype(np.int16).T.reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="s16", layout=layout)
            frame.sample_rate, frame.pts = RATE, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """The largest correlation at any shift of up to 50 ms, which is what encoders delay by."""
    part = other[5000:15_000]
    return max(np.corrcoef(one[start : start + len(part)], part)[0, 1] for start in range(5000, 6200))


@pytest.mark.parametrize("name", CODECS)
def test_what_phones_and_browsers_record_is_read(tmp_path: Path, stereo: np.ndarray, name: str) -> None:
    write(tmp_path / name, stereo, CODECS[name])
    soundfile.write(tmp_path / "a.wav", stereo.T, RATE, subtype="PCM_16")
    for channel in (1, 2, "mix"):
        wanted = read_audio(tmp_path / "a.wav", channel)
        found = read_audio(tmp_path / name, channel)
        assert found.dtype == np.float32
        assert abs(len(found) - len(wanted)) < 0.1 * audio.SAMPLE_RATE
        assert likeness(found, wanted) > (0.999 if CODECS[name] == "pcm_s16le" else 0.9)


def test_a_channel_is_chosen_or_all_are_mixed(tmp_path: Path, stereo: np.ndarray) -> None:
    soundfile.write(tmp_path / "a.wav", stereo.T, 22050, subtype="FLOAT")
    soundfile.write(tmp_path / "mono.wav", stereo[0], 22050, subtype="FLOAT")
    left, right = stereo.astype(np.float32)
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav"), left)
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 2), right)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", "mix"), (left + right) / 2, atol=1e-7)
    np.testing.assert_array_equal(read_audio(tmp_path / "mono.wav", 2), left)
    with pytest.raises(UserError, match=r"a.wav: has 2 channels, and channel 3 is asked for"):
        read_audio(tmp_path / "a.wav", 3)
    for wrong in (0, -1, "left", True, 1.5, 2000):
        with pytest.raises(UserError, match=r"--channel .*expected (its number, from 1, or mix|int)"):
            Options(channel=wrong).check()


def test_each_channel_of_a_recording_is_another_sound(tmp_path: Path, stereo: np.ndarray) -> None:
    """A data set that is prepared again with another channel must not find the codes of the first."""
    soundfile.write(tmp_path / "a.wav", stereo.T, 22050)
    heard = {c: load_clips(Recording(tmp_path / "a.wav"), ClipLimits(channel=c))[0] for c in (1, 2, "mix")}
    assert len({sound.key for sound, _ in heard.values()}) == 3
    assert not np.array_equal(heard[1][1], heard[2][1])


def test_a_silent_channel_of_a_video_is_pointed_out(tmp_path: Path, stereo: np.ndarray) -> None:
    write(tmp_path / "a.mka", stereo * [[0], [1]], "pcm_s16le")
    ((sound, _),) = load_clips(Recording(tmp_path / "a.mka"), ClipLimits())
    assert sound.reason == "silent"
    assert sound.detail.endswith("channel 2 is not: save it as the first, or give prepare --channel 2")


def test_what_is_damaged_is_one_line(tmp_path: Path, stereo: np.ndarray) -> None:
    for name in ("a.m4a", "a.mka", "a.aac"):
        write(tmp_path / name, stereo, CODECS[name])
    content = (tmp_path / "a.mka").read_bytes()
    (tmp_path / "half.mka").write_bytes(content[: len(content) // 2])
    (tmp_path / "half.m4a").write_bytes((tmp_path / "a.m4a").read_bytes()[:4000])
    (tmp_path / "empty.m4a").write_bytes(b"")
    (tmp_path / "text.m4a").write_text("Once upon a time, a text was named like a recording.")
    expected = {
        "half.mka": "the recording is truncated|damaged after",
        "half.m4a": r"not readable as audio \(Invalid data found when processing input\)$",
        "empty.m4a": "the file is empty",
        "text.m4a": "not readable as audio",
        "gone.m4a": "there is no such file",
    }
    for name, reason in expected.items():
        with pytest.raises(UserError, match=rf"{name}: ({reason})") as caught:
            read_audio(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_video_without_sound_is_said(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(UserError, match=r"a.mkv: there is no sound in it"):
        read_audio(tmp_path / "a.mkv")


def test_without_pyav_a_line_says_what_to_install(
    tmp_path: Path, stereo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.m4a", stereo, "aac")
    monkeypatch.setitem(sys.modules, "av", None)
    line = r"a.m4a: .m4a files need PyAV: pip install 'tortoise_jax\[av\]'; or save it as wav or flac"
    with pytest.raises(UserError, match=line):
        read_audio(tmp_path / "a.m4a")
    ((sound, _),) = load_clips(Recording(tmp_path / "a.m4a"), ClipLimits())
    assert (sound.reason, sound.detail[:9]) == ("unreadable", ".m4a file")


def test_what_macos_leaves_is_no_recording() -> None:
    names = ("a.wav", "A.M4A", "._a.wav", "a.txt", "a")
    assert [decoders.is_recording(Path(name)) for name in names] == [True, True, False, False, False]
