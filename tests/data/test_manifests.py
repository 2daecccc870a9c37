"""Every format is recognised, read line by line, and its faults are named where they stand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tortoise_jax.data.clips import Clip
from tortoise_jax.data.manifests import FORMATS, read_inputs, recognise
from tortoise_jax.errors import UserError


def tree(root: Path, files: dict[str, str]) -> Path:
    """Text files by name; anything with an audio suffix is just there."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    return root


def read(path: Path, format: str | None = None) -> list[Clip]:
    (one,) = read_inputs([path], format)
    return one.clips


def short(root: Path, lines: list[Clip]) -> list[tuple]:
    return [(line.number, str(line.audio.relative_to(root)), line.text, line.speaker, line.split) for line in lines]


def test_ljspeech_takes_the_normalised_column_where_there_is_one(tmp_path):
    root = tree(
        tmp_path / "ann",
        {
            "metadata.csv": "\ufeffa|In 1999|In nineteen ninety-nine\n\n"
            "b|Two columns\r\nc|Third is empty|\nd|1|2|3\ne\n",
            **dict.fromkeys(("wavs/a.wav", "wavs/b.flac", "wavs/c.mp3"), ""),
        },
    )
    lines = read(root)
    assert recognise(root) == recognise(root / "metadata.csv") == "ljspeech"
    assert short(root, lines) == [
        (1, "wavs/a.wav", "In nineteen ninety-nine", "ann", ""),
        (3, "wavs/b.flac", "Two columns", "ann", ""),
        (4, "wavs/c.mp3", "Third is empty", "ann", ""),
        (5, "wavs/d.wav", "", "ann", ""),
        (6, "wavs/e.wav", "", "ann", ""),
    ]
    assert [line.detail for line in lines][3:] == [
        "4 columns, expected ID|text or ID|text|normalised text",
        "1 column, expected ID|text or ID|text|normalised text",
    ]
    assert [line.id for line in lines][:2] == ["a", "b"]


def test_ljspeech_folders_in_a_folder_are_speakers(tmp_path):
    root = tree(tmp_path, {"ann/metadata.csv": "a|One\n", "bob/metadata.csv": "b|Two\n"})
    assert recognise(root) == "ljspeech"
    assert [(line.speaker, line.text) for line in read(root)] == [("ann", "One"), ("bob", "Two")]


def test_recordings_in_no_line_are_mentioned(tmp_path):
    root = tree(tmp_path, {"metadata.csv": "a|One\n", "wavs/a.wav": "", "wavs/b.wav": "", "wavs/c.wav": ""})
    (one,) = read_inputs([root])
    assert one.warnings == [f"{root}: 2 recordings are in no line of metadata.csv, e.g. b.wav"]


def test_lists_of_path_and_text(tmp_path):
    content = "audio/a.wav|One\naudio/b|Two\nc.wav\nd.wav|x|y\n"
    root = tree(tmp_path / "ann", {"train.txt": content, "val.txt": "a.wav|V\n", "audio/b.ogg": ""})
    assert recognise(root / "train.txt") == "list"
    lines = read(root / "train.txt")
    assert short(root, lines)[:2] == [
        (1, "audio/a.wav", "One", "ann", "train"),
        (2, "audio/b.ogg", "Two", "ann", "train"),
    ]
    assert [line.detail for line in lines[2:]] == ["1 column, expected path|text", "3 columns, expected path|text"]
    assert read(root / "val.txt")[0].split == "validation"


def test_csv_with_a_header(tmp_path):
    content = 'text,audio,speaker,split\n"One, ""two""",x/a.wav,ann,dev\n\n"Three\nfour",b.wav,,train\n'
    content += "x,c.wav,bob,later\nd.wav\n"
    root = tree(tmp_path / "voice", {"data.csv": content})
    assert recognise(root / "data.csv") == "table"
    lines = read(root / "data.csv")
    assert short(root, lines)[:2] == [
        (2, "x/a.wav", 'One, "two"', "ann", "validation"),
        (4, "b.wav", "Three\nfour", "voice", "train"),
    ]
    assert [(line.number, line.detail) for line in lines[2:]] == [
        (6, 'split "later", expected one of train, training, validation, valid, val, dev, eval, test'),
        (7, "1 column, the header has 4 (text, audio, speaker, split)"),
    ]


