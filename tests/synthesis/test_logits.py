"""The logits filters against Hugging Face's processors, and drawn codes against what the filters leave."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tortoise_jax.synthesis import logits as sampling

START, CODES = 64, 66


def hugging_face(
    logits: np.ndarray, seen: list[list[int]], penalty: float, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return processors(torch.tensor(seen), torch.from_numpy(logits.copy())).numpy()


def ours(
    logits: np.ndarray, seen: list[list[int]], penalty: float, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    where = np.zeros(logits.shape, bool)
    np.put_along_axis(where, np.asarray(seen), True, axis=1)
    penalised = sampling.penalise(jnp.asarray(logits), jnp.asarray(where), penalty)
    ranked, codes = sampling.rank(penalised / temperature, logits.shape[1])
    kept = sampling.keep(ranked, top_k, 1 - top_p)
    filtered = np.full_like(logits, np.nan)
    np.put_along_axis(filtered, np.asarray(codes), np.asarray(kept), axis=1)
    return filtered


def assert_equal_filters(logits: np.ndarray, seen: list[list[int]], *settings: float) -> None:
    """The same values are kept in the same places; which of several equal ones at the edge, torch leaves open."""
    got, want = ours(logits, seen, *settings), hugging_face(logits, seen, *settings)
    np.testing.assert_allclose(np.sort(got), np.sort(want), rtol=1e-6)
    for row, expected in zip(got, want, strict=True):
        elsewhere = np.isneginf(row) != np.isneginf(expected)
        edge = row[np.isfinite(row)].min()
        np.testing.assert_allclose(row[elsewhere & np.isfinite(row)], edge, rtol=1e-6)
        both = np.isfinite(row) & np.isfinite(expected)
        np.testing.assert_allclose(row[both], expected[both], rtol=1e-6)


@given(
    seed=st.integers(0, 2**16),
    penalty=st.sampled_from([1.0, 2.0, 0.5]),
    temperature=st.sampled_from([0.8, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 50, 66, 1000]),
    top_p=st.sampled_from([0.05, 0.8, 0.999, 1.0]),
)
def test_filters_are_hugging_faces_on_random_logits(
    seed: int, penalty: float, temperature: float, top_k: int, top_p: float
) -> None:
    random = np.random.default_rng(seed)
    logits = (3 * random.standard_normal((4, CODES))).astype(np.float32)
    seen = [[1, START, *random.integers(0, CODES, 20)] for _ in logits]
    assert_equal_filters(logits, seen, penalty, temperature, top_k, top_p)


def crafted(**peaks: float) -> np.ndarray:
    logits = np.full((1, CODES), -20.0, np.float32)
    for name, value in peaks.items():
        logits[0, int(name.removeprefix("code_"))] = value
    return logits


@pytest.mark.parametrize(
    ("logits", "top_k", "top_p"),
    [
        pytest.param(crafted(code_1=5.0, code_64=4.0, code_7=3.0, code_9=2.9), 50, 0.8, id="code 1, start token"),
        pytest.param(crafted(code_1=-5.0, code_64=-4.0, code_7=-8.0), 2, 1.0, id="the same, negative"),
        pytest.param(crafted(code_3=100.0), 50, 0.8, id="one certain code"),
        pytest.param(crafted(code_3=3e38, code_4=-3e38), 50, 0.8, id="extremes of float32"),
        pytest.param(crafted(code_3=0.0, code_1=0.0), 50, 0.8, id="zeros"),
        pytest.param(np.zeros((1, CODES), np.float32), 5, 0.8, id="all equal: top-k keeps every tie, top-p some"),
        pytest.param(np.zeros((1, CODES), np.float32), 0, 0.5, id="all equal, top-p alone"),
        pytest.param(crafted(code_2=1, code_3=1, code_4=1, code_5=1, code_6=0.5), 4, 0.5, id="ties at both edges"),
        pytest.param(crafted(code_2=1, code_3=1, code_4=1, code_5=1), 50, 0.75, id="a tail of exactly 1 - top_p"),
        pytest.param(np.where(np.arange(CODES) < 60, -np.inf, 1.0)[None].astype(np.float32), 50, 0.8, id="-inf within"),
    ],
)
@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_filters_are_hugging_faces_on_crafted_logits(
    logits: np.ndarray, top_k: int, top_p: float, penalty: float
) -> None:
    assert_equal_filters(logits, [[1, START]], penalty, 1.0, top_k, top_p)


def test_order_matters_and_is_penalty_temperature_top_k_top_p() -> None:
    """In another order these logits keep another set."""
    logits = crafted(code_1=6.0, code_7=3.2, code_9=3.1, code_12=2.0)
    kept = np.flatnonzero(np.isfinite(ours(logits, [[1, START]], 2.0, 0.5, 3, 0.8))[0])
    assert kept.tolist() == [1, 7, 9]
    penalty_last = np.flatnonzero(np.isfinite(ours(logits, [[START, START]], 1.0, 0.5, 3, 0.8))[0])
    assert penalty_last.tolist() == [1]


@pytest.mark.parametrize("row", [[1, START], [START, START], [1, 1]], ids=["both", "without code 1", "without start"])
def test_penalty_covers_exactly_what_was_seen(row: list[int]) -> None:
    logits = np.linspace(-2, 2, CODES, dtype=np.float32)[None]
    got = ours(logits, [row], 2.0, 1.0, 0, 1.0)
    changed = np.flatnonzero(got[0] != logits[0])
    assert changed.tolist() == sorted(set(row))


def frequencies(logits: np.ndarray, top_k: int, top_p: float, draws: int = 20_000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), draws)
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, logits.shape[1]))
    drawn = sampling.draw(keys, rows, np.float32(0.8), top_k, np.float32(1 - top_p))
    return np.bincount(np.asarray(drawn), minlength=logits.shape[1])


def chi_square(found: np.ndarray, logits: np.ndarray, top_k: int, top_p: float) -> tuple[float, int]:
    """Pearson's statistic against Hugging Face's filtered distribution, and its degrees of freedom."""
    filtered = hugging_face(logits, [[0]], 1.0, 0.8, top_k, top_p)[0].astype(np.float64)
    probabilities = np.exp(filtered - np.logaddexp.reduce(filtered))
    possible = probabilities > 0
    assert not found[~possible].any(), "codes were drawn that the filters had removed"
    expected = probabilities[possible] * found.sum()
    return float(np.sum((found[possible] - expected) ** 2 / expected)), int(possible.sum()) - 1


@pytest.mark.parametrize(("top_k", "top_p"), [(12, 0.95), (5, 1.0), (0, 0.9)])
def test_drawn_codes_follow_the_filtered_distribution(top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(3).standard_normal((1, CODES)).astype(np.float32)
    found = frequencies(logits, top_k, top_p)
    statistic, freedom = chi_square(found, logits, top_k, top_p)
    limit = freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations above the mean of chi-square
    assert freedom >= 3
    assert statistic < limit
    # The test would see a temperature of 0.75 instead of 0.8.
    assert chi_square(frequencies((logits * np.float32(0.8 / 0.75)), top_k, top_p), logits, top_k, top_p)[0] > limit


def test_of_more_ties_than_are_ranked_the_last_are_drawn() -> None:
    """Top-k of 2 would keep all 40 equal codes; the last 16 are looked at, each as likely as the others."""
    logits = np.full((1, CODES), -9.0, np.float32)
    logits[0, 10:50] = 1.0
    found = frequencies(logits, 2, 1.0, draws=4000)
    assert np.flatnonzero(found).tolist() == list(range(50 - 2 - sampling.TIES, 50))
    assert found[found > 0].min() > 4000 / 16 / 2


def test_each_row_draws_with_its_own_key() -> None:
    logits = jnp.zeros((3, CODES))
    draw = lambda keys: sampling.draw(keys, logits, np.float32(1), 0, np.float32(0)).tolist()
    keys = jax.random.split(jax.random.key(5), 3)
    alike = draw(jnp.stack([keys[0]] * 3))
    assert len(set(alike)) == 1
    assert draw(keys)[0] == alike[0]
    assert len(set(draw(keys))) > 1
