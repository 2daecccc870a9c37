"""A text said in parts: what is kept of the candidates, and how the parts are joined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.parity import Twin
from tortoise_jax.audio import SAMPLE_RATE, default_mel_norms
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.synthesis import sampler, speech
from tortoise_jax.synthesis.presets import PRESETS
from tortoise_jax.synthesis.sampler import Samples, SamplingOptions
from tortoise_jax.text.tokenizer import Tokenizer


def test_flagged_candidates_are_kept_last(voice: Twin, dvae: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest candidate never stops: the other one is kept."""
    drawn = Samples(
        np.array([[1, 2, 3, 4], [5, 6, 7, 65]], np.int32),
        np.array([4, 3], np.int32),
        np.array([-0.1, -5.0], np.float32),
        np.array([False, True]),
    )
    monkeypatch.setattr(sampler, "sample", lambda *_, **__: drawn)
    pretrained = Pretrained({"ar": voice.part, "dvae": dvae.part}, Tokenizer.default(), default_mel_norms(), {})
    settings: Any = (PRESETS["draft"], np.zeros(64), ["Hi."], "tortoise", 0, SamplingOptions())
    [part] = speech.say(pretrained, None, *settings, candidates=2, keep=2, batch=2)  # type: ignore[arg-type]
    assert [one.index for one in part.kept] == [1, 0]
    assert part.kept[0].codes.tolist() == [5, 6, 7]
    assert speech.describe(part, 2).endswith(
        "kept candidate 2 (-5.00 per code); candidate 1 (-0.10 per code, never stops)"
    )


def test_pauses_stand_between_parts_only() -> None:
    one = np.ones(10, np.float32)
    joined = speech.join([one, one])
    assert len(joined) == 20 + round(0.3 * SAMPLE_RATE)
    assert joined[:10].all()
    assert joined[-10:].all()
    assert not joined[10:-10].any()
