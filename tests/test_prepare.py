"""From recordings to a data set: every line accounted for, every reason met, nothing done twice."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import soundfile

import tortoise_jax
from tests.support.parity import Twin
from tests.support.recordings import VOICE, checkpoint_at, write_speech
from tortoise_jax.audio import default_mel_norms, int16_from_waveform, read_audio, trim_silence
from tortoise_jax.checkpoints.pretrained import load_pretrained, mel_norms_digest
from tortoise_jax.data import groups, shards
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.data.encoding import CodeEncoder
from tortoise_jax.data.filters import Reason
from tortoise_jax.data.preparation import Options, check, prepare
from tortoise_jax.data.recordings import Recording
from tortoise_jax.errors import UserError
from tortoise_jax.files import locked
from tortoise_jax.text.cleaners import recorded
from tortoise_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, dvae: Twin, voice: Twin) -> Path:
    return checkpoint_at(tmp_path_factory.mktemp("checkpoint") / "tiny", dvae, voice)


@pytest.fixture(scope="module")
def encoded_clips(monkeypatch_module: pytest.MonkeyPatch) -> list[int]:
    """How many clips each call of the encoder was given."""
    calls: list[int] = []
    encode = CodeEncoder.encode

    def counted(self: CodeEncoder, waveforms: list[np.ndarray], *rest: object) -> list[np.ndarray]:
        calls.append(len(waveforms))
        return encode(self, waveforms, *rest)

    monkeypatch_module.setattr(CodeEncoder, "encode", counted)
    return calls


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


QUICK = Options(workers=0, max_rejected=1.0)


# --- every line is accounted for --------------------------------------------------------------------------------------

TEXT = "The kettle is on the stove."
FAULTS = {
    "malformed line": "a|b|c|d",
    "no transcript": None,
    "missing": f"nowhere|{TEXT}",
    "unreadable": f"broken|{TEXT}",
    "outside the recording": None,
    "too short": f"short|{TEXT}",
    "too long": f"long|{TEXT}",
    "silent": f"silent|{TEXT}",
    "empty text": "speech01|...",
    "unknown characters": "speech02|50 % of {it}",
    "text too long": f"speech03|{'t ' * 35}",
    "text too long for the audio": f"speech04|{TEXT * 3} The kettle",
    "text too short for the audio": "hum|Hm",
    "duplicate": f"copy|{TEXT}",
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three inputs that together have a line for every reason, and twelve good ones."""
    root = tmp_path_factory.mktemp("faulty")
    lj, wavs = root / "ann", root / "ann" / "wavs"
    wavs.mkdir(parents=True)
    for i in range(17):
        write_speech(wavs / f"speech{i:02}.wav", i)
    rng = np.random.default_rng(0)
    (wavs / "broken.wav").write_bytes(b"RIFF and nothing more")
    soundfile.write(wavs / "short.wav", 0.1 * rng.standard_normal(13_000), 22050)
    soundfile.write(wavs / "long.wav", 0.1 * rng.standard_normal(5 * 22050), 22050)
    soundfile.write(wavs / "silent.wav", 1e-4 * rng.standard_normal(30_000), 22050)
    soundfile.write(wavs / "hum.wav", 0.1 * rng.standard_normal(round(3.9 * 22050)), 22050)
    (wavs / "copy.wav").write_bytes((wavs / "speech05.wav").read_bytes())
    good = [f"speech{i:02}|{TEXT} {'abcdefghijkl'[i - 5]}" for i in range(5, 17)]
    (lj / "metadata.csv").write_text("\n".join([*good, *filter(None, FAULTS.values())]))
    folder = root / "bob"
    folder.mkdir()
    write_speech(folder / "no_text.flac", 20)
    spans = root / "spans.jsonl"
    spans.write_text(json.dumps({"audio": "ann/wavs/speech00.wav", "text": TEXT, "start": 50, "end": 52}))
    return [lj, folder, spans]


@pytest.fixture(scope="module")
def limits() -> Options:
    return Options(workers=0, max_seconds=4.0, max_text=66, max_rejected=1.0)


def reasons_of(out: Path) -> Counter[str]:
    with (out / "rejected.tsv").open(encoding="utf-8") as file:
        return Counter(row["reason"] for row in csv.DictReader(file, delimiter="\t"))


