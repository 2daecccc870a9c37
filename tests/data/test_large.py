"""Data as large as people have it: half an hour in one file, ten thousand lines."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

# Not getrusage's ru_maxrss, which a process has from the one that started it.
MEASURED = """
import re
from pathlib import Path
from tortoise_jax.prepare import main
main()
print("peak", int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def check(data: Path, *options: str) -> tuple[str, int]:
    """What `prepare --check` prints, and its peak memory in MB."""
    command = [sys.executable, "-c", MEASURED, "--data", str(data), "--check", "--workers", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stderr
    printed, peak = re.fullmatch(r"(.*)peak (\d+)\n", done.stdout, re.DOTALL).groups()
    return printed, int(peak)


@pytest.mark.slow
def test_half_an_hour_in_one_file_takes_half_a_gigabyte(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with soundfile.SoundFile(tmp_path / "talk.flac", "w", 44100, 2) as file:
        for _ in range(30 * 60):
            file.write(0.1 * random.standard_normal((44100, 2)))
    texts = [f"This is what segment {i} says, and no more." for i in range(300)]
    segments = [{"start": 6.0 * i, "end": 6.0 * i + 5, "text": text} for i, text in enumerate(texts)]
    (tmp_path / "talk.json").write_text(json.dumps({"segments": segments}))
    printed, peak = check(tmp_path)
    assert re.search(r"kept +300 +0:26:00", printed)
    assert peak < 700
    printed, peak = check(tmp_path, "--trim_silence")
    assert re.search(r"kept +300 ", printed)
    assert peak < 1500


@pytest.mark.slow
def test_one_missing_file_of_ten_thousand_is_named(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    (tmp_path / "wavs").mkdir()
    for i in set(range(10_000)) - {7321}:
        soundfile.write(tmp_path / "wavs" / f"n{i}.wav", 0.1 * random.standard_normal(6400), 8000, subtype="ULAW")
    lines = [f"n{i}|{' '.join(words[int(digit)] for digit in f'{i:04}')}\n" for i in range(10_000)]
    (tmp_path / "metadata.csv").write_text("".join(lines))
    printed, peak = check(tmp_path)
    assert f"{tmp_path}/metadata.csv:7322: missing: there is no such file\n" in printed
    assert re.search(r"rejected +1 ", printed)
    assert peak < 700
