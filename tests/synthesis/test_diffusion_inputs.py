"""What TorToiSe's diffusion model is given, against the torch reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support import torch_reference
from tests.support.parity import STACK, Twin, assert_close, voice_twin
from tortoise_jax.errors import UserError
from tortoise_jax.synthesis.diffusion_inputs import diffusion_inputs, repaired

TEXT = [5, 9, 200, 31, 7]


def voice_vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(64).astype(np.float32)


@pytest.mark.parametrize(
    "codes",
    [
        pytest.param([3, 4, 5, 6], id="speech, then the silence it is filled with"),
        pytest.param([7] * 4 + [3, 7, 7, 3, 9], id="silence within"),
        pytest.param(list(range(10, 33)), id="one short of full: the stop and two codes become the ending"),
        pytest.param([2] * 5 + [7] * 12 + [2] * 7, id="full, never stopped: not repaired"),
        pytest.param([], id="nothing"),
    ],
)
def test_codes_and_latents_are_torchs(torch_voice: torch_reference.UnifiedVoice, voice: Twin, codes: list[int]) -> None:
    vector, small = voice_vector(4), {"silence": 7, "ending": (5, 5, 8)}
    drawn = torch.tensor([*codes, torch_voice.stop_mel_token][:24])
    text = torch.tensor([*TEXT, 0])
    want_codes, want_latents = torch_voice.hand_over(torch.from_numpy(vector), text, drawn, max_codes=24, **small)
    got_codes, got_latents = diffusion_inputs(
        voice.params, voice.config, vector, TEXT, np.array(codes, np.int32), total=24, **small
    )
    np.testing.assert_array_equal(got_codes, want_codes.numpy())
    assert_close(got_latents, want_latents, STACK)


@pytest.mark.parametrize(
    ("length", "end", "mended"),
    [
        (5, [5, 5, 8], [5, 5, 8]),
        (7, [5, 5, 8], [5, 5, 8]),
        (8, [5, 5, 8], [3, 5, 8]),
        (9, [5, 5, 8], [3, 3, 8]),
        (10, [3, 3, 3], [3, 3, 3]),
    ],
)
def test_a_late_stop_need_not_lose_speech(length: int, end: list[int], mended: list[int]) -> None:
    """Of ten places, the rest speech (3), the stop where it ends."""
    given: Any = (np.full(length, 3), 10, 7, (5, 5, 8))
    assert repaired(*given)[-3:].tolist() == end
    assert repaired(*given, keep_speech=True)[-3:].tolist() == mended
    assert repaired(*given, keep_speech=True)[:length].tolist() == [3] * min(length, 7) + mended[: max(0, length - 7)]


def test_with_tortoises_own_figures_they_are_torchs() -> None:
    """500 codes of 8192, silence 83, the ending 45, 45, 248; a voice that falls silent and one that never stops."""
    model = torch_reference.tiny_unified_voice(
        max_mel_tokens=604, number_mel_codes=8194, start_mel_token=8192, stop_mel_token=8193
    )
    twin, vector, text = voice_twin(model), voice_vector(5), torch.tensor([*TEXT, 0])
    said = np.random.default_rng(0).integers(0, 8192, 500).astype(np.int32)
    for codes in (said[:180], said):
        stop = [model.stop_mel_token] if len(codes) < 500 else []
        want = model.hand_over(torch.from_numpy(vector), text, torch.tensor([*codes.tolist(), *stop]))
        got = diffusion_inputs(twin.params, twin.config, vector, TEXT, codes)
        np.testing.assert_array_equal(got[0], want[0].numpy())
        assert_close(got[1], want[1], STACK)
        assert len(got[1]) == (188 if stop else 500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total": 4}, "5 codes, but TorToiSe's decoder is handed at most 4"),
        ({"total": 90, "silence": 7, "ending": (5, 5, 8)}, "the model has room for 42 codes"),
        ({"total": 24}, "this model has 64 codes, but TorToiSe's decoder was trained with 8192"),
    ],
)
def test_what_tortoise_could_not_use_is_refused(voice: Twin, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        diffusion_inputs(voice.params, voice.config, voice_vector(0), TEXT, np.arange(5), **changes)