def test_every_reason_is_met_once_and_every_count_adds_up(faulty, checkpoint, tmp_path, limits, capsys):
    lj, folder, spans = faulty
    report = prepare(lj, checkpoint, tmp_path / "set", limits)
    want = {reason: 1 for reason, line in FAULTS.items() if line}
    assert {reason: amount["lines"] for reason, amount in report["reasons"].items()} == want
    assert reasons_of(tmp_path / "set") == want
    lines = len((lj / "metadata.csv").read_text().splitlines())
    assert report["lines"] == lines == report["kept"]["lines"] + report["rejected"]["lines"] == 12 + len(want)
    assert sum(split["lines"] for split in report["splits"].values()) == 12
    assert sum(amount["hours"] for amount in report["reasons"].values()) == pytest.approx(report["rejected"]["hours"])
    shown = capsys.readouterr().out
    assert all(reason in shown for reason in want)
    with pytest.raises(UserError, match=r"1 of 1 lines are rejected .* the commonest reason is no transcript \(1\)"):
        check(folder, checkpoint, Options(workers=0, format="folder"))
    (tmp_path / "metadata.csv").write_text("a,One\n")
    with pytest.raises(UserError, match=r"reason is malformed line \(1\), e.g. \S+/metadata.csv:1: 1 column, expected"):
        check(tmp_path, checkpoint, Options(workers=0))
    with pytest.raises(UserError, match=r"1 of 1 lines .* the commonest reason is outside the recording \(1\)"):
        check(spans, checkpoint, Options(workers=0))
    assert set(want) | {"no transcript", "outside the recording"} == set(Reason)


def test_every_rejected_line_says_where_and_why(faulty, checkpoint, tmp_path, limits):
    prepare(faulty[0], checkpoint, tmp_path / "set", limits)
    with (tmp_path / "set" / "rejected.tsv").open(encoding="utf-8") as file:
        rows = {row["reason"]: row for row in csv.DictReader(file, delimiter="\t")}
    lines = (faulty[0] / "metadata.csv").read_text().splitlines()
    for reason, row in rows.items():
        assert row["file"] == str(faulty[0] / "metadata.csv")
        assert lines[int(row["line"]) - 1] == FAULTS[reason]
    details = {reason: row["detail"] for reason, row in rows.items()}
    assert details["too short"] == "0.59 s, at least 0.6 s"
    assert details["too long"] == "5.00 s, at most 4 s"
    assert details["silent"] == "loudness -80 dB, at least -60 dB"
    assert details["missing"] == "there is no such file"
    assert details["unknown characters"] == "the tokenizer does not know % (U+0025) { (U+007B) } (U+007D)"
    assert details["text too long"] == "69 tokens, at most 66"
    assert details["duplicate"].startswith(f"the same recording as {faulty[0] / 'metadata.csv'}:1, there with the text")
    assert details["text too short for the audio"] == "2 characters in 3.9 s: fewer than 1.5 a second"
    assert "more than 35 a second" in details["text too long for the audio"]


def test_check_reports_the_same_and_writes_nothing(faulty, checkpoint, tmp_path, limits, capsys):
    made = prepare(faulty[0], checkpoint, tmp_path / "set", limits)
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert check(faulty[0], checkpoint, limits) == made
    assert snapshot(tmp_path) == before
    listed = capsys.readouterr().out
    assert f"{faulty[0] / 'metadata.csv'}:13: malformed line: 4 columns" in listed


def test_check_lists_every_rejected_line_and_prepare_a_voice_on_another_channel(checkpoint, tmp_path, capsys):
    root = tmp_path / "ann"
    (root / "wavs").mkdir(parents=True)
    voice = 0.1 * np.random.default_rng(0).standard_normal(44100)
    soundfile.write(root / "wavs" / "right.wav", np.stack([np.zeros(44100), voice], axis=1), 22050)
    lines = [f"n{i}|{TEXT}" for i in range(60)]
    (root / "metadata.csv").write_text("\n".join([f"right|{TEXT}", *lines]))
    with pytest.raises(UserError, match=r"61 of 61 lines are rejected .* they are listed above"):
        check(root, checkpoint, QUICK)
    listed = capsys.readouterr().out
    assert all(f"metadata.csv:{i + 2}: missing" in listed for i in range(60))
    assert (
        "loudness -120 dB, at least -60 dB; channel 2 is not: save it as the first, or give prepare --channel 2"
        in listed
    )


def test_too_many_rejected_lines_fail_with_the_commonest_reason(faulty, checkpoint, tmp_path):
    options = Options(workers=0, max_seconds=1.9)
    with pytest.raises(UserError, match=r"of 24 lines are rejected \(\d+%, at most 20% .* reason is too long \("):
        prepare(faulty[0], checkpoint, tmp_path / "set", options)
    assert not (tmp_path / "set" / "dataset.json").exists()
    assert (tmp_path / "set" / "rejected.tsv").exists()