def test_an_open_quote_does_not_swallow_the_lines_behind_it(tmp_path):
    root = tree(tmp_path, {"data.csv": 'audio,text\na.wav,One\nb.wav,"Two\nc.wav,Three\n'})
    with pytest.raises(UserError, match=r"data.csv:3: not a row of csv \(unexpected end of data\)"):
        read(root / "data.csv")


def test_tsv_may_hold_quotes(tmp_path):
    root = tree(tmp_path, {"data.tsv": 'audio\ttext\na.wav\t"One\nb.wav\tTwo\n'})
    assert [line.text for line in read(root / "data.tsv")] == ['"One', "Two"]


def test_common_voice(tmp_path):
    content = "client_id\tpath\tsentence\tup_votes\nabc\tx.mp3\tHello\t2\n"
    root = tree(tmp_path, {"dev.tsv": content, "clips/x.mp3": ""})
    assert recognise(root / "dev.tsv") == "commonvoice"
    assert short(root, read(root / "dev.tsv")) == [(2, "clips/x.mp3", "Hello", "abc", "validation")]


def test_voxpopuli(tmp_path):
    header = "id\traw_text\tnormalized_text\tspeaker_id\tsplit\tgender\n"
    rows = "20090112-0900-PLENARY-3\tHello.\thello\t42\tdev\tm\n20100112-x\t\tbye\t43\ttrain\tf\n"
    root = tree(tmp_path, {"asr_train.tsv": header + rows})
    assert recognise(root / "asr_train.tsv") == "voxpopuli"
    assert short(root, read(root / "asr_train.tsv")) == [
        (2, "2009/20090112-0900-PLENARY-3.ogg", "Hello.", "42", "validation"),
        (3, "2010/20100112-x.ogg", "bye", "43", "train"),
    ]


def test_tables_of_xtts_trainers(tmp_path):
    root = tree(tmp_path, {"metadata_train.csv": "audio_file|text|speaker_name\nwavs/a.wav|One|coqui\n"})
    assert recognise(root / "metadata_train.csv") == "xtts"
    assert short(root, read(root / "metadata_train.csv")) == [(2, "wavs/a.wav", "One", "coqui", "")]


def test_csv_as_a_german_spreadsheet_saves_it(tmp_path):
    content = 'Audio;Text;Split\nwavs/a.wav;"Eins; ""zwei""";Train\nwavs/b.wav;Drei, vier;\nc.wav;zu;viel;hier\n'
    root = tree(tmp_path / "anna", {"data.csv": content})
    assert recognise(root / "data.csv") == "table"
    lines = read(root / "data.csv")
    assert short(root, lines)[:2] == [
        (2, "wavs/a.wav", 'Eins; "zwei"', "anna", "train"),
        (3, "wavs/b.wav", "Drei, vier", "anna", ""),
    ]
    assert lines[2].detail == "4 columns, the header has 3 (audio, text, split)"
    tree(root, {"broken.csv": 'Audio;Text\na.wav;"Eins\nb.wav;Zwei\n'})
    with pytest.raises(UserError, match=r"broken.csv:2: not a row of csv \(unexpected end of data\)"):
        read(root / "broken.csv")


LJSPEECH = "expected ID|text or ID|text|normalised text"
NAMED = "; if tabs separate it, its first line must name the columns, file_name and transcription"
AUDIO_FOLDERS = {
    "metadata.csv": (
        'File_Name,Transcription,speaker_id\na.wav,"One, two",ann\nb,Three,\ngone.mp3,Four,\nc.wav\n',
        "file_name,text\nd.wav,Five\n",
        "1 column, the header has 3 (file_name, transcription, speaker_id)",
    ),
    "metadata.jsonl": (
        '\n{"file_name": "a.wav", "transcription": "One, two", "speaker_id": "ann"}\n'
        '{"file_name": "b", "transcription": "Three", "label": 1}\n{"file_name": "gone.mp3", "transcription": "Four"}\n'
        '{"file_name": "c.wav", "label": 3}\n',
        '\n{"file_name": "d.wav", "text": "Five"}',
        'expected an object with strings "file_name" and "transcription", found "file_name"',
    ),
}


