"""The models after the codes there and back, by the commands people type: CLVP, diffusion, vocoders, random voices."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import flax_to_torch, inspect_checkpoint, mapping, torch_to_flax
from convert.flax_to_torch import export
from convert.source import open_source
from convert.tables import MODELS
from convert.torch_files import read_state_dict
from convert.torch_to_flax import convert, convert_part
from tests.support import checkpoint_files as files
from tests.support.conversion import HEADS, assert_same, run
from tests.support.parity import shapes_of
from tests.support.torch_reference import (
    tiny_clvp,
    tiny_diffusion,
    tiny_dvae,
    tiny_hifigan,
    tiny_random_voice,
    tiny_unified_voice,
    tiny_vocoder,
)
from tortoise_jax.checkpoints import pretrained
from tortoise_jax.checkpoints.parts import (
    AR,
    CLVP,
    DIFFUSION,
    DVAE,
    HIFIGAN,
    PART_TYPES,
    RANDOM_AR,
    RANDOM_DIFFUSION,
    VOCODER,
)
from tortoise_jax.checkpoints.pretrained import load_pretrained, write_metadata
from tortoise_jax.errors import UserError


def models() -> dict[str, torch.nn.Module]:
    """One of each part, those that belong together of sizes that do."""
    return {
        DVAE: tiny_dvae(seed=3),
        AR: tiny_unified_voice(seed=3),
        CLVP: tiny_clvp(seed=3),
        DIFFUSION: tiny_diffusion(seed=3, in_latent_channels=64),
        VOCODER: tiny_vocoder(seed=3, n_mel_channels=100),
        HIFIGAN: tiny_hifigan(seed=3, in_channels=64, cond_channels=64),
        RANDOM_AR: tiny_random_voice(seed=3, channels=64),
        RANDOM_DIFFUSION: tiny_random_voice(seed=4, channels=64),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model under its published name, as it was published; not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    for part, model in models().items():
        state: Any = files.state_of(model)
        if part == VOCODER:  # as a GAN's trainer saves it
            state = {"model_g": state, "model_d": {"x": torch.zeros(2)}, "step": 3, "optim_g": {"state": {}}}
        files.save(folder / MODELS[part].file, state)
    return folder


@pytest.fixture(scope="module")
def converted(folder: Path) -> Path:
    convert({part: folder / model.file for part, model in MODELS.items()}, folder / "tortoise", HEADS)
    return folder / "tortoise"


def test_a_folder_of_models_there_and_back(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "tortoise"
    arguments = ("--models", folder, "--heads", HEADS, "--out", out)
    code, said, err = run(monkeypatch, capsys, torch_to_flax.main, *arguments)
    assert (code, err) == (0, "")
    for words in ("text encoder of 2 layers, width 32, 2 heads", "strides 4, 3, 2", "4 heads, latents of width 64"):
        assert words in said
    assert 'inside "model_g", beside model_d, step, optim_g (ignored)' in said
    assert list(load_pretrained(out, ()).parts) == list(PART_TYPES)
    for part, model in models().items():
        pth = tmp_path / f"{part}.pth"
        code, said, err = run(monkeypatch, capsys, flax_to_torch.main, out, "--part", part, "--out", pth)
        assert (code, err) == (0, "")
        assert f"{len(model.state_dict())} tensors, float32, read back and equal bit for bit" in said
        assert_same(read_state_dict(pth), model)
        content = torch.load(pth, weights_only=True)
        model.load_state_dict(content["model_g"] if part == VOCODER else content, strict=True)
        assert json.loads(pth.with_suffix(".json").read_text())["model"] == part


def test_what_is_missing_in_a_folder_is_left_out(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    for part in (AR, CLVP):
        (tmp_path / MODELS[part].file).symlink_to(folder / MODELS[part].file)
    arguments = ("--models", tmp_path, "--heads", HEADS, "--out", tmp_path / "out")
    code, said, _ = run(monkeypatch, capsys, torch_to_flax.main, *arguments)
    assert code == 0
    assert f"{tmp_path / 'dvae.pth'} does not exist: only" in said
    assert set(load_pretrained(tmp_path / "out", ()).parts) == {AR, CLVP}
    code, said, err = run(
        monkeypatch, capsys, torch_to_flax.main, "--models", tmp_path / "none", "--out", tmp_path / "x"
    )
    assert code == 2
    assert f"or put them into {tmp_path / 'none'}/" in err


@pytest.fixture
def started(folder: Path, tmp_path: Path) -> Path:
    """A checkpoint of what training needs."""
    convert({part: folder / MODELS[part].file for part in (DVAE, AR)}, tmp_path / "tortoise", HEADS)
    return tmp_path / "tortoise"


def test_parts_are_added_to_a_checkpoint(
    folder: Path, converted: Path, started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it lacks of a folder; the same as if all had been converted at once."""
    code, said, err = run(monkeypatch, capsys, torch_to_flax.main, "--models", folder, "--add", "--out", started)
    assert (code, err) == (0, "")
    assert f"added to {started}" in said
    assert "does not exist" not in said
    for name in ("tokenizer.json", "mel_norms.txt"):
        assert (started / name).read_text() == (converted / name).read_text()
    assert json.loads((started / "tortoise.json").read_text()) == json.loads((converted / "tortoise.json").read_text())
    one, other = load_pretrained(started), load_pretrained(converted)
    assert list(one.parts) == list(other.parts) == list(PART_TYPES)
    for name, part in one.parts.items():
        jax.tree.map(np.testing.assert_array_equal, part.tree, other.part(name).tree)
    assert sorted(path.name for path in started.iterdir()) == sorted(path.name for path in converted.iterdir())