def test_the_report_counts_hours_speakers_and_splits(checkpoint, tmp_path):
    report = prepare(VOICE, checkpoint, tmp_path / "set", Options(workers=0, max_seconds=1.9, max_rejected=1.0))
    made = Dataset.open(tmp_path / "set")
    seconds = sum(clip.samples for clip in made.clips) / 22050
    assert report["kept"]["hours"] == pytest.approx(seconds / 3600, abs=1e-6)
    assert report["speakers"]["voice"]["lines"] == len(made)
    assert (
        report["speakers"]["voice"]["validation"] == len(made.split("validation")) == made.header["clips"]["validation"]
    )
    assert report["seconds"]["max"] <= 1.9
    listed = {i["path"]: (i["format"], i["lines"]) for i in report["inputs"]}
    assert listed == {str(VOICE): ("ljspeech", 48)}
    assert (tmp_path / "set" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "set" / "report.json").read_text()) == report


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_records_are_what_the_parts_make_of_a_line(checkpoint, tmp_path, dvae):
    prepare(VOICE, checkpoint, tmp_path / "set", QUICK)
    made = Dataset.open(tmp_path / "set")
    encoder, tokenizer = CodeEncoder(dvae.config, dvae.variables, default_mel_norms()), Tokenizer.default()
    rows = [line.split("|") for line in (VOICE / "metadata.csv").read_text(encoding="utf-8").splitlines()]
    assert [(clip.id, clip.text) for clip in made.clips] == [(name, text) for name, _, text in rows]
    waveforms = [int16_from_waveform(read_audio(VOICE / "wavs" / f"{name}.flac")) for name, _, _ in rows]
    for i, codes in enumerate(encoder.encode(waveforms)):
        record = made.read(i)
        np.testing.assert_array_equal(record.waveform, waveforms[i])
        np.testing.assert_array_equal(record.codes, codes)
        assert made.text_ids(i).tolist() == tokenizer.encode(rows[i][2])
    assert recorded(made.header) == "tortoise"
    assert made.tokenizer().digest == made.header["tokenizer_digest"] == tokenizer.digest


@pytest.mark.parametrize(
    ("suffix", "rate", "channels"), [("wav", 44100, 2), ("flac", 16000, 1), ("ogg", 48000, 2), ("mp3", 22050, 1)]
)
def test_recordings_of_any_kind(checkpoint, tmp_path, suffix, rate, channels):
    root = tmp_path / "ann"
    root.mkdir()
    for i in range(3):
        tone = 0.3 * np.sin(np.arange(rate * 2) * (0.05 + 0.01 * i))
        soundfile.write(root / f"{i}.{suffix}", np.stack([tone] * channels, axis=1), rate)
        (root / f"{i}.txt").write_text(f"Tone number {i} of three")
    prepare(root, checkpoint, tmp_path / "set", QUICK)
    clips = Dataset.open(tmp_path / "set").clips
    assert len(clips) == 3
    assert all(abs(clip.samples - 44100) <= 2500 for clip in clips)


def test_long_recordings_are_cut_at_whispers_segments(checkpoint, tmp_path, monkeypatch):
    root = tmp_path / "ann"
    root.mkdir()
    waveform = 0.1 * np.random.default_rng(0).standard_normal(10 * 22050)
    soundfile.write(root / "long.wav", waveform, 22050, subtype="PCM_16")
    segments = [{"start": s, "end": s + 2.0, "text": f"Number {s} is spoken."} for s in (0.5, 3.0, 6.0)]
    (root / "long.json").write_text(json.dumps({"segments": segments}))
    read = []
    monkeypatch.setattr(
        "tortoise_jax.data.recordings.read_audio",
        lambda path, channel: (read.append(path), read_audio(path, channel))[1],
    )
    prepare(root, checkpoint, tmp_path / "set", QUICK)
    made = Dataset.open(tmp_path / "set")
    whole = int16_from_waveform(read_audio(root / "long.wav"))
    for i, start in enumerate((0.5, 3.0, 6.0)):
        cut = whole[round(start * 22050) : round((start + 2.2) * 22050)]
        np.testing.assert_array_equal(made.waveform(i), cut)
    assert len(read) == 1, "a long recording is decoded once"


