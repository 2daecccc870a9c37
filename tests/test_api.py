"""`import tortoise_jax as tj`: what the README's half page promises, against the parts it is made of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import tortoise_jax as tj
from tests.support import runs
from tortoise_jax import api
from tortoise_jax.audio import CONDITIONING_SAMPLES
from tortoise_jax.checkpoints.pretrained import load_pretrained, save_pretrained


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> api.Tortoise:
    return tj.load(runs.write_checkpoint(tmp_path_factory.mktemp("api") / "checkpoint"))


def clip(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, int(22050 * seconds)).astype(np.float32)


def test_shapes_are_the_readmes(model: api.Tortoise) -> None:
    waveform = clip(1.3)
    mel = model.log_mel(waveform)
    codes = model.encode(mel)
    assert mel.shape == (1 + len(waveform) // 256, 80)
    assert codes.shape == (-(-len(mel) // 4),)
    assert codes.dtype == np.int32
    assert model.decode(codes).shape == (4 * len(codes), 80)
    voice = model.conditioning([waveform])
    assert voice.shape == (runs.AR.width,)
    text_ids = model.text_ids("Hello, world!")
    batch = model.batch([(text_ids, codes), (text_ids[:3], codes[:5])])
    outputs = model.outputs(np.stack([voice, voice]), batch)
    assert outputs["mel_logits"].shape == (2, len(text_ids) + len(codes) + 5, runs.AR.mel_tokens)
    losses = model.losses(np.stack([voice, voice]), batch)
    assert set(losses) == {"text", "mel", "stop"}
    assert all(np.isfinite(value) and value > 0 for value in losses.values())


def test_batches_of_mels_and_codes_are_taken_too(model: api.Tortoise) -> None:
    mel = np.stack([model.log_mel(clip(1.0, seed)) for seed in range(2)])
    codes = model.encode(mel)
    np.testing.assert_array_equal(codes[1], model.encode(mel[1]))
    np.testing.assert_allclose(model.decode(codes)[1], model.decode(codes[1]), atol=1e-5)


def test_a_voice_is_the_mean_over_clips_cut_or_padded_to_six_seconds(model: api.Tortoise) -> None:
    long, short = clip(7.0, 1), clip(1.0, 2)
    both = model.conditioning([long, short])
    np.testing.assert_allclose(both, (model.conditioning([long]) + model.conditioning([short])) / 2, atol=1e-6)
    np.testing.assert_array_equal(model.conditioning([long]), model.conditioning([long[:CONDITIONING_SAMPLES]]))
    padded = np.pad(short, (0, CONDITIONING_SAMPLES - len(short)))
    np.testing.assert_array_equal(model.conditioning([short]), model.conditioning([padded]))


def test_what_is_wrong_is_said(model: api.Tortoise, tmp_path: Path) -> None:
    with pytest.raises(tj.UserError, match="at least one clip"):
        model.conditioning([])
    with pytest.raises(tj.UserError, match=r"codes must lie in 0\.\.15, found 3\.\.16"):
        model.decode(np.array([3, 16]))
    with pytest.raises(tj.UserError, match="does not exist"):
        tj.load(tmp_path / "none")
    with pytest.raises(tj.UserError, match=r"holds no tortoise\.json"):
        tj.load(tmp_path)


def test_every_public_name_is_there() -> None:
    assert all(getattr(tj, name) is not None for name in tj.__all__)
    assert set(tj.__all__) <= set(dir(tj))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        tj.nonsense  # noqa: B018


def test_params_are_a_plain_tree_of_the_models_size(model: api.Tortoise) -> None:
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(model.params))
    assert type(model.params) is dict


@pytest.mark.parametrize(("kept", "gone"), [("ar", "dvae"), ("dvae", "ar")])
def test_a_checkpoint_of_one_model_is_loaded_and_says_what_it_lacks(tmp_path: Path, kept: str, gone: str) -> None:
    whole = load_pretrained(runs.write_checkpoint(tmp_path / "both"))
    save_pretrained(dataclasses.replace(whole, parts={kept: whole.part(kept)}), tmp_path / kept)
    model = tj.load(tmp_path / kept)
    codes = np.arange(3)
    needs = {
        "ar": lambda: model.conditioning([clip(1.0)]),
        "dvae": lambda: model.decode(codes),
    }
    assert np.isfinite(needs[kept]()).all()
    with pytest.raises(tj.UserError, match=f"{kept} holds no .*; convert one with --{gone}"):
        needs[gone]()


def test_what_was_not_asked_for_has_shapes_in_place_of_weights(tmp_path: Path) -> None:
    path = runs.write_checkpoint(tmp_path / "checkpoint")
    bare, whole = load_pretrained(path, ()), load_pretrained(path)
    for name, part in whole.parts.items():
        leaves = jax.tree.leaves(bare.part(name).variables)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
        assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in jax.tree.leaves(part.variables)]
        assert bare.part(name).digest == part.digest != ""


def test_checkpoints_of_before_the_digests_of_parts_open(tmp_path: Path) -> None:
    path = runs.write_checkpoint(tmp_path / "checkpoint")
    metadata = json.loads((path / "tortoise.json").read_text())
    del metadata["digests"]
    (path / "tortoise.json").write_text(json.dumps(metadata))
    old = load_pretrained(path, ())
    assert old.dvae.digest == metadata["dvae_digest"] != ""
    assert old.ar.digest == ""