@pytest.mark.parametrize("name", AUDIO_FOLDERS)
def test_hugging_faces_audio_folder(tmp_path, name):
    trained, held_out, detail = AUDIO_FOLDERS[name]
    recordings = ("train/a.wav", "train/b.flac", "train/left_out.wav", "test/d.wav")
    files = {f"data/train/{name}": trained, f"data/test/{name}": held_out}
    root = tree(tmp_path / "voice", files | {f"data/{recording}": "" for recording in recordings})
    (one,) = read_inputs([root])
    assert one.format == recognise(root) == recognise(root / "data" / "train" / name) == "audiofolder"
    assert short(root, one.clips)[:4] == [
        (2, "data/test/d.wav", "Five", "voice", "validation"),
        (2, "data/train/a.wav", "One, two", "ann", "train"),
        (3, "data/train/b.flac", "Three", "voice", "train"),
        (4, "data/train/gone.mp3", "Four", "voice", "train"),
    ]
    assert [(clip.number, clip.reason, clip.detail) for clip in one.clips[4:]] == [(5, "malformed line", detail)]
    assert one.warnings == [f"{root}: 1 recording is in no line of {name}, e.g. left_out.wav"]


def test_an_audio_folder_without_transcripts_is_said(tmp_path):
    root = tree(tmp_path, {"metadata.csv": "file_name,label\na.wav,3\n", "a.wav": ""})
    with pytest.raises(UserError, match='no column "transcription"; expected a header with file_name'):
        read(root, "audiofolder")


def test_manifests_of_nemo(tmp_path):
    rows = [
        {"audio_filepath": "a.wav", "text": "One", "duration": 2.5},
        {"audio_filepath": "long.wav", "text": "Two", "duration": 1.5, "offset": 3, "speaker": 7},
        {"audio_filepath": "long.wav", "text": "Three", "offset": 3},
        {"audio_filepath": "long.wav", "text": "Four", "duration": "1", "offset": 3},
        {"audio_filepath": "long.wav", "text": "Five", "duration": 10**400, "offset": 0.5},
        {"audio_filepath": "long.wav", "text": "Six", "duration": 1.5, "offset": -(10**400)},
        {"audio_filepath": "b.wav"},
    ]
    content = "\n".join(json.dumps(row) for row in rows) + "\n{oops\n"
    root = tree(tmp_path / "voice", {"train_manifest.json": content, "val.jsonl": json.dumps(rows[0])})
    assert recognise(root / "train_manifest.json") == "nemo"
    lines = read(root / "train_manifest.json")
    assert short(root, lines)[:2] == [(1, "a.wav", "One", "voice", ""), (2, "long.wav", "Two", "7", "")]
    assert [(line.start, line.end) for line in lines][:2] == [(None, None), (3.0, 4.5)]
    assert [line.detail.split(":")[0][:26] for line in lines[2:]] == [
        "from 3 to None",
        "from 3 to '1'",
        "from 0.5 to 10000000000000",
        "from -10000000000000000000",
        "expected an object with st",
        "not JSON (Expecting proper",
    ]
    assert recognise(root / "val.jsonl") == "nemo"
    assert read(root / "val.jsonl")[0].split == "validation"


def test_metadata_may_name_paths(tmp_path):
    content = "wavs/a.wav|One\nwavs/b|Two\nc|Three\nwavs/gone.wav|Four\nwavs/e.wav\n"
    files = {"metadata.csv": content, **dict.fromkeys(("wavs/a.wav", "wavs/b.flac", "wavs/c.wav", "wavs/e.wav"), "")}
    root = tree(tmp_path / "ann", files)
    assert recognise(root) == "ljspeech"
    (one,) = read_inputs([root])
    assert short(root, one.clips) == [
        (1, "wavs/a.wav", "One", "ann", ""),
        (2, "wavs/b.flac", "Two", "ann", ""),
        (3, "wavs/c.wav", "Three", "ann", ""),
        (4, "wavs/gone.wav", "Four", "ann", ""),
        (5, "wavs/e.wav", "", "ann", ""),
    ]
    assert one.clips[4].reason == "malformed line"
    assert one.warnings == []


@pytest.mark.parametrize("name", ["metadata.csv", "list.txt"])
def test_paths_may_be_those_of_windows(tmp_path, name):
    root = tree(tmp_path / "ann", {name: "wavs\\a.wav|One\nwavs\\gone.wav|Two\n", "wavs/a.wav": ""})
    lines = read(root / name)
    assert lines[0].audio == root / "wavs" / "a.wav"
    assert not lines[1].audio.exists()


