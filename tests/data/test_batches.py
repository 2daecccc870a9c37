"""Rows are laid out as the model reads them, and conditioned on other clips of their speaker."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from tests.support.small_dataset import small_dataset
from tortoise_jax.audio import CONDITIONING_SAMPLES, SAMPLE_RATE, code_count
from tortoise_jax.data import batches
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.errors import UserError
from tortoise_jax.models.unified_voice import CONDITIONING, MEL, TEXT, UnifiedVoiceConfig

CONFIG = UnifiedVoiceConfig(3, 64, 4, 256, 66, 404, 608)
LONG = CONDITIONING_SAMPLES + 2000
CLIPS = [
    ("ann", "train", LONG, 20),
    ("ann", "train", 30_000, 9),
    ("ann", "train", LONG + 500, 17),
    ("ann", "train", 1023, 5),
    ("bob", "train", 40_000, 12),
    ("ann", "validation", 50_000, 11),
    ("bob", "validation", 20_000, 3),
    ("cleo", "validation", 20_000, 3),
    ("cleo", "validation", 20_000, 3),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("batches") / "set", CLIPS)


def clip_of(crop: np.ndarray) -> int:
    """Which clip of `small_dataset` a crop was cut from."""
    return int(crop[0]) // 100


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_joined_without_gaps():
    row = batches.row(np.array([7, 8]), np.array([40, 41, 42]), 12, CONFIG)
    columns = list(
        zip(*(row[name].tolist() for name in ("tokens", "token_types", "positions", "targets", "weights")), strict=True)
    )
    assert columns == [
        (0, CONDITIONING, 0, 0, 0.0),
        (255, TEXT, 0, 7, 1.0),
        (7, TEXT, 1, 8, 1.0),
        (8, TEXT, 2, 0, 1.0),
        (0, TEXT, 3, 0, 0.0),
        (64, MEL, 0, 40, 1.0),
        (40, MEL, 1, 41, 1.0),
        (41, MEL, 2, 42, 1.0),
        (42, MEL, 3, 65, 1.0),
        (65, MEL, 4, 0, 0.0),
        (0, CONDITIONING, 0, 0, 0.0),
        (0, CONDITIONING, 0, 0, 0.0),
    ]


def test_a_batch_holds_the_rows_of_its_clips(made):
    members = [0, 3, 4]
    batch = batches.make_batch(made, np.array(members), 192, 3, CONFIG, seed=0, step=0)
    for index, clip in enumerate(members):
        for name, value in batches.row(made.text_ids(clip), made.codes(clip), 192, CONFIG).items():
            np.testing.assert_array_equal(batch[name][index], value, err_msg=name)
    assert batch["example"].tolist() == members
    token_types = {name: value.dtype for name, value in batch.items()}
    assert token_types == {
        **dict.fromkeys(("tokens", "token_types", "positions", "targets", "example"), np.int32),
        "weights": np.float32,
        "conditioning_wav": np.int16,
    }


def test_row_length_is_what_a_row_fills(made):
    for i, clip in enumerate(made.clips):
        length = batches.row_length(clip.text_tokens, clip.codes)
        row = batches.row(made.text_ids(i), made.codes(i), length + 7, CONFIG)
        assert row["token_types"][length - 1] == MEL
        assert row["weights"][length - 2] == 1
        assert not row["token_types"][length:].any()
        assert not row["weights"][length - 1 :].any()


@pytest.mark.parametrize(("seconds", "stop"), [(3, 65), (6, 130), (9, 194), (11, 237)])
def test_the_stop_comes_where_the_clip_ends(seconds, stop):
    codes = np.arange(code_count(seconds * SAMPLE_RATE)) % 64
    row = batches.row(np.array([5, 6, 7]), codes, 300, CONFIG)
    mel_targets = row["targets"][(row["token_types"] == MEL) & (row["weights"] > 0)]
    assert np.flatnonzero(mel_targets == CONFIG.stop_mel).tolist() == [stop]
    text_targets = row["targets"][(row["token_types"] == TEXT) & (row["weights"] > 0)]
    assert np.flatnonzero(text_targets == CONFIG.stop_text).tolist() == [3]


def test_rows_beyond_the_clips_count_for_nothing(made):
    batch = batches.make_batch(made, np.array([1]), 64, 4, CONFIG, seed=0, step=0)
    assert batch["example"].tolist() == [1, -1, -1, -1]
    for name in ("tokens", "token_types", "positions", "targets", "weights", "conditioning_wav"):
        assert not batch[name][1:].any(), name
    assert batch["weights"][0].any()


def test_a_host_reads_only_its_rows(made, monkeypatch):
    whole = batches.make_batch(made, np.arange(4), 192, 4, CONFIG, seed=3, step=8)
    read = []
    codes = Dataset.codes
    monkeypatch.setattr(Dataset, "codes", lambda self, i: (read.append(i), codes(self, i))[1])
    part = batches.make_batch(made, np.arange(4), 192, 4, CONFIG, seed=3, step=8, host=slice(2, 4))
    assert read == [2, 3]
    for name, value in part.items():
        np.testing.assert_array_equal(value, whole[name][2:], err_msg=name)


# --- conditioning -----------------------------------------------------------------------------------------------------


def crops(made: Dataset, index: int, step: int = 0, seed: int = 0) -> np.ndarray:
    return batches.conditioning_crops(made, index, seed, step)


def test_conditioning_comes_from_other_train_clips_of_the_speaker(made):
    for index, allowed in ((0, {1, 2, 3}), (5, {0, 1, 2, 3}), (6, {4})):
        found = {clip_of(crop) for step in range(20) for crop in batches.conditioning_crops(made, index, step, step)}
        assert found <= allowed
        if index == 0:
            assert found == allowed
    pairs = [tuple(clip_of(crop) for crop in crops(made, 0, step)) for step in range(20)]
    assert all(first != second for first, second in pairs), "two different clips while there are enough"


def test_a_crop_is_exactly_as_long_as_at_synthesis(made):
    for step in range(10):
        for crop in crops(made, 1, step):
            waveform = made.waveform(clip_of(crop))
            assert crop.shape == (CONDITIONING_SAMPLES,)
            assert crop.dtype == np.int16
            if len(waveform) < CONDITIONING_SAMPLES:
                np.testing.assert_array_equal(crop[: len(waveform)], waveform)
                assert not crop[len(waveform) :].any()
            else:
                starts = np.flatnonzero(waveform[: len(waveform) - CONDITIONING_SAMPLES + 1] == crop[0])
                assert any((waveform[s : s + CONDITIONING_SAMPLES] == crop).all() for s in starts)


def test_crops_start_anywhere(made):
    starts = {crop.tobytes()[:64] for step in range(40) for crop in crops(made, 1, step) if clip_of(crop) in (0, 2)}
    assert len(starts) > 20


def test_crops_follow_seed_step_and_clip_in_training_and_the_clip_alone_in_validation(made):
    np.testing.assert_array_equal(crops(made, 0, step=4), crops(made, 0, step=4))
    assert any((crops(made, 0, step=4) != crops(made, 0, step=step)).any() for step in range(5, 9))
    assert any((crops(made, 0, seed=4) != crops(made, 0, seed=seed)).any() for seed in range(5, 9))
    for other in (crops(made, 5, step=9), crops(made, 5, seed=9)):
        np.testing.assert_array_equal(crops(made, 5), other)


def test_a_clip_alone_conditions_itself_and_is_counted(made):
    assert {clip_of(crop) for crop in crops(made, 4)} == {4}
    assert batches.conditioned_on_themselves(made) == 1
    assert {clip_of(crop) for crop in crops(made, 7)} == {8}, "a speaker without train clips: his other validation clip"
    assert batches.conditioned_on_themselves(made, "validation") == 0


# --- ahead ------------------------------------------------------------------------------------------------------------


def test_prefetch_keeps_the_order_and_works_ahead():
    started, gate = [], threading.Event()

    def make(step: int) -> int:
        started.append(step)
        if step == 2:
            gate.set()
        return step * step

    loader = batches.prefetch(make, range(6), ahead=2)
    assert next(loader) == 0
    assert gate.wait(5), "step 2 is made while step 0 is used"
    assert list(loader) == [1, 4, 9, 16, 25]
    assert sorted(started) == list(range(6))


def test_prefetch_raises_where_the_batch_would_have_come():
    def make(step: int) -> int:
        if step == 2:
            raise UserError("clip 7 is corrupt")
        return step

    loader = batches.prefetch(make, range(5))
    assert [next(loader), next(loader)] == [0, 1]
    with pytest.raises(UserError, match="clip 7"):
        next(loader)


def test_what_the_loader_reads_is_checked(tmp_path: Path):
    made = small_dataset(tmp_path / "set", CLIPS)
    shard = made.path / "shards" / made.clips[0].sound.shard
    content = bytearray(shard.read_bytes())
    content[made.clips[4].sound.offset] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="clip4"):
        batches.make_batch(made, np.array([4]), 64, 1, CONFIG, 0, 0)
