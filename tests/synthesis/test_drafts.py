"""Draft waveforms of codes, and the mel the dVAE decodes them to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import torch_reference
from tests.support.parity import STACK, Twin, assert_close
from tortoise_jax.audio import SAMPLES_PER_CODE, code_count, default_mel_norms
from tortoise_jax.synthesis import drafts


def test_draft_has_the_length_its_codes_imply_and_does_not_clip(dvae: Twin) -> None:
    waveform = drafts.draft(dvae.variables, dvae.config, default_mel_norms(), np.array([5, 60]))
    assert waveform.dtype == np.float32
    assert len(waveform) == 2 * SAMPLES_PER_CODE - 256
    assert code_count(len(waveform)) == 2
    assert 0 < np.abs(waveform).max() < 1


def test_draft_leaves_out_what_is_no_code(dvae: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    mels: list[np.ndarray] = []
    monkeypatch.setattr(drafts, "griffin_lim", lambda mel, norms: mels.append(mel))
    for codes in ([1, 64, 2, 65, 3], [1, 2, 3]):
        drafts.draft(dvae.variables, dvae.config, default_mel_norms(), np.array(codes))
    np.testing.assert_array_equal(*mels)
    assert len(drafts.draft(dvae.variables, dvae.config, default_mel_norms(), np.array([64]))) == 0
    assert len(mels) == 2


def test_decoded_mel_is_torchs(torch_dvae: torch_reference.DiscreteVAE, dvae: Twin) -> None:
    codes = np.random.default_rng(1).integers(0, 64, (2, 9))
    want = torch_dvae.decode(torch.from_numpy(codes))
    want = want[0] if isinstance(want, tuple) else want
    assert_close(drafts.decode_mel(dvae.variables, dvae.config, codes), want.numpy().swapaxes(1, 2), STACK)