def test_silence_at_the_ends_is_cut_off_where_asked(growing, checkpoint, tmp_path, encoded_clips, capsys):
    wav = growing / "wavs" / "0.wav"
    spoken, _ = soundfile.read(wav)
    quiet = lambda seconds: np.zeros(round(seconds * 22050))
    soundfile.write(wav, np.concatenate([quiet(1), spoken, quiet(2)]), 22050, subtype="PCM_16")
    soundfile.write(growing / "wavs" / "1.wav", np.concatenate([spoken[:4000], quiet(2)]), 22050, subtype="PCM_16")
    trimming = dataclasses.replace(SMALL, trim_silence=True, max_rejected=0.2)
    prepare(growing, checkpoint, tmp_path / "set", SMALL)
    encoded_clips.clear()
    report = prepare(growing, checkpoint, tmp_path / "set", trimming)
    assert sum(encoded_clips) == 7, "a clip's codes are those of what is left of it"
    assert report["trimmed"]["lines"] >= 1
    assert report["trimmed"]["hours"] * 3600 == pytest.approx(2.8, abs=0.3)
    assert "silence cut off their ends" in capsys.readouterr().out
    made, whole = Dataset.open(tmp_path / "set"), int16_from_waveform(read_audio(wav))
    np.testing.assert_array_equal(made.waveform(0), int16_from_waveform(trim_silence(read_audio(wav))))
    assert len(whole) - made.clips[0].samples == pytest.approx(2.8 * 22050, abs=0.2 * 22050)
    (rejected,) = csv.DictReader((tmp_path / "set" / "rejected.tsv").read_text().splitlines(), delimiter="\t")
    assert rejected["reason"] == "too short"
    assert "before trimming" in rejected["detail"]
    prepare(growing, checkpoint, tmp_path / "fresh", trimming)
    assert snapshot(tmp_path / "set") == snapshot(tmp_path / "fresh")


def test_several_inputs_and_speakers_in_one_set(checkpoint, tmp_path):
    for name in ("ann", "bob"):
        (tmp_path / name / "wavs").mkdir(parents=True)
        for i in range(4):
            write_speech(tmp_path / name / "wavs" / f"{i}.wav", i + 4 * (name == "bob"))
        (tmp_path / name / "metadata.csv").write_text("".join(f"{i}|Sentence {'abcd'[i]} of four.\n" for i in range(4)))
    prepare([tmp_path / "ann", tmp_path / "bob"], checkpoint, tmp_path / "set", QUICK)
    made = Dataset.open(tmp_path / "set")
    assert [(clip.speaker, clip.id) for clip in made.clips][3:5] == [("ann", "3"), ("bob", "0#2")]
    held = {clip.text for clip in made.clips if clip.split == "validation"}
    assert len(held) == 1
    assert Counter(clip.speaker for clip in made.clips if clip.split == "validation") == {"ann": 1, "bob": 1}


def test_more_held_out_than_asked_for_is_said(checkpoint, tmp_path):
    """Five speakers, of whom each gives a clip; not where the lines say so, nor for one clip that is more than 5 %."""
    for speaker in range(5):
        (tmp_path / "all" / f"s{speaker}").mkdir(parents=True)
        for i in range(3):
            write_speech(tmp_path / "all" / f"s{speaker}" / f"{i}.wav", 3 * speaker + i)
            (tmp_path / "all" / f"s{speaker}" / f"{i}.txt").write_text(f"Sentence {'abc'[i]} of {'vwxyz'[speaker]}.")
    (warning,) = check(tmp_path / "all", checkpoint, QUICK)["warnings"]
    assert warning.startswith("33% of the clips are held out (5 of 15), --validation asks for 5%: every speaker gives")
    rows = [
        f"all/s{i // 3}/{i % 3}.wav\tSentence {'abcdefghijklmno'[i]}\t{'dev' if i < 9 else 'train'}" for i in range(15)
    ]
    (tmp_path / "table.tsv").write_text("audio\ttext\tsplit\n" + "\n".join(rows) + "\n")
    assert not check(tmp_path / "table.tsv", checkpoint, QUICK)["warnings"]
    assert not check(tmp_path / "all" / "s0", checkpoint, QUICK)["warnings"]