def test_objects_may_lie_in_a_text_file(tmp_path):
    root = tree(tmp_path, {"manifest.txt": '{"audio_filepath": "a.wav", "text": "One"}\n'})
    assert recognise(root / "manifest.txt") == "nemo"


def test_a_line_of_other_separators_says_what_to_do(tmp_path):
    root = tree(tmp_path, {"metadata.csv": "a.wav,One\nb.wav;Two\nc.wav\n"})
    named = NAMED.removeprefix("; if tabs")
    assert [line.detail.removeprefix(f"1 column, {LJSPEECH}") for line in read(root)] == [
        f"; if commas{named}", f"; if semicolons{named}", "",
    ]  # fmt: skip


def test_what_macos_leaves_beside_recordings_is_none(tmp_path):
    files = dict.fromkeys(("a.wav", "._a.wav", "._a.txt", "__MACOSX/._b.mp3", "._c.txt"), "")
    root = tree(tmp_path, {**files, "a.txt": "One"})
    assert [(clip.audio.name, clip.text) for clip in read(root)] == [("a.wav", "One")]


def test_a_file_of_the_datasets_library_is_said_to_be_one(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1\x00\xff")
    with pytest.raises(UserError, match=r"x.parquet: is a Parquet or Arrow file; give the folder it is in"):
        read(tmp_path / "x.parquet")


def test_jsonl(tmp_path):
    rows = [
        {"audio": "a.wav", "text": "One", "speaker": "ann", "split": "test"},
        {"audio": "b.wav", "text": "Two", "start": 1.5, "end": 3},
        {"audio": "b.wav", "text": "Two", "start": 3, "end": 2},
        {"audio": 3, "text": "x"},
    ]
    content = "\n".join(json.dumps(row) for row in rows) + "\n{oops\n"
    root = tree(tmp_path / "voice", {"data.jsonl": content})
    assert recognise(root / "data.jsonl") == "jsonl"
    lines = read(root / "data.jsonl")
    assert short(root, lines)[:2] == [(1, "a.wav", "One", "ann", "validation"), (2, "b.wav", "Two", "voice", "")]
    assert [(line.start, line.end, line.id) for line in lines][:2] == [(None, None, "a"), (1.5, 3.0, "b@1.50")]
    assert [line.detail.split(":")[0] for line in lines[2:]] == [
        "from 3 to 2",
        'expected an object with strings "audio" and "text", found "text"',
        "not JSON (Expecting property name enclosed in double quotes",
    ]


def test_a_unicode_line_separator_does_not_end_a_line(tmp_path):
    root = tree(tmp_path, {"train.txt": "a.wav|One\u2028two\x85\nb.wav|Three\n"})
    assert [(line.number, line.text) for line in read(root / "train.txt")] == [(1, "One\u2028two"), (2, "Three")]


def test_folder_of_recordings_with_texts(tmp_path):
    root = tree(
        tmp_path,
        {
            "ann/a.wav": "",
            "ann/a.txt": "One\ntwo\n",
            "bob/wavs/b.mp3": "",
            "bob/wavs/b.txt": "B",
            "c.wav": "",
            "d.txt": "D",
        },
    )
    assert recognise(root) == "folder"
    lines = read(root)
    assert [(str(line.audio.relative_to(root)), line.text, line.speaker, line.reason) for line in lines] == [
        ("ann/a.wav", "One two", "ann", ""),
        ("bob/wavs/b.mp3", "B", "bob", ""),
        ("c.wav", "", root.name, "no transcript"),
        ("d.wav", "", root.name, ""),
    ]
    assert [line.id for line in lines] == ["ann/a", "bob/wavs/b", "c", "d"]


def test_whispers_json(tmp_path):
    segments = [
        {"start": 0.0, "end": 2.0, "text": " One."},
        {"start": 2.1, "end": 4.0, "text": " Two."},
        {"start": 9.0, "end": 11.0, "text": " Three."},
        {"start": 12.0, "end": 11.0, "text": " Four."},
    ]
    root = tree(
        tmp_path / "ann",
        {"long.mp3": "", "long.json": json.dumps({"segments": segments}), "long.txt": "One. Two. Three.", "x.wav": ""},
    )
    assert recognise(root) == "whisper", "Whisper writes a .txt as well"
    lines = read(root)
    assert [(line.number, line.start, line.end, line.text, line.reason) for line in lines] == [
        (1, 0.0, 2.1, "One.", ""),
        (2, 2.1, 4.2, "Two.", ""),
        (3, 9.0, 11.2, "Three.", ""),
        (4, None, None, "Four.", "malformed line"),
        (1, None, None, "", "no transcript"),
    ]
    assert lines[1].id == "long@2.10"
    assert read(root / "long.json") == lines[:4]


def test_no_transcript_and_no_recording_vanishes(tmp_path):
    """What no decoder reads, or what has no recording at all, is a line of the report too."""
    segments = json.dumps({"segments": [{"start": 0.0, "end": 2.0, "text": "One."}]})
    files = {
        **{"a.wav": "", "a.json": segments, "a.mp4": "", "b.m4a": "", "b.json": segments, "c.json": segments},
        **{"c.srt": "1\n00:00:01,000 --> 00:00:02,500\nOne\n", "d.webm": "", "other.json": "{}"},
    }
    root = tree(tmp_path / "ann", files)
    (root / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert [(clip.audio.name, clip.text, clip.reason) for clip in read(root)] == [
        ("a.wav", "One.", ""),
        ("b.m4a", "One.", ""),
        ("d.webm", "", "no transcript"),
        ("c.wav", "One.", ""),
    ]
    assert recognise(tree(tmp_path / "bob", {"b.m4a": "", "b.json": segments})) == "whisper"
    root = tree(tmp_path / "cid", {"a.wav": "", "a.txt": "One", "b.m4a": "", "b.txt": "Two", "c.opus": ""})
    assert [(clip.audio.name, clip.text, clip.reason) for clip in read(root)] == [
        ("a.wav", "One", ""),
        ("b.m4a", "Two", ""),
        ("c.opus", "", "no transcript"),
    ]
    root = tree(tmp_path / "dan", {"metadata.csv": "a|One\nb|Two\n", "wavs/a.wav": "", "wavs/b.m4a": ""})
    assert [clip.audio.name for clip in read(root)] == ["a.wav", "b.m4a"]


def test_recordings_in_folders_without_metadata_are_mentioned(tmp_path):
    files = {
        "ann/metadata.csv": "a|One\n",
        "ann/wavs/a.wav": "",
        "bob/b.wav": "",
        "bob/b.txt": "Two",
        "cid/c/d.m4a": "",
    }
    (one,) = read_inputs([tree(tmp_path, files)])
    assert one.warnings == [f"{tmp_path}: 2 recordings are in no line of metadata.csv, e.g. b.wav"]


@pytest.mark.parametrize("transcript", ["txt", "json"])
def test_linked_folders_are_speakers_too(tmp_path, transcript):
    content = {"txt": "One", "json": json.dumps({"segments": [{"start": 0, "end": 2, "text": "One"}]})}[transcript]
    tree(tmp_path / "elsewhere", {"bob/b.wav": "", f"bob/b.{transcript}": content})
    root = tree(tmp_path / "all", {"ann/a.wav": "", f"ann/a.{transcript}": content})
    (root / "bob").symlink_to(tmp_path / "elsewhere" / "bob")
    (tmp_path / "elsewhere" / "bob" / "back").symlink_to(tmp_path / "all")  # round in a circle
    assert [(clip.speaker, clip.text) for clip in read(root)] == [("ann", "One"), ("bob", "One")]


def test_a_folder_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    root = tree(tmp_path, {"ann/a.wav": "", "ann/a.txt": "One", "bob/b.wav": "", "bob/b.txt": "Two"})
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "bob":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"bob: cannot be read \(Permission denied\)"):
        read(root)


def test_srt(tmp_path):
    content = (
        "1\r\n00:00:01,000 --> 00:00:02,500\r\nOne\r\ntwo\r\n\r\n2\r\n01:00:03,000 --> 01:00:04,000\r\nThree\r\n\r\n"
        "3\r\nsoon --> later\r\nFour\r\n"
    )
    root = tree(tmp_path, {"a.wav": "", "a.srt": content})
    assert recognise(root) == recognise(root / "a.srt") == "whisper"
    lines = read(root)
    assert [(line.number, line.start, line.end, line.text) for line in lines][:2] == [
        (2, 1.0, 2.7, "One two"),
        (7, 3603.0, 3604.2, "Three"),
    ]
    assert lines[2].reason == "malformed line"


def test_several_inputs_each_in_its_format(tmp_path):
    tree(tmp_path, {"lj/metadata.csv": "a|One\n", "list.txt": "b.wav|Two\n"})
    inputs = read_inputs([tmp_path / "lj", tmp_path / "list.txt"])
    assert [(one.format, len(one.clips)) for one in inputs] == [("ljspeech", 1), ("list", 1)]


def test_format_overrides(tmp_path):
    root = tree(tmp_path, {"odd.csv": "a.wav|One\n"})
    assert recognise(root / "odd.csv") == "list"
    assert read(root / "odd.csv", "ljspeech")[0].id == "a.wav"
    with pytest.raises(UserError, match='no column "audio"; expected a header with audio, text'):
        read(root / "odd.csv", "table")
    with pytest.raises(UserError, match=r'unknown format "lists" \(did you mean "list"\?\)'):
        read(root / "odd.csv", "lists")
    with pytest.raises(UserError, match="is a folder; the format jsonl is a JSON object a line"):
        read(root, "jsonl")


@pytest.mark.parametrize(
    ("files", "what", "message"),
    [
        ({"a.wav": ""}, "", "a folder with a.wav: recordings without transcripts, which prepare --transcribe writes: "),
        ({"readme": "hello"}, "readme", 'a file that begins "hello": none of the formats'),
        ({"a.csv": ""}, "a.csv", "a file that is empty: none of the formats"),
        ({"a.csv": "Datei;Text\n"}, "a.csv", 'begins "Datei;Text", without such names as audio and text'),
        ({"metadata.jsonl": '{"path": "a"}'}, "", 'a folder whose metadata.jsonl begins ".*", without such names'),
        ({"m.json": '{"audio_filepath": "a"}'}, "", r"a folder with m.json: give the files themselves \(--data .*json"),
        ({"m.json": '[{"audio_filepath": "a"}]'}, "m.json", r"m.json is a JSON array.*: jq -c '\.\[\]' .*m.json makes"),
        ({"metadata.jsonl": "[\n{}]"}, "", "metadata.jsonl is a JSON array, expected an object on each line"),
        (
            {"train.tsv": "audio\ttext\n", "dev.tsv": "audio\ttext\n"},
            "",
            r"dev.tsv, train.tsv: give the files themselves \(--data .*dev.tsv …\)$",
        ),
        ({"train.txt": "a.wav|x"}, "trian.txt", r'no such file or folder \(did you mean "train.txt"\?\)'),
        ({"metadata.csv": "\n\n"}, "", "empty, no line found"),
        ({"data.csv": "audio,text\n"}, "data.csv", "empty, no line found"),
        ({"a.json": "{}"}, "a.json", "not Whisper's json"),
        ({".tortoise_jax-lock": ""}, "", "whose preparation was broken off; run .* once more"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, files, what, message):
    root = tree(tmp_path, files)
    with pytest.raises(UserError, match=message):
        read_inputs([root / what])


def test_other_encodings_are_refused_with_the_line(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"a.wav|One\nb.wav|caf\xe9\n")
    with pytest.raises(UserError, match=r"train.txt:2: not UTF-8 text"):
        read_inputs([tmp_path / "train.txt"])


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"RIFF\x24\x00\x00\x00WAVE", "is a recording, not its transcripts"),
        (b"fLaC\x00", "is a recording"),
        (b"PK\x03\x04\x14\x00", "is a zip archive or a spreadsheet; save the sheet as csv"),
        ("a.wav|One\n".encode("utf-16-le"), r"data.csv:1: not UTF-8 text: it holds zero bytes, as UTF-16 does"),
        ("a.wav|One\n".encode("utf-16"), r"data.csv:1: not UTF-8 text; save the file as UTF-8"),
        ("a.wav|One\n".encode("utf-32-be"), "zero bytes"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, start, what):
    (tmp_path / "data.csv").write_bytes(start)
    for format in (None, "list", "table", "jsonl"):
        with pytest.raises(UserError, match=what):
            read_inputs([tmp_path / "data.csv"], format)


def test_pipes_and_devices_are_no_manifests(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    for path in (tmp_path / "list.txt", Path("/dev/null"), Path("/dev/zero")):
        for format in (None, "list"):
            with pytest.raises(UserError, match=r"is a (named pipe|device), expected a file"):
                read_inputs([path], format)


def test_a_name_that_no_file_can_have_is_a_malformed_line(tmp_path):
    long = "x" * 300
    content = f"{long}\tText\n{long}|Text\n{long}.wav|Text\nb\tText\n"
    root = tree(tmp_path, {"metadata.csv": content})
    assert [line.reason for line in read(root)] == ["malformed line"] * 4
    assert [line.detail for line in read(root)] == [
        f"1 column, {LJSPEECH}{NAMED}",
        "the recording's name has 304 bytes, at most 255",
        "the recording's name has 304 bytes, at most 255",
        f"1 column, {LJSPEECH}{NAMED}",
    ]


def test_a_line_without_end_makes_no_line_without_end(tmp_path):
    root = tree(tmp_path, {"metadata.csv": "[" * 20_000})
    (line,) = read(root, "ljspeech")
    assert len(line.id) == 60
    assert len(str(line.audio)) < len(str(root)) + 70


def test_what_json_can_say_and_no_clip_can_be(tmp_path):
    rows = [
        '{"audio": "a.wav", "text": "x", "start": 0, "end": 1e400}',
        '{"audio": "a.wav", "text": "x", "start": 0, "end": 1%s}' % ("0" * 400),
        '{"audio": "a.wav", "text": "x", "start": -Infinity, "end": NaN}',
        '{"audio": "a\\u0000.wav", "text": "x"}',
        '{"audio": "a.wav", "text": "x \\ud800"}',
        '{"audio": "a.wav", "text": "x", "speaker": "\\udc80"}',
        '{"audio": "a\\ud83d.wav", "text": "x"}',
        "[" * 100_000,
        '{"audio": "%s.wav", "text": "x"}' % ("é" * 200),
    ]
    root = tree(tmp_path, {"data.jsonl": "\n".join(rows)})
    lines = read(root / "data.jsonl")
    assert [line.reason for line in lines] == ["malformed line"] * len(rows)
    assert [line.detail[:34] for line in lines] == [
        "from 0 to inf: expected seconds, t",
        "from 0 to 100000000000000000000000",
        "from -inf to nan: expected seconds",
        "the recording's name holds a zero ",
        *["its name or text is no Unicode (ot"] * 3,
        "not JSON (maximum recursion depth ",
        "the recording's name has 404 bytes",
    ]
    for line in lines:
        json.dumps([line.id, line.text, line.speaker, str(line.audio)], ensure_ascii=False).encode()


def test_one_bad_transcript_is_one_rejected_clip(tmp_path):
    files = dict.fromkeys(("a.wav", "b.wav", "w/c.wav", "w/d.wav"), "")
    root = tree(tmp_path, files | {"b.txt": "Fine"})
    (root / "a.txt").write_bytes(b"caf\xe9")
    assert [(line.text, line.reason, line.detail) for line in read(root)[:2]] == [
        ("", "malformed line", "1: not UTF-8 text; save the file as UTF-8"),
        ("Fine", "", ""),
    ]
    segments = {"segments": [{"start": 0, "end": 1, "text": "One"}]}
    tree(root / "w", {"c.json": '{"segments": oops', "d.json": json.dumps(segments)})
    broken, good = read(root / "w")
    assert (broken.reason, good.reason, good.text) == ("malformed line", "", "One")
    assert broken.detail.startswith("not Whisper's json")


def test_a_line_that_names_another_place_does_not_search_it(tmp_path):
    """With a line "/" the whole disk was looked through."""
    tree(tmp_path / "other", {"a.wav": "", "b.wav": ""})
    root = tree(
        tmp_path / "ann", {"metadata.csv": f"c|x\n../other/a|x\n{tmp_path}/other/a|x\n", "c.wav": "", "d.wav": ""}
    )
    (one,) = read_inputs([root])
    assert one.warnings == [f"{root}: 1 recording is in no line of metadata.csv, e.g. d.wav"]


def test_times_of_an_srt_are_times(tmp_path):
    times = "9" * 400 + ":00:00,000 --> " + "9" * 5000 + ":00:01,000"
    root = tree(tmp_path, {"a.wav": "", "a.srt": f"1\n{times}\nOne\n"})
    assert [line.reason for line in read(root)] == ["malformed line"]


def test_every_format_is_tested_here_or_in_test_saved():
    text = Path(__file__).read_text(encoding="utf-8") + Path(__file__).with_name("test_saved.py").read_text()
    assert all(f'== "{name}"' in text for name in FORMATS)
