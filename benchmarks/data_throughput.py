"""Hours of audio a minute from recordings to codes, against the torch reference doing the same one clip at a time; and
which part of a batch is real.

  python -m benchmarks.data_throughput --clips 64

Both are measured in turns in one run, on clips of LJSpeech-like lengths cut from the example voice, with a dVAE of the
released size and random weights. Torch's part is what upstream does at every training step: read, log-mel, encode.
Ours is `prepare` without its texts: read, log-mel, encode, and write what was made.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch

from tests.support.parity import dvae_twin
from tests.support.torch_reference import DiscreteVAE, log_mel
from tortoise_jax.audio import SAMPLE_RATE, code_count, default_mel_norms, int16_from_waveform, read_audio
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.data.batches import row_length
from tortoise_jax.data.encoding import CodeEncoder
from tortoise_jax.data.filters import ClipLimits
from tortoise_jax.data.groups import encode_all, measure_all
from tortoise_jax.data.lengths import ljspeech_lengths, ljspeech_seconds
from tortoise_jax.data.plan import real_share, training_epoch
from tortoise_jax.data.recordings import Recording
from tortoise_jax.text.tokenizer import Tokenizer

VOICE = Path(__file__).parent.parent / "examples" / "voice" / "wavs"


def write_recordings(folder: Path, clips: int) -> list[Recording]:
    speech = np.concatenate([read_audio(path) for path in sorted(VOICE.iterdir())])
    rng = np.random.default_rng(1)
    for i, seconds in enumerate(ljspeech_seconds(clips)):
        samples = int(seconds * SAMPLE_RATE)
        start = rng.integers(len(speech) - samples)
        soundfile.write(folder / f"{i:04}.wav", speech[start : start + samples], SAMPLE_RATE, subtype="PCM_16")
    return [Recording(path) for path in sorted(folder.iterdir())]


@torch.no_grad()
def encode_by_torch(model: DiscreteVAE, recordings: list[Recording], norms: torch.Tensor) -> list[np.ndarray]:
    codes = []
    for recording in recordings:
        waveform = torch.from_numpy(soundfile.read(recording.path, dtype="float32")[0])
        padded = torch.nn.functional.pad(waveform, (0, 8192))
        features = model.encoder(log_mel(padded, norms)[None])
        codes.append(model.codebook.codes(features.transpose(1, 2))[0, : code_count(len(waveform))].numpy())
    return codes


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def throughput(clips: int, rounds: int, folder: Path) -> None:
    (folder / "wavs").mkdir()
    recordings = write_recordings(folder / "wavs", clips)
    torch.manual_seed(0)
    model = DiscreteVAE().eval()
    twin, norms = dvae_twin(model), default_mel_norms()
    pretrained = Pretrained({"dvae": twin.part}, Tokenizer.default(), norms, {})
    waveforms = [int16_from_waveform(read_audio(recording.path)) for recording in recordings]
    hours = sum(map(len, waveforms)) / SAMPLE_RATE / 3600
    encoder = CodeEncoder(twin.config, twin.variables, norms)
    outs = iter(range(1000))
    works: dict[str, Callable[[], object]] = {
        "torch, one clip at a time": lambda: encode_by_torch(model, recordings, torch.from_numpy(norms)),
        "ours, recordings to shards": lambda: encode_all(
            folder / f"out{next(outs)}", recordings, pretrained, ClipLimits()
        ),
        "  of this: mel and codes": lambda: encoder.encode(waveforms),
        "  of this: decoding": lambda: measure_all(recordings, ClipLimits(), 0),
    }
    compiling = timed(works["ours, recordings to shards"])
    encode_by_torch(model, recordings[:4], torch.from_numpy(norms))
    times = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(timed(work))
    print(f"\n{clips} clips, {hours * 60:.1f} min of audio; {os.cpu_count()} processors; median of {rounds} rounds")
    for name, measured in times.items():
        seconds = statistics.median(measured)
        print(f"{name:30}{seconds:8.2f} s {hours / seconds * 60:8.2f} h of audio a minute")
    ratios = [a / b for a, b in zip(*list(times.values())[:2], strict=True)]
    print(f"ours is {statistics.median(ratios):.2f} times torch ({min(ratios):.2f} to {max(ratios):.2f});", end=" ")
    more = compiling - statistics.median(times["ours, recordings to shards"])
    print(f"the first run takes {more:.1f} s more to compile")


def batching() -> None:
    lengths = row_length(*ljspeech_lengths())
    print(f"\nreal positions, {len(lengths)} clips: {lengths.min()} to {lengths.max()} positions a row")
    for batch_size in (16, 32, 128):
        epoch = training_epoch(lengths, batch_size, seed=0, epoch=0)
        to_maximum = [(int(lengths.max()), members) for _, members in epoch]
        shapes = len({length for length, _ in epoch})
        share, plain = (real_share(one, lengths, batch_size) for one in (epoch, to_maximum))
        print(f"  batches of {batch_size:3}: {share:.1%} in {shapes} shapes; padded to the maximum: {plain:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_throughput", description=__doc__)
    parser.add_argument("--clips", type=int, default=64, help="recordings to encode (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default 3)")
    arguments = parser.parse_args()
    batching()
    with tempfile.TemporaryDirectory() as folder:
        throughput(arguments.clips, arguments.rounds, Path(folder))


if __name__ == "__main__":
    main()
