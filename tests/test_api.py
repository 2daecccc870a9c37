"""`import tortoise_jax as tj`: what the README's half page promises, against the parts it is made of."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import tortoise_jax as tj
from tests.support import runs
from tortoise_jax import api, parallel
from tortoise_jax.audio import CONDITIONING_SAMPLES, int16_from_waveform, waveform_from_int16
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


WRONG: dict[str, tuple[Callable[[api.Tortoise], object], str]] = {
    "stereo": (
        lambda m: m.conditioning([np.zeros((22050, 2), np.float32)]),
        r"shape \(22050, 2\), expected \(samples,\)",
    ),
    "int32": (
        lambda m: m.conditioning([np.zeros(22050, np.int32)]),
        r"a waveform is int32, expected float32 .* or int16",
    ),
    "a clip without samples": (lambda m: m.conditioning([clip(1.0), clip(0.0)]), r"no samples \(its shape is \(0,\)\)"),
    "NaN audio": (lambda m: m.conditioning([with_nan(clip(1.0))]), "NaN or infinite"),
    "16 bit as floats": (
        lambda m: m.conditioning([clip(1.0) * 32768]),
        r"reaches 163.*; divide 16 bit samples by 32768",
    ),
    "mel of NaN": (lambda m: m.log_mel(with_nan(clip(1.0))), "NaN or infinite"),
    "mel of nothing": (lambda m: m.log_mel(clip(0.0)), "no samples"),
    "clip of stereo": (lambda m: m.encode_clip(np.zeros((2, 22050), np.float32)), r"shape \(2, 22050\)"),
    "clip of NaN": (lambda m: m.encode_clip(with_nan(clip(1.0))), "NaN or infinite"),
    "encode NaN": (
        lambda m: m.encode(with_nan(np.zeros((8, 80), np.float32))),
        "expected floating-point numbers, all f",
    ),
    "encode a waveform": (lambda m: m.encode(clip(1.0)), r"shape \(22050,\), expected \(frames, 80\)"),
    "encode bands first": (
        lambda m: m.encode(np.zeros((80, 12), np.float32)),
        r"shape \(80, 12\), expected \(frames, 80",
    ),
    "encode no frames": (lambda m: m.encode(np.zeros((0, 80), np.float32)), r"shape \(0, 80\)"),
    "encode integers": (lambda m: m.encode(np.zeros((8, 80), np.int32)), "a mel is int32"),
    "decode beyond 32 bits": (lambda m: m.decode([2**32 + 1]), r"codes must lie in 0\.\.15, found 4294967297"),
    "decode negative": (lambda m: m.decode(np.array([-1])), r"codes must lie in 0\.\.15, found -1"),
    "decode floats": (lambda m: m.decode(np.array([1.0])), "codes are float64, expected integers"),
    "decode nothing": (lambda m: m.decode([]), "codes are empty"),
    "decode three axes": (lambda m: m.decode(np.ones((1, 1, 1), int)), r"shape \(1, 1, 1\)"),
    "no rows": (lambda m: m.batch([]), "at least one row"),
    "text id too large": (
        lambda m: m.batch([([5], [3]), ([255], [3])]),
        r"row 1: text ids must lie in 0\.\.254, found 255",
    ),
    "text id negative": (lambda m: m.batch([([-1], [3])]), r"text ids must lie in 0\.\.254, found -1\.\.-1"),
    "text with its stop": (lambda m: m.batch([([5, 0], [3])]), "row 0: text ids hold 0, which is stop"),
    "text of floats": (lambda m: m.batch([([5.0], [3])]), "text ids are float64, expected integers"),
    "text too long": (lambda m: m.batch([([5] * 59, [3])]), "text ids are 59, the model has positions for 58"),
    "code that is stop": (lambda m: m.batch([([5], [17])]), r"row 0: codes must lie in 0\.\.15, found 17\.\.17"),
    "code too large": (lambda m: m.batch([([5], [2**32])]), r"codes must lie in 0\.\.15"),
    "codes too long": (lambda m: m.batch([([5], [3] * 69)]), "codes are 69, the model has positions for 68"),
    "no codes": (lambda m: m.batch([([5], [])]), "row 0: codes are empty"),
    "codes of two axes": (lambda m: m.batch([([5], [[3]])]), r"codes have the shape \(1, 1\), expected one axis"),
    "one voice for two rows": (
        lambda m: m.losses(np.zeros((1, 32), np.float32), m.batch([([5], [3]), ([5], [3])])),
        r"conditioning has the shape \(1, 32\), expected finite numbers of \(2, 32\)",
    ),
    "a voice of NaN": (lambda m: m.outputs(np.full((1, 32), np.nan), m.batch([([5], [3])])), "expected finite numbers"),
    "signs of speech": (lambda m: m.text_ids("R&B"), r'not know & \(U\+0026\); cleaner="english" says them in words$'),
    "unknown characters": (lambda m: m.text_ids("{a}"), r"the tokenizer does not know \{ \(U\+007B\) \} \(U\+007D\)$"),
}


def with_nan(array: np.ndarray) -> np.ndarray:
    array[len(array) // 2] = np.nan
    return array


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_would_give_wrong_values_is_refused(
    model: api.Tortoise, call: Callable[[api.Tortoise], object], message: str
) -> None:
    with pytest.raises(tj.UserError, match=message):
        call(model)


def test_16_bit_clips_are_scaled(model: api.Tortoise) -> None:
    waveform = int16_from_waveform(clip(1.0))
    floats = np.asarray(waveform_from_int16(waveform))
    np.testing.assert_array_equal(model.conditioning([waveform]), model.conditioning([floats]))
    np.testing.assert_array_equal(model.encode_clip(waveform), model.encode_clip(floats))
    np.testing.assert_array_equal(model.log_mel(waveform), model.log_mel(floats))


def test_a_clip_has_the_codes_that_prepare_stores(project: Path) -> None:
    model, data = tj.load(project / "checkpoint"), tj.Dataset.open(project / "data")
    differ = 0
    for i, stored in enumerate(data.clips):
        name = next((project / "recordings" / "wavs").glob(f"{stored.id}.*"))
        codes = model.encode_clip(tj.read_audio(name))
        assert codes.dtype == np.int32
        np.testing.assert_array_equal(codes, data.codes(i))
        differ += int((np.asarray(model.encode(model.log_mel(tj.read_audio(name)))) != codes).sum())
    assert differ > 0, "the other way is another way: its mel reflects the end"


def test_log_mel_can_be_compiled_by_its_user(model: api.Tortoise) -> None:
    np.testing.assert_allclose(jax.jit(model.log_mel)(clip(1.0)), model.log_mel(clip(1.0)), atol=1e-4)


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


def test_devices_on_cpu_read_weights_where_they_are(tmp_path: Path) -> None:
    """Instead of copying them: gigabytes of a released model."""
    whole = load_pretrained(runs.write_checkpoint(tmp_path / "checkpoint"))
    leaves = [leaf for part in whole.parts.values() for leaf in jax.tree.leaves(part.variables)]
    device = jax.local_devices()[0]
    assert len(leaves) > 20
    for leaf in leaves:
        assert jax.device_put(leaf, device).unsafe_buffer_pointer() == leaf.ctypes.data


def test_checkpoints_of_before_the_digests_of_parts_open(tmp_path: Path) -> None:
    path = runs.write_checkpoint(tmp_path / "checkpoint")
    metadata = json.loads((path / "tortoise.json").read_text())
    del metadata["digests"]
    (path / "tortoise.json").write_text(json.dumps(metadata))
    old = load_pretrained(path, ())
    assert old.dvae.digest == metadata["dvae_digest"] != ""
    assert old.ar.digest == ""


# --- what the commands do ---------------------------------------------------------------------------------------------


def some_rows(model: api.Tortoise) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rows = [([5, 6, 7], [1, 2, 3, 4]), ([8, 9], [5, 6])]
    voice = 0.1 * np.random.default_rng(0).standard_normal((2, runs.AR.width)).astype(np.float32)
    return voice, model.batch(rows)


def test_gradients_pass_through_the_loss(model: api.Tortoise) -> None:
    voice, batch = some_rows(model)
    params = model.params
    weighted = functools.partial(model.loss, text_weight=0.5)
    loss, gradient = jax.jit(jax.value_and_grad(weighted))(params, voice, batch)
    means = model.losses(voice, batch)
    assert loss == pytest.approx(means["mel"] + 0.5 * means["text"], rel=1e-6)
    way = jax.tree.map(lambda leaf: np.random.default_rng(leaf.size).standard_normal(leaf.shape, np.float32), gradient)
    ahead, behind = (
        float(weighted(jax.tree.map(lambda p, w, e=e: p + np.float32(e) * w, params, way), voice, batch))
        for e in (1e-3, -1e-3)
    )
    along = sum(float(np.vdot(g, w)) for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
    assert (ahead - behind) / 2e-3 == pytest.approx(along, rel=1e-2)


def test_own_steps_lead_to_an_export(model: api.Tortoise, tmp_path: Path) -> None:
    """The README's loop: weights that another's optimiser changed, in a file that is read back."""
    voice, batch = some_rows(model)
    params = model.params
    for _ in range(3):
        params = jax.tree.map(lambda p, g: p - np.float32(0.05) * g, params, jax.grad(model.loss)(params, voice, batch))
    better = model.with_params(params)
    assert better.losses(voice, batch)["mel"] < model.losses(voice, batch)["mel"]
    lines = better.export(tmp_path / "voice.pth")
    assert lines[0].startswith(f"{tmp_path / 'voice.pth'}: ")
    written = torch.load(tmp_path / "voice.pth", weights_only=True)
    np.testing.assert_array_equal(written["text_embedding.weight"], np.asarray(params["text_embedding"]["embedding"]))
    assert "training" not in json.loads((tmp_path / "voice.json").read_text())


WRONG_COMMANDS: dict[str, tuple[Callable[[api.Tortoise, Path], object], str]] = {
    "an unknown option": (
        lambda m, p: tj.prepare(p, p, p / "out", trim_silences=True),
        r'trim_silences: no option \(did you mean "trim_silence"\?\)',
    ),
    "text as a number": (lambda m, p: tj.prepare(p, p, p / "out", workers="2"), "--workers is '2', expected int"),
    "truth as a number": (lambda m, p: tj.check(p, max_text=True), r"--max_text is True, expected int \| None"),
    "a number as truth": (lambda m, p: tj.check(p, trim_silence=1), "--trim_silence is 1, expected bool"),
    "options that are none": (
        lambda m, p: tj.check(p, None, {"seed": 1}),
        r"options is \{'seed': 1\}, expected tj.Opt",
    ),
    "no data": (lambda m, p: tj.check([]), "data is empty"),
    "data that is no path": (lambda m, p: tj.check(3), "data is 3, expected a path"),
    "no checkpoint": (lambda m, p: tj.prepare(p, None, p / "out"), "checkpoint is None, expected a path"),
    "a dict for a configuration": (lambda m, p: tj.train({"steps": 3}), "is dict, expected a ConfigDict"),
    "an unknown field": (lambda m, p: tj.get_config(step=3), r'unknown field step \(did you mean "steps"\?\)'),
    "a field of another type": (lambda m, p: tj.get_config(steps="3"), "steps is '3', expected int"),
    "another kind": (lambda m, p: tj.get_config("clvp"), "trains is 'clvp', expected one of ar, dvae"),
    "a run in no place": (lambda m, p: tj.train(tj.get_config(), None), "workdir is None, expected a path"),
    "a name that is no .pth": (lambda m, p: m.export(p / "voice.bin"), "expected a name ending in .pth"),
    "another part": (lambda m, p: m.export(p / "a.pth", part="gpt"), "part is 'gpt', expected one of ar, dvae"),
    "a part it has not": (lambda m, p: m.export(p / "a.pth", part="clvp"), "holds no CLVP"),
    "another dtype": (lambda m, p: m.export(p / "a.pth", dtype="int8"), "dtype is 'int8', expected one of float32"),
    "masks as text": (lambda m, p: m.export(p / "a.pth", attn_masks="true"), "attn_masks is 'true', expected True"),
    "half a tree": (
        lambda m, p: m.with_params({"gpt": m.params["gpt"]}),
        r"params\['.*'\] has the shape none, the model's has \(",
    ),
    "a weight of the text": (lambda m, p: m.loss(m.params, *some_rows(m), text_weight=-1), "text_weight is -1"),
}


@pytest.mark.parametrize("what", WRONG_COMMANDS)
def test_arguments_of_commands_are_checked(model: api.Tortoise, tmp_path: Path, what: str) -> None:
    call, line = WRONG_COMMANDS[what]
    with pytest.raises(tj.UserError, match=line) as caught:
        call(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_flags_that_come_too_late_are_said(
    model: api.Tortoise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """XLA reads its flags when JAX starts, which something computed before `tj.train` has made it do."""
    model.log_mel(clip(0.1))
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(parallel, "LITTLE_MEMORY", ("--xla_cpu_some_flag=1",))
    for said in ("note: JAX computed in this process before tj.train, too early for XLA's flags: ", ""):
        with pytest.raises(tj.UserError, match="does not exist"):
            tj.train(tj.get_config(checkpoint=str(tmp_path / "none")), tmp_path / "run")
        printed = capsys.readouterr().out
        assert printed.startswith(said)
        assert ("--xla_cpu_some_flag=1" in printed) == bool(said)
        monkeypatch.setattr(parallel, "LITTLE_MEMORY", ())


def test_the_module_of_the_command_is_the_function_too(tmp_path: Path) -> None:
    """`import tortoise_jax.prepare` puts the module in the function's place."""
    importlib.import_module("tortoise_jax.prepare")
    with pytest.raises(tj.UserError, match="data is 3, expected a path"):
        tj.prepare(3, tmp_path, tmp_path / "out")
