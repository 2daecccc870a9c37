"""A text said in parts: what is kept of the candidates, and how the parts are joined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.parity import Twin
from tortoise_jax.audio import SAMPLE_RATE, default_mel_norms
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.synthesis import sampler, speech
from tortoise_jax.synthesis.decoder import DecoderWeights
from tortoise_jax.synthesis.presets import PRESETS
from tortoise_jax.synthesis.sampler import Samples, SamplingOptions
from tortoise_jax.text.tokenizer import Tokenizer


def pretrained_of(voice: Twin, dvae: Twin) -> Pretrained:
    return Pretrained({"ar": voice.part, "dvae": dvae.part}, Tokenizer.default(), default_mel_norms(), {})


def test_flagged_candidates_are_kept_last(voice: Twin, dvae: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest candidate never stops: the other one is kept."""
    drawn = Samples(
        np.array([[1, 2, 3, 4], [5, 6, 7, 65]], np.int32),
        np.array([4, 3], np.int32),
        np.array([-0.1, -5.0], np.float32),
        np.array([False, True]),
    )
    monkeypatch.setattr(sampler, "sample", lambda *_, **__: drawn)
    settings: Any = (PRESETS["draft"], np.zeros(64), ["Hi."], "tortoise", 0, SamplingOptions())
    [part] = speech.say(pretrained_of(voice, dvae), None, *settings, candidates=2, keep=2, batch=2)  # type: ignore[arg-type]
    assert [one.index for one in part.kept] == [1, 0]
    assert part.kept[0].codes.tolist() == [5, 6, 7]
    assert speech.describe(part, 2).endswith(
        "kept candidate 2 (-5.00 per code); candidate 1 (-0.10 per code, never stops)"
    )


def test_parts_drawn_together_are_what_each_is_alone(voice: Twin, dvae: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part, candidate and seed: the same codes, whatever else is drawn at once; no more of it than was asked."""
    pretrained, texts = pretrained_of(voice, dvae), ["Hello, world, how are you?", "Hi.", "So it is."]
    weights = DecoderWeights.of(voice.params, voice.config, "float32")
    vector = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    options = SamplingOptions(max_codes=20, dtype="float32")
    sample, drawn_at_once = sampler.sample, []

    def watched(weights: Any, config: Any, vector: Any, prompts: Any, *rest: Any) -> Samples:
        drawn = sample(weights, config, vector, prompts, *rest)
        drawn_at_once.append((len(prompts), len(drawn.lengths)))
        return drawn

    monkeypatch.setattr(sampler, "sample", watched)
    given: Any = (PRESETS["draft"], vector, texts, "tortoise", 7, options)
    said = speech.say(pretrained, weights, *given, candidates=3, keep=3, batch=11)
    assert drawn_at_once == [(3, 9)]
    assert [part.text for part in said] == texts
    for i, part in enumerate(said):
        alone = sample(weights, voice.config, vector, part.text_ids, 7 + i, options, 3)
        for one in part.kept:
            assert one.codes.tolist() == alone.row(one.index).tolist()
            assert one.log_likelihood == pytest.approx(alone.log_likelihood[one.index], rel=1e-5)


def test_parts_of_like_length_are_drawn_together_within_the_batch() -> None:
    assert list(speech.rounds([9, 2, 5], 1, 5)) == [([1, 2, 0], 0, 1)]
    assert list(speech.rounds([9, 2, 5], 1, 4)) == [([1, 2], 0, 1), ([0], 0, 1)]
    assert list(speech.rounds([9, 2], 5, 4)) == [([1], 0, 4), ([0], 0, 4), ([1, 0], 4, 1)]
    for candidates in range(1, 40):
        for batch in range(1, 20):
            made = list(speech.rounds([3, 1, 2, 2, 5], candidates, batch))
            drawn = [
                (i, number) for parts, first, count in made for i in parts for number in range(first, first + count)
            ]
            assert sorted(drawn) == [(i, number) for i in range(5) for number in range(candidates)]
            assert all(len(parts) * (count + 1) <= batch + 1 for parts, _, count in made)


def test_pauses_stand_between_parts_only() -> None:
    one = np.ones(10, np.float32)
    joined = speech.join([one, one])
    assert len(joined) == 20 + round(0.3 * SAMPLE_RATE)
    assert joined[:10].all()
    assert joined[-10:].all()
    assert not joined[10:-10].any()