def test_a_recording_no_decoder_reads_is_a_rejected_line(checkpoint, tmp_path):
    """Whisper was given b.m4a: its segments are counted, not passed over."""
    segments = [{"start": s, "end": s + 0.9, "text": "Something said."} for s in (0.0, 1.0)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"segments": segments}))
    write_speech(tmp_path / "a.wav", 0)
    (tmp_path / "b.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + b"\0" * 100)
    report = check(tmp_path, checkpoint, QUICK)
    assert (report["lines"], report["reasons"]["unreadable"]["lines"]) == (4, 2)


def test_letters_of_another_language_are_warned_of(checkpoint, tmp_path, capsys):
    root = tmp_path / "ann"
    (root / "wavs").mkdir(parents=True)
    for i in range(3):
        write_speech(root / "wavs" / f"{i}.wav", i)
    (root / "metadata.csv").write_text("0|Schöne Grüße aus Köln\n1|Plain text of somebody\n2|Ещё один голос\n")
    report = prepare(root, checkpoint, tmp_path / "set", QUICK)
    (warning,) = report["warnings"]
    assert "changes letters in 2 of 3 texts" in warning
    assert 'ö to "o"' in warning
    assert '"Schöne Grüße aus Köln" becomes "schone grusse aus koln"' in warning
    assert "--cleaner basic" in warning
    assert warning in capsys.readouterr().out
    with pytest.raises(UserError, match="commonest reason is unknown characters"):
        prepare(root, checkpoint, tmp_path / "basic", Options(workers=0, cleaner="basic"))


def test_signs_are_said_by_the_cleaner_that_says_them(checkpoint, tmp_path):
    root = tmp_path / "ann"
    (root / "wavs").mkdir(parents=True)
    for i in range(4):
        write_speech(root / "wavs" / f"{i}.wav", i)
    (root / "metadata.csv").write_text(
        "0|Rock & roll is fun\n1|It is 50% of all\n2|Plain text here\n3|He owes £20 to us\n"
    )
    report = prepare(root, checkpoint, tmp_path / "set", QUICK)
    assert report["reasons"]["unknown characters"]["lines"] == 2
    rejected = (tmp_path / "set" / "rejected.tsv").read_text()
    assert "the tokenizer does not know & (U+0026); --cleaner english says them in words" in rejected
    report = prepare(root, checkpoint, tmp_path / "english", dataclasses.replace(QUICK, cleaner="english"))
    assert report["kept"]["lines"] == 4
    made = Dataset.open(tmp_path / "english")
    assert recorded(made.header) == "english"
    ids = Tokenizer.default().encode("he owes twenty pounds to us")
    assert made.text_ids(3).tolist() == ids


def test_clips_that_end_in_a_word_and_clips_alone_are_warned_of(checkpoint, tmp_path):
    for name in ("ann", "bob"):
        (tmp_path / name).mkdir()
        waveform = np.random.default_rng(len(name) + ord(name[0])).standard_normal(30_000) * 0.1
        waveform[-1000:] *= name == "ann"
        soundfile.write(tmp_path / name / "x.wav", waveform, 22050)
        (tmp_path / name / "x.txt").write_text(f"I am {name} speaking")
    report = prepare(tmp_path, checkpoint, tmp_path / "set", QUICK)
    assert report["conditioned_on_themselves"] == 2
    assert any(
        w.startswith("1 clip ends while somebody still speaks, e.g. ") and "ann/x.txt:1" in w
        for w in report["warnings"]
    )
    assert any(w.startswith("nothing is held out") for w in report["warnings"])
    assert any(w.startswith("2 clips with no other of the speaker") for w in report["warnings"])


# --- done once --------------------------------------------------------------------------------------------------------


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def growing(tmp_path: Path) -> Path:
    """A voice of eight clips; more can be written into it."""
    (tmp_path / "ann" / "wavs").mkdir(parents=True)
    grow(tmp_path / "ann", range(8))
    return tmp_path / "ann"


def grow(root: Path, numbers: range, first: str = "") -> None:
    for i in numbers:
        write_speech(root / "wavs" / f"{i}.wav", i)
    lines = [f"{i}|Sentence {'abcdefghijklmnop'[i]} of several.\n" for i in numbers]
    old = (root / "metadata.csv").read_text() if (root / "metadata.csv").exists() else ""
    (root / "metadata.csv").write_text("".join(lines) + old if first else old + "".join(lines))


SMALL = Options(workers=0, group=3)


def test_a_second_run_encodes_only_what_is_new(growing, checkpoint, tmp_path, encoded_clips):
    out, fresh = tmp_path / "set", tmp_path / "fresh"
    encoded_clips.clear()
    prepare(growing, checkpoint, out, SMALL)
    assert sum(encoded_clips) == 8
    before = snapshot(out)
    encoded_clips.clear()
    prepare(growing, checkpoint, out, SMALL)
    assert sum(encoded_clips) == 0
    assert snapshot(out) == before
    grow(growing, range(8, 10), first="in front")
    prepare(growing, checkpoint, out, SMALL)
    assert sum(encoded_clips) == 2
    prepare(growing, checkpoint, fresh, SMALL)
    assert snapshot(out) == snapshot(fresh), "as if it had been made at once"
    encoded_clips.clear()
    prepare(growing, checkpoint, out, Options(workers=0, group=3, max_text=60, seed=3, validation=0.3, max_seconds=9))
    assert sum(encoded_clips) == 0, "texts, splits and limits need no new codes"


def test_groups_are_named_as_in_the_first_version(growing, checkpoint, tmp_path):
    """So that a preparation begun then goes on."""
    digest_of = lambda value: hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
    dvae, norms = load_pretrained(checkpoint, ("dvae",)).dvae.digest, mel_norms_digest(default_mel_norms())
    codes = digest_of([1, dvae, [22050, 1024, 256, norms]])
    settings = {"codes": codes, "hearing": {"max_seconds": 9.5, "trim_silence": False}}
    files = [growing / "wavs" / f"{i}.wav" for i in range(8)]
    stated = [[str(path), path.stat().st_size, path.stat().st_mtime_ns, [None]] for path in files]
    prepare(growing, checkpoint, tmp_path / "set", dataclasses.replace(SMALL, max_seconds=9.5))
    names = {path.stem for path in (tmp_path / "set" / "finished").iterdir()}
    assert names == {digest_of([1, settings, stated[i : i + 3]]) for i in (0, 3, 6)}


def test_a_lower_limit_rejects_what_was_encoded(growing, checkpoint, tmp_path):
    prepare(growing, checkpoint, tmp_path / "set", SMALL)
    low = Options(workers=0, group=3, max_seconds=1.9, max_rejected=1.0)
    report = prepare(growing, checkpoint, tmp_path / "set", low)
    assert report["reasons"]["too long"]["lines"] > 0
    prepare(growing, checkpoint, tmp_path / "fresh", low)
    assert snapshot(tmp_path / "set") == snapshot(tmp_path / "fresh")


def test_what_killed_runs_left_is_removed_and_nothing_else(growing, checkpoint, tmp_path):
    prepare(growing, checkpoint, tmp_path / "set", SMALL)
    before = snapshot(tmp_path / "set")
    shard = f"shards/00007-{shards._content_digest(b'half')}.bin"
    leftovers = (".report.json.123.tortoise_jax-partial", "shards/.00000-00.bin.9.tortoise_jax-partial", shard)
    for name in leftovers:
        (tmp_path / "set" / name).write_bytes(b"half")
    shards.write_group(tmp_path / "set", 9, "0" * 32, "1" * 32, [], [])
    others = {"notes.txt", ".film.mp4.partial", "shards/notes.txt", "finished/notes.json"}
    others |= {f"shards/00000-{'0' * 16}.bin", f"finished/{'f' * 32}.json"}  # by chance named like ours
    for name in others:
        (tmp_path / "set" / name).write_text("somebody's")
    prepare(growing, checkpoint, tmp_path / "set", SMALL)
    after = snapshot(tmp_path / "set")
    assert {name: after.pop(name) for name in others} == dict.fromkeys(others, b"somebody's")
    assert after == before


def test_another_dvae_encodes_anew(growing, checkpoint, tmp_path, encoded_clips, dvae, voice):
    params = jax.tree.map(np.array, dvae.params)
    params["codebook"]["embed"][:] *= 1.01
    other = checkpoint_at(tmp_path / "other", Twin(dvae.config, params), voice)
    prepare(growing, checkpoint, tmp_path / "set", SMALL)
    encoded_clips.clear()
    prepare(growing, other, tmp_path / "set", SMALL)
    assert sum(encoded_clips) == 8
    prepare(growing, other, tmp_path / "fresh", SMALL)
    assert snapshot(tmp_path / "set") == snapshot(tmp_path / "fresh")


def test_a_changed_recording_is_encoded_anew(growing, checkpoint, tmp_path, encoded_clips):
    prepare(growing, checkpoint, tmp_path / "set", SMALL)
    write_speech(growing / "wavs" / "4.wav", 30)
    encoded_clips.clear()
    prepare(growing, checkpoint, tmp_path / "set", SMALL)
    assert sum(encoded_clips) == 1


def test_a_damaged_shard_is_made_again(growing, checkpoint, tmp_path, encoded_clips):
    out = tmp_path / "set"
    prepare(growing, checkpoint, out, SMALL)
    before = snapshot(out)
    sound = Dataset.open(out).clips[4].sound
    shard = out / "shards" / sound.shard
    content = bytearray(shard.read_bytes())
    content[sound.offset + 9] ^= 4
    shard.write_bytes(content)
    encoded_clips.clear()
    prepare(growing, checkpoint, out, SMALL)
    assert snapshot(out) == before
    assert sum(encoded_clips) == 1, "the other records of the shard are whole"


def test_a_checkpoint_that_is_not_there_is_said(growing, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        prepare(growing, tmp_path / "nowhere", tmp_path / "set", QUICK)


def test_what_is_not_ours_is_left_alone(growing, checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files and no data set"):
        prepare(growing, checkpoint, tmp_path / "mine", QUICK)
    with pytest.raises(UserError, match="is a file; --out must be a folder"):
        prepare(growing, checkpoint, tmp_path / "mine" / "thesis.txt", QUICK)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset.json", '{"name": "imagenet"}'),
        ("dataset.json", "not JSON"),
        ("finished/book.json", "{}"),
        (f"finished/{'0' * 32}.json", '{"chapter": 1}'),
        ("shards/00000.tar", "years of work"),
        (f"shards/00000-{'0' * 16}.bin", "years of work"),
        ("report.json", '{"quarter": 3}'),
    ],
)
def test_another_programs_folders_are_left_alone(growing, checkpoint, tmp_path, name, content):
    theirs = tmp_path / "theirs" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text(content)
    with pytest.raises(
        UserError, match=f"holds other files and no data set, e.g. {name}; choose a new or empty folder"
    ):
        prepare(growing, checkpoint, tmp_path / "theirs", QUICK)
    assert snapshot(tmp_path / "theirs") == {name: content.encode()}


def test_what_interrupted_preparations_leave_is_gone_on_with(growing, checkpoint, tmp_path, encoded_clips):
    """Killed before the index was written, or ended by too many rejected clips."""
    out = tmp_path / "set"
    prepare(growing, checkpoint, out, SMALL)
    whole = snapshot(out)
    shard = next((out / "shards").iterdir())
    for gone in (["dataset.json"], ["dataset.json", "clips.jsonl", "report.png"], [*before_the_report(out)]):
        for name in gone:
            (out / name).unlink()
        (out / "shards" / ".x.bin.1.tortoise_jax-partial").write_text("half")
        encoded_clips.clear()
        prepare(growing, checkpoint, out, SMALL)
        assert not encoded_clips
        assert snapshot(out) == whole
    (out / "dataset.json").write_text("{")
    shard.write_bytes(b"damaged")
    prepare(growing, checkpoint, out, SMALL)
    assert snapshot(out) == whole


def before_the_report(out: Path) -> list[str]:
    return [path.name for path in out.iterdir() if path.is_file()]


def test_a_data_set_of_other_recordings_is_not_replaced(growing, checkpoint, tmp_path):
    out, other = tmp_path / "set", tmp_path / "bob"
    prepare(growing, checkpoint, out, SMALL)
    before = snapshot(out)
    (other / "wavs").mkdir(parents=True)
    grow(other, range(8, 12))
    with pytest.raises(UserError, match=f"holds a data set of {growing}, which --data does not name"):
        prepare(other, checkpoint, out, SMALL)
    assert snapshot(out) == before
    prepare([growing, other], checkpoint, out, SMALL)
    assert len(Dataset.open(out)) == 12
    with pytest.raises(UserError, match=f"holds a data set of {growing}, which"):
        prepare(other, checkpoint, out, SMALL)
    (tmp_path / "moved").mkdir()
    growing.rename(tmp_path / "moved" / "ann")
    prepare([tmp_path / "moved" / "ann", other], checkpoint, out, SMALL)  # the same recordings in another place


def test_one_preparation_at_a_time(growing, checkpoint, tmp_path):
    with (
        locked(tmp_path / "set"),
        pytest.raises(UserError, match=rf"--out .*set is being written by .*{os.getpid()} on"),
    ):
        prepare(growing, checkpoint, tmp_path / "set", SMALL)
    prepare(growing, checkpoint, tmp_path / "set", SMALL)


def test_workers_find_the_same(growing, checkpoint, tmp_path):
    prepare(growing, checkpoint, tmp_path / "alone", SMALL)
    prepare(growing, checkpoint, tmp_path / "workers", Options(workers=2, group=3))
    assert snapshot(tmp_path / "alone") == snapshot(tmp_path / "workers")


def test_few_recordings_need_no_workers():
    recordings = [[Recording(Path("x.wav"))] * 10] * 3
    assert groups.workers_for(recordings, None) == 0
    assert groups.workers_for(recordings, 5) == 5
    assert groups.workers_for([[Recording(Path("x.wav"))] * (groups.FEW + 1)], None) >= 1


# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(max_seconds=1000.0), "--max_seconds 1000: the position table of the checkpoint's AR model holds"),
        (Options(max_text=403), "--max_text 403: the position table .* holds 402"),
        (Options(max_rejected=20), "--max_rejected 20: expected 0 to 1"),
        (Options(cleaner="german"), "--cleaner german: there is none, choose tortoise, english, basic, none"),
        (Options(workers=-1), "--workers -1: expected 0 to 1024"),
        (Options(format="wav"), 'unknown format "wav"'),
        (Options(tokenizer=Path("nowhere.json")), "nowhere.json: cannot be read"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        check(VOICE, None, options)


def test_limits_can_rise_to_what_the_tables_hold_and_fall_with_them(checkpoint):
    report = check(VOICE, None, Options(max_seconds=28.14, max_text=402, workers=0))
    assert (report["settings"]["seconds"], report["settings"]["text_tokens"]) == (28.14, 402)
    tiny = check(VOICE, checkpoint, QUICK)["settings"]
    held = int(((load_pretrained(checkpoint, ()).ar.config.mel_positions - 2) * 1024 - 1) / 22050 * 100) / 100
    assert tiny["seconds"] == min(11.6, held)


def test_a_tokenizer_of_ones_own_goes_with_the_data(checkpoint, tmp_path):
    merges = [line for line in bundled_merges() if not line.startswith("#")]
    own, larger = tmp_path / "own.txt", tmp_path / "larger.txt"
    own.write_text("\n".join([merges[0].replace("z", "zé", 1), *merges[1:-1]]) + "\n", encoding="utf-8")
    larger.write_text("\n".join([merges[0].replace("z", "zéè", 1), *merges[1:]]) + "\n", encoding="utf-8")
    options = Options(workers=0, tokenizer=own, cleaner="basic", max_rejected=1.0)
    prepare(VOICE, checkpoint, tmp_path / "set", options)
    made = Dataset.open(tmp_path / "set")
    assert made.tokenizer().digest == Tokenizer.from_file(own).digest == made.header["tokenizer_digest"]
    assert recorded(made.header) == "basic"
    options = Options(workers=0, tokenizer=larger, cleaner="basic", max_rejected=1.0)
    prepare(VOICE, checkpoint, tmp_path / "larger", options)
    assert Dataset.open(tmp_path / "larger").tokenizer().vocab_size == 257


def bundled_merges() -> list[str]:
    path = Path(tortoise_jax.__file__).parent / "assets" / "tokenizer_merges.txt"
    return path.read_text(encoding="utf-8").splitlines()


def test_a_full_disk_is_said(growing, checkpoint, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tortoise_jax.files.os.fsync", full)
    with pytest.raises(UserError, match=r"shards/00000-\w+\.bin: cannot be written \(No space left on device\)"):
        prepare(growing, checkpoint, tmp_path / "set", SMALL)
    assert not [path for path in (tmp_path / "set").rglob("*") if path.is_file()]
    monkeypatch.undo()
    prepare(growing, checkpoint, tmp_path / "set", SMALL)


def test_a_vanished_group_is_said(growing, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "read_group", lambda out, key, verify=False: None)
    with pytest.raises(UserError, match="vanished while it was needed; run again"):
        prepare(growing, checkpoint, tmp_path / "set", SMALL)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_a_line_a_minute_in_a_file(monkeypatch, capsys):
    heard = [SimpleNamespace(seconds=3600.0)] * 2
    monkeypatch.setattr(groups, "SECONDS_PER_LINE", 0)
    with groups.Progress(4, "encoding") as progress:
        progress.add(heard)
    assert capsys.readouterr() == ("encoding: 2 of 4 clips\n", "")
    monkeypatch.setattr("sys.stderr", Terminal())
    with groups.Progress(4, "encoding") as progress:
        progress.add(heard)
    assert "2/4" in sys.stderr.getvalue()
    assert "h of audio a minute" in sys.stderr.getvalue()
    assert capsys.readouterr().out == ""
