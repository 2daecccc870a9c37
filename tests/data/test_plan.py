"""Every plan covers an epoch exactly, whoever computes it, and wastes little on padding."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.support.small_dataset import small_dataset
from tortoise_jax.data import batches
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.data.lengths import ljspeech_lengths, round_up
from tortoise_jax.data.plan import BatchPlan, real_share, training_epoch, validation_epoch
from tortoise_jax.errors import UserError
from tortoise_jax.models.unified_voice import UnifiedVoiceConfig

CONFIG = UnifiedVoiceConfig(3, 64, 4, 256, 66, 404, 608)
CLIPS = [
    ("ann", "train", 130_000, 20),
    ("ann", "train", 30_000, 9),
    ("ann", "train", 110_000, 17),
    ("ann", "train", 1023, 5),
    ("bob", "train", 40_000, 12),
    ("ann", "validation", 50_000, 11),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("plan") / "set", CLIPS)


LENGTHS = st.lists(st.integers(5, 500), min_size=1, max_size=80).map(np.array)


@hypothesis.given(LENGTHS, st.integers(1, 40), st.integers(0, 5), st.integers(0, 3), st.sampled_from([1, 32, 64]))
@hypothesis.settings(max_examples=100)
def test_an_epoch_holds_every_clip_once_and_one_partial_batch_at_most(lengths, batch_size, seed, epoch, bucket):
    batch_size = min(batch_size, len(lengths))
    made = training_epoch(lengths, batch_size, seed, epoch, bucket)
    assert sorted(i for _, members in made for i in members) == list(range(len(lengths)))
    assert sum(len(members) < batch_size for _, members in made) <= 1
    assert len(made) == -(-len(lengths) // batch_size)
    for length, members in made:
        assert length % bucket == 0
        assert length - bucket < lengths[members].max() <= length


@hypothesis.given(LENGTHS, st.integers(1, 40), st.sampled_from([1, 32]))
def test_validation_holds_every_clip_once(lengths, batch_size, bucket):
    made = validation_epoch(lengths, batch_size, bucket)
    assert sorted(i for _, members in made for i in members) == list(range(len(lengths)))
    assert all(lengths[members].max() <= length for length, members in made)


def plan(made: Dataset, batch_size: int = 2, seed: int = 0, unit: int = 1) -> BatchPlan:
    return BatchPlan.for_training(made, made.split("train"), batch_size, seed, unit)


def order(found: BatchPlan, steps: int = 9) -> list[list[int]]:
    return [found.batch(step)[1].tolist() for step in range(steps)]


def test_a_plan_is_a_function_of_seed_and_step(made):
    assert order(plan(made)) == order(plan(made))
    late = plan(made)
    assert [late.batch(8)[1].tolist(), late.batch(0)[1].tolist()] == [order(plan(made))[8], order(plan(made))[0]]
    assert order(plan(made)) != order(plan(made, seed=1))
    first, second = order(plan(made))[:3], order(plan(made))[3:6]
    assert first != second, "every epoch is shuffled anew"
    for epoch in (first, second):
        assert sorted(i for members in epoch for i in members) == made.split("train").tolist()


@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
def test_hosts_share_a_batch_without_overlap_whatever_their_number(made, hosts):
    alone, shared = plan(made, 4), plan(made, 4, unit=hosts)
    assert shared.rows % hosts == 0
    share = shared.rows // hosts
    for step in range(4):
        length, members = shared.batch(step)
        assert (length, members.tolist()) == (alone.batch(step)[0], alone.batch(step)[1].tolist())
        parts = [
            batches.make_batch(
                made, members, length, shared.rows, CONFIG, 0, step, host=slice(h * share, (h + 1) * share)
            )
            for h in range(hosts)
        ]
        examples = np.concatenate([part["example"] for part in parts])
        assert examples[examples >= 0].tolist() == members.tolist()
        assert all(len(part["example"]) == share for part in parts)


def test_a_batch_larger_than_the_data_set_is_clamped(made):
    found = plan(made, 128, unit=4)
    assert (found.batch_size, found.rows, found.batches_per_epoch) == (5, 8, 1)
    assert sorted(found.batch(0)[1]) == made.split("train").tolist()


def test_an_empty_split_has_no_batches(made):
    empty = BatchPlan.for_validation(made, np.zeros(0, np.int64), 4, 2)
    assert empty.batches_per_epoch == 0
    with pytest.raises(UserError, match="empty"):
        empty.batch(0)
    with pytest.raises(UserError, match="batch size 0"):
        plan(made, 0)


@pytest.mark.parametrize("batch_size", [16, 64, 128])
def test_nine_tenths_of_the_positions_are_real_in_a_dozen_shapes(batch_size):
    lengths = batches.row_length(*ljspeech_lengths())
    epoch = training_epoch(lengths, batch_size, seed=0, epoch=0)
    assert len({length for length, _ in epoch}) <= 12
    assert real_share(epoch, lengths, batch_size) >= 0.9
    to_maximum = [(int(lengths.max()), members) for _, members in epoch]
    assert real_share(to_maximum, lengths, batch_size) < 0.75, "what the buckets save"


def test_lengths_like_ljspeechs():
    text_tokens, codes = ljspeech_lengths()
    assert text_tokens.shape == codes.shape == (13_100,)
    assert text_tokens.dtype == codes.dtype == np.int64
    assert (codes.min(), codes.max()) >= (22, 200)
    assert codes.max() <= 216
    assert float(np.mean(codes)) * 1024 / 22050 == pytest.approx(6.1, abs=0.1)
    assert float(np.mean(text_tokens / codes)) * 22050 / 1024 == pytest.approx(9, abs=0.2)


def test_rounding_up():
    assert [round_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert round_up(np.array([1, 32, 33]), 32).tolist() == [32, 32, 64]
