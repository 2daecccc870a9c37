"""The real sizes, there and back, with random weights: minutes and gigabytes, run by `make test-slow`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import convert_real_size as benchmark
from convert.mapping import same_bits
from convert.torch_files import read_state_dict
from tests.support.torch_reference import DiscreteVAE, UnifiedVoice


@pytest.mark.slow
def test_real_sizes_there_and_back_within_memory_and_time(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """421,526,786 and 59,963,984 parameters and buffers, every tensor bit for bit; the targets of the benchmark."""
    benchmark.make_files(tmp_path)
    results = {job: benchmark.measure(job, tmp_path) for job in benchmark.JOBS}
    with capsys.disabled():
        print("", *benchmark.report(results), sep="\n")
    for name, exported, model in (
        ("autoregressive.pth", "voice.pth", UnifiedVoice),
        ("dvae.pth", "dvae-back.pth", DiscreteVAE),
    ):
        original, back = read_state_dict(tmp_path / name), read_state_dict(tmp_path / exported)
        assert list(back) == list(original)
        assert sum(value.size for value in back.values()) == benchmark.PARAMETERS[name]
        for key, value in original.items():
            assert same_bits(back[key], value), key
        with torch.device("meta"):
            empty = model()
        empty.load_state_dict(torch.load(tmp_path / exported, weights_only=True, mmap=True), strict=True, assign=True)
    memory, time = benchmark.ratios(results)
    assert memory <= benchmark.MEMORY_TARGET
    assert time <= benchmark.TIME_TARGET
