"""The losses as sums with counts, against plain arithmetic and torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.parity import MODULE, assert_close
from tests.support.small import CONFIG, LONGEST, clips
from tortoise_jax.models.unified_voice import MEL, TEXT
from tortoise_jax.training.losses import (
    CODES_PER_BUCKET,
    POSITION_BUCKETS,
    by_position,
    counts,
    cross_entropy,
    loss_sums,
    means,
    total_loss,
)

STOP = CONFIG.stop_mel


@pytest.fixture(scope="module")
def outputs() -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    logits = lambda size: jnp.asarray(3 * random.standard_normal((8, LONGEST, size), np.float32))
    return {"text_logits": logits(CONFIG.text_tokens), "mel_logits": logits(CONFIG.mel_tokens)}


def check_cross_entropy(scale: float) -> None:
    """Values and gradient against torch's, at 1 and far out, where a plain exp overflows."""
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)) + 100
    targets = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    want = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    want.sum().backward()
    ours = lambda x: cross_entropy(scale * x, jnp.asarray(targets.numpy()))
    got, backward = jax.vjp(ours, jnp.asarray(logits.detach().numpy()))
    assert_close(got, want, 1e-5)
    assert_close(backward(jnp.ones_like(got))[0], logits.grad, 1e-5)


def test_cross_entropy() -> None:
    check_cross_entropy(1.0)
    with pytest.raises(AssertionError):
        check_cross_entropy(1.01)


def test_sums_are_of_weighted_targets_by_the_stream_of_their_input(outputs: dict[str, jax.Array]) -> None:
    batch = clips(0)
    sums, total = loss_sums(outputs, batch, STOP), counts(batch, STOP)
    for name, kind, logits in (("text", TEXT, "text_logits"), ("mel", MEL, "mel_logits")):
        chosen = (batch["token_types"] == kind) & (batch["weights"] > 0)
        picked = torch.tensor(np.asarray(outputs[logits])[chosen]), torch.tensor(batch["targets"][chosen]).long()
        assert_close(sums[f"{name}_sum"], F.cross_entropy(*picked, reduction="sum"), MODULE)
        assert float(total[f"{name}_count"]) == chosen.sum()
    stops = (batch["token_types"] == MEL) & (batch["targets"] == STOP) & (batch["weights"] > 0)
    assert stops.sum() == float(total["stop_count"]) == 8
    picked = torch.tensor(np.asarray(outputs["mel_logits"])[stops]), torch.tensor(batch["targets"][stops]).long()
    assert_close(sums["stop_sum"], F.cross_entropy(*picked, reduction="sum"), MODULE)
    assert sums.keys() == {"text_sum", "mel_sum", "stop_sum", "position_sum"}


def test_a_text_target_of_the_stops_number_is_no_stop(outputs: dict[str, jax.Array]) -> None:
    batch = clips(0)
    batch["targets"][:, 1] = STOP
    assert batch["token_types"][0, 1] == TEXT
    assert float(counts(batch, STOP)["stop_count"]) == 8


def test_weight_zero_is_nothing_whatever_stands_there(outputs: dict[str, jax.Array]) -> None:
    batch = clips(0)
    noisy = batch | {"targets": np.where(batch["weights"] == 0, STOP, batch["targets"])}
    for name, value in loss_sums(outputs, noisy, STOP).items():
        assert np.array_equal(value, loss_sums(outputs, batch, STOP)[name])
    counted = batch | {"weights": np.ones_like(batch["weights"])}
    assert loss_sums(outputs, counted, STOP)["mel_sum"] > loss_sums(outputs, batch, STOP)["mel_sum"]


def test_sums_of_parts_add_up(outputs: dict[str, jax.Array]) -> None:
    batch = clips(0)
    part = lambda rows: loss_sums(
        {name: value[rows] for name, value in outputs.items()}, {name: v[rows] for name, v in batch.items()}, STOP
    )
    whole, halves = loss_sums(outputs, batch, STOP), (part(slice(0, 3)), part(slice(3, 8)))
    for name in whole:
        np.testing.assert_allclose(halves[0][name] + halves[1][name], whole[name], rtol=1e-6)


def test_position_sums_split_the_mel_sum(outputs: dict[str, jax.Array]) -> None:
    sums = loss_sums(outputs, clips(0), STOP)
    np.testing.assert_allclose(jnp.sum(sums["position_sum"]), sums["mel_sum"], rtol=1e-6)
    positions = jnp.array([[0, CODES_PER_BUCKET - 1, CODES_PER_BUCKET, 10_000]])
    got = by_position(jnp.array([[1.0, 2.0, 4.0, 8.0]]), positions)
    assert got.tolist() == [3.0, 4.0, *[0.0] * (POSITION_BUCKETS - 3), 8.0]


def test_total_weighs_means_not_sums() -> None:
    sums = {"text_sum": jnp.float32(6), "mel_sum": jnp.float32(20), "stop_sum": jnp.float32(3)}
    total = {"text_count": jnp.float32(3), "mel_count": jnp.float32(5), "stop_count": jnp.float32(0)}
    assert float(total_loss(sums, total, 0.01)) == pytest.approx(0.01 * 2 + 4)
    position = {"position_sum": jnp.zeros(2), "position_count": jnp.zeros(2)}
    found = means(sums | position, total | position | {"stop_count": jnp.float32(0)})
    assert (float(found["text"]), float(found["mel"])) == (2, 4)
    assert found["position"].tolist() == [0, 0]