def test_a_checkpoint_without_checksums_gets_them_where_parts_are_added(folder: Path, started: Path) -> None:
    """As older versions wrote them."""
    metadata = json.loads((started / "tortoise.json").read_text())
    stated = metadata.pop("checksums")
    (started / "tortoise.json").write_text(json.dumps(metadata))
    convert({RANDOM_AR: folder / MODELS[RANDOM_AR].file}, started, add=True)
    now = json.loads((started / "tortoise.json").read_text())["checksums"]
    assert {name: now[name] for name in stated} == stated
    assert set(now) == {DVAE, AR, RANDOM_AR}


def test_an_adding_that_fails_changes_nothing(folder: Path, started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of its steps; and the next one succeeds."""
    before = {path: path.read_bytes() for path in started.rglob("*") if path.is_file()}
    files = {part: folder / MODELS[part].file for part in (CLVP, VOCODER)}
    for module, name, calls in ((torch_to_flax, "save_tree", 2), (pretrained, "write_json", 1)):
        right, count = getattr(module, name), iter(range(calls))

        def fails(*arguments: Any, right: Any = right, count: Any = count, calls: int = calls) -> None:
            if next(count) + 1 == calls:
                raise OSError(28, "No space left on device")
            right(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(module, name, fails)
            with pytest.raises(UserError, match=r"tortoise: cannot be written: No space left"):
                convert(files, started, add=True)
        assert list(load_pretrained(started).parts) == [AR, DVAE]
        assert {path: path.read_bytes() for path in before} == before
    convert(files, started, add=True)
    assert list(load_pretrained(started).parts) == [AR, DVAE, CLVP, VOCODER]


def test_what_cannot_be_added_is_said(folder: Path, started: Path, tmp_path: Path) -> None:
    clvp = {CLVP: folder / MODELS[CLVP].file}
    with pytest.raises(UserError, match=r"tortoise has a AR model already; leave .*autoregressive.pth out"):
        convert({AR: folder / MODELS[AR].file}, started, add=True)
    with pytest.raises(UserError, match=r"none does not exist; expected a converted checkpoint"):
        convert(clvp, tmp_path / "none", add=True)
    with pytest.raises(UserError, match=r"--mel_norms does not go with --add"):
        convert(clvp, started, add=True, mel_norms=tmp_path / "norms.txt")
    (started / "steps").mkdir()
    with pytest.raises(UserError, match=r"tortoise is a run; add to the checkpoint that it began with"):
        convert(clvp, started, add=True)


@pytest.mark.parametrize("part", [CLVP, DIFFUSION, VOCODER, HIFIGAN, RANDOM_AR, RANDOM_DIFFUSION])
def test_inspection_names_the_option(folder: Path, part: str) -> None:
    said = inspect_checkpoint.inspect(folder / MODELS[part].file)
    assert MODELS[part].title in said[0]
    assert said[-1] == f"  conversion: would succeed, --{part} {folder / MODELS[part].file}"


def test_inspection_of_a_converted_checkpoint_names_every_part(converted: Path) -> None:
    said = "\n".join(inspect_checkpoint.inspect(converted))
    found = load_pretrained(converted, ()).parts
    for part, kind in PART_TYPES.items():
        assert f"  {kind.title}: {MODELS[part].summary(found[part].config)}" in said


def test_one_model_given_as_another(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a TorToiSe CLVP: give it as --clvp"):
        convert({VOCODER: folder / "clvp2.pth"}, tmp_path / "out")
    with pytest.raises(UserError, match=r"random latent generator: give it as --random_ar or --random_diffusion"):
        convert({CLVP: folder / "rlg_auto.pth"}, tmp_path / "out")
    convert({RANDOM_DIFFUSION: folder / "rlg_auto.pth"}, tmp_path / "out")  # their names are the same


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        (CLVP, {"text_transformer.transformer.attn_layers.layers.1.0.0.g": None}, "layers.1.0.0.g is missing"),
        (CLVP, {"speech_transformer.transformer.attn_layers.rotary_pos_emb.inv_freq": None}, "inv_freq is missing"),
        (
            CLVP,
            {"text_transformer.transformer.attn_layers.layers.0.1.wrap.to_q.weight": torch.zeros(100, 32)},
            "has 100 rows, expected heads of 64",
        ),
        (DIFFUSION, {"layers.3.out_layers.3.bias": None}, "layers.3.out_layers.3.bias is missing"),
        (DIFFUSION, {"layers.5.in_layers.0.weight": torch.zeros(32)}, "layers.5.in_layers.0.weight is one more"),
        (
            DIFFUSION,
            {"contextual_embedder.7.norm.bias": torch.zeros(64)},
            "contextual_embedder.7.norm.bias is one more",
        ),
        (DIFFUSION, {"latent_conditioner.2.qkv.bias": None}, "key latent_conditioner.2.qkv.bias is missing"),
        (VOCODER, {"res_stack.1.convt_pre.1.weight_g": None}, "res_stack.1.convt_pre.1.weight_g is missing"),
        (VOCODER, {"conv_pre.weight": torch.zeros(3, 8, 7)}, "is one more than the other keys"),
        (VOCODER, {"res_stack.0.kernel_predictor.kernel_conv.weight_v": torch.zeros(9, 6, 3)}, "expected kernels of 3"),
        (HIFIGAN, {"resblocks.6.convs1.0.bias": torch.zeros(2)}, "7 residual stacks (resblocks) for 3 upsamplings"),
        (RANDOM_AR, {"layers.2.bias": None}, "key layers.2.bias is missing"),
    ],
)
def test_damaged_files_are_named(part: str, change: dict[str, Any], says: str, tmp_path: Path) -> None:
    state = files.state_of(models()[part])
    for key, value in change.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    with pytest.raises(UserError) as caught:
        convert({part: files.save(tmp_path / "a.pth", state)}, tmp_path / "out")
    assert says in str(caught.value)
    assert "a.pth" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_newer_names_of_weight_norm_go_back_under_the_older(tmp_path: Path) -> None:
    older, newer = tiny_vocoder(seed=5), tiny_vocoder(seed=5, norm="newer")
    path = files.save(tmp_path / "vocoder.pth", {"model_g": files.state_of(newer)})
    convert({VOCODER: path}, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back.pth")  # the only model there is
    back = read_state_dict(tmp_path / "back.pth")
    assert shapes_of(older) == {key: value.shape for key, value in back.items()}
    for old, new in (("g", "original0"), ("v", "original1")):
        want = newer.state_dict()[f"conv_pre.parametrizations.weight.{new}"]
        assert np.array_equal(back[f"conv_pre.weight_{old}"], want)


def test_a_run_knows_only_the_parts_it_holds(converted: Path, tmp_path: Path) -> None:
    """It is begun from a checkpoint that may hold more, whose weights are not read."""
    write_metadata(tmp_path, load_pretrained(converted, (AR, DVAE)).only(AR, DVAE))
    metadata = json.loads((tmp_path / "tortoise.json").read_text())
    assert [part for part in PART_TYPES if metadata[part]] == [AR, DVAE]
    assert set(metadata["source"]) == {AR, DVAE}


@st.composite
def any_model(draw: st.DrawFn) -> tuple[str, torch.nn.Module]:
    part = draw(st.sampled_from([CLVP, DIFFUSION, VOCODER, HIFIGAN, RANDOM_AR]))
    small = lambda low=1, high=3: draw(st.integers(low, high))
    norm = draw(st.sampled_from(["older", "folded"]))
    if part == CLVP:
        sides = {f"{side}_{what}": small() for side in ("text", "speech") for what in ("enc_depth", "heads")}
        widths = {name: small(1, 9) for name in ("dim_text", "dim_speech", "dim_latent", "num_text_tokens")}
        return part, tiny_clvp(**sides, **widths)
    if part == DIFFUSION:
        heads = small()
        sizes = {name: small(1, 9) for name in ("in_channels", "out_channels", "in_latent_channels", "in_tokens")}
        return part, tiny_diffusion(model_channels=heads * 8 * small(), num_heads=heads, num_layers=small(), **sizes)
    if part == VOCODER:
        strides = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        sizes = {name: small(1, 5) for name in ("channel_size", "noise_dim", "n_mel_channels", "kpnet_width")}
        return part, tiny_vocoder(strides=strides, norm=norm, **sizes)
    if part == HIFIGAN:
        kernels = tuple(draw(st.lists(st.sampled_from([4, 8, 16]), min_size=1, max_size=3)))
        stacks = tuple(draw(st.lists(st.sampled_from([3, 5, 7]), min_size=1, max_size=3)))
        sizes = dict(upsample_initial_channel=8 * small(), in_channels=small(1, 9), cond_channels=small(1, 9))
        return part, tiny_hifigan(upsample_kernel_sizes=kernels, resblock_kernel_sizes=stacks, norm=norm, **sizes)
    return part, tiny_random_voice(channels=small(1, 20))


@settings(max_examples=40)
@given(any_model(), st.randoms(use_true_random=False))
def test_any_size_comes_back_bit_for_bit(made: tuple[str, torch.nn.Module], order: Any) -> None:
    part, model = made
    state = files.state_of(model)
    keys = list(state)
    order.shuffle(keys)
    with tempfile.TemporaryDirectory() as folder:
        path = files.save(Path(folder) / "a.pth", {key: state[key] for key in keys})
        source = open_source(path, part)
        tree = convert_part(source, allow_nonfinite=False)[0].tree
        assert sorted(source.plan.keys) == sorted(keys)
        assert_same(mapping.to_torch(MODELS[part].table, tree), model)
