"""What `inspect_checkpoint.py` says about files, folders, converted checkpoints and runs."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from convert import inspect_checkpoint, mapping
from convert.flax_to_torch import export
from convert.inspect_checkpoint import inspect
from convert.tables import MODELS
from convert.torch_files import read_state_dict
from convert.torch_to_flax import convert
from tests.support import checkpoint_files as files
from tests.support.conversion import HEADS, assert_same, run
from tests.support.torch_reference import tiny_dvae, tiny_unified_voice
from tortoise_jax.checkpoints.parts import AR, DVAE
from tortoise_jax.checkpoints.pretrained import load_pretrained, write_metadata
from tortoise_jax.checkpoints.run_checkpoints import RunCheckpoints
from tortoise_jax.checkpoints.trees import save_tree
from tortoise_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """autoregressive.pth, dvae.pth and what they are converted to; not to be changed."""
    folder = tmp_path_factory.mktemp("inspected")
    voice = files.with_masks(files.state_of(tiny_unified_voice(seed=5)))
    ar = files.save(folder / "autoregressive.pth", {"model": files.with_prefix(voice), "step": 3})
    convert(
        {DVAE: files.save(folder / "dvae.pth", files.state_of(tiny_dvae(seed=5))), AR: ar}, folder / "tortoise", HEADS
    )
    return folder


@pytest.fixture(scope="module")
def a_run(folder, tmp_path_factory) -> Path:
    """A run with two steps, the first the better one."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run.mkdir()
    pretrained = load_pretrained(folder / "tortoise")
    save_tree(run / "dvae", pretrained.dvae.tree)
    write_metadata(run, pretrained)
    (run / "config.json").write_text(json.dumps({"seed": 7}))
    checkpoints = RunCheckpoints(run)
    for step, loss in ((10, 1.0), (20, 2.0)):
        params = jax.tree.map(lambda leaf, step=step: leaf + np.float32(step), pretrained.ar.params)
        checkpoints.save(step, params, {"count": np.zeros((), np.int32)}, {"step": step}, loss)
    checkpoints.finish()
    return run


def test_an_ar_file(folder) -> None:
    lines = inspect(folder / "autoregressive.pth", HEADS)
    said = "\n".join(lines)
    assert lines[0].endswith("TorToiSe AR model (UnifiedVoice); torch zip, 92 tensors, 319,733 numbers, float32, uint8")
    for words in (
        "3 layers, width 64, 4 heads (--heads), 64 codes, 256 text tokens",
        "positions: 44 for codes, 32 for text",
        'inside "model", beside step (ignored)',
        'prefix "module." removed from every key',
        "dropped 6 tensors: causal masks",
    ):
        assert words in said
    assert lines[-1] == f"  conversion: would succeed, --ar {folder / 'autoregressive.pth'}"


def test_a_dvae_file(folder, tmp_path) -> None:
    for path in (folder / "dvae.pth", files.safetensors(tmp_path / "d.safetensors", files.state_of(tiny_dvae()))):
        said = "\n".join(inspect(path))
        assert "TorToiSe dVAE (DiscreteVAE); " in said
        assert "codebook_dim 24, read from codebook.embed; the public configs' 256 does not apply" in said
        assert f"conversion: would succeed, --dvae {path}" in said


def test_why_a_conversion_would_fail(folder, tmp_path) -> None:
    assert "conversion: would fail, width 64 is below" in "\n".join(inspect(folder / "autoregressive.pth"))
    state = files.state_of(tiny_unified_voice())
    state["mel_head.bias"][0] = torch.nan
    said = inspect(files.save(tmp_path / "a.pth", state), HEADS)
    assert "would fail, mel_head.bias has 1 values that are NaN" in said[-1]
    copies = files.with_inference_model(files.state_of(tiny_unified_voice()))
    copies["inference_model.embeddings.weight"] = copies["mel_embedding.weight"] * 2
    said = inspect(files.save(tmp_path / "b.pth", copies), HEADS)
    assert "would fail, inference_model.embeddings.weight differs from mel_embedding.weight" in said[-1]


@pytest.mark.parametrize("name", files.REFUSED)
def test_inspection_agrees_with_conversion(name: str, tmp_path) -> None:
    build, says = files.REFUSED[name]
    path = files.save(tmp_path / "given.pth", build(files.state_of(tiny_unified_voice())))
    with pytest.raises(UserError):
        convert({AR: path}, tmp_path / "out", HEADS)
    try:
        said = "\n".join(inspect(path, HEADS))
    except UserError as error:
        said = str(error) + " conversion: would fail"
    assert says in said
    assert "conversion: would fail" in said or "conversion: refused" in said
    assert "would succeed" not in said


@pytest.mark.parametrize("variant", files.WITH)
def test_every_variant_would_be_converted(variant: str, tmp_path) -> None:
    path = files.save(tmp_path / "a.pth", files.WITH[variant](files.state_of(tiny_unified_voice())))
    assert "would succeed" in inspect(path, HEADS)[-1]


def test_a_folder_of_files(folder, tmp_path) -> None:
    said = "\n".join(inspect(folder, HEADS))
    assert said.count("would succeed") == 2
    (tmp_path / "broken.pth").write_bytes(b"")
    files.save(tmp_path / "voice.pth", (torch.zeros(1, 4), torch.zeros(1, 8)))
    said = "\n".join(inspect(tmp_path))
    assert "broken.pth is empty" in said
    assert "a voice's latents" in said


def test_a_converted_checkpoint(folder, monkeypatch, capsys) -> None:
    code, said, _ = run(monkeypatch, capsys, inspect_checkpoint.main, folder / "tortoise")
    assert code == 0
    for words in (
        "a converted checkpoint of tortoise_jax",
        "AR model: 3 layers, width 64, 4 heads",
        "302,402 parameters",
        "codebook_dim 24, 45,224 parameters and buffers",
        'ar from "autoregressive.pth", sha256 ',
        "conversion back: would succeed",
    ):
        assert words in said


def test_a_run_and_its_export(a_run, tmp_path) -> None:
    said = "\n".join(inspect(a_run))
    assert "a run of tortoise_jax" in said
    assert "steps 10, 20; the best is 10" in said
    pretrained = load_pretrained(a_run, ("ar",), 10)
    assert "of step 10" in export(a_run, tmp_path / "best.pth")[0]
    original = mapping.to_torch(MODELS[AR].table, pretrained.ar.params)
    written = read_state_dict(tmp_path / "best.pth")
    assert all(mapping.same_bits(written[key], value) for key, value in original.items())
    metadata = json.loads((tmp_path / "best.json").read_text())
    assert metadata["training"] == {"step": 10, "config": {"seed": 7}}
    assert "exported by tortoise_jax" in "\n".join(inspect(tmp_path / "best.pth"))
    assert "step 10 of a run" in "\n".join(inspect(tmp_path / "best.pth"))
    export(a_run, tmp_path / "last.pth", step=20)
    assert not np.array_equal(read_state_dict(tmp_path / "last.pth")["mel_head.bias"], written["mel_head.bias"])
    with pytest.raises(UserError, match=r"holds no step 15, only \[10, 20\]"):
        export(a_run, tmp_path / "none.pth", step=15)
    with pytest.raises(UserError, match="the dVAE is the same at every step"):
        export(a_run, tmp_path / "none.pth", part="dvae", step=10)
    export(a_run, tmp_path / "dvae.pth", part="dvae")
    assert_same(read_state_dict(tmp_path / "dvae.pth"), tiny_dvae(seed=5))


def test_the_training_metadata_is_kept_when_converted_again(a_run, tmp_path) -> None:
    export(a_run, tmp_path / "voice.pth")
    convert({AR: tmp_path / "voice.pth"}, tmp_path / "again")
    assert load_pretrained(tmp_path / "again", ()).source["ar"]["training"]["step"] == 10


def test_a_damaged_checkpoint_of_ours(folder, tmp_path) -> None:
    import shutil

    shutil.copytree(folder / "tortoise", tmp_path / "tortoise")
    shutil.rmtree(tmp_path / "tortoise" / "ar")
    with pytest.raises(UserError, match="ar is missing: the checkpoint is incomplete"):
        inspect(tmp_path / "tortoise")


@pytest.mark.parametrize(("path", "says"), [("none", "none does not exist"), (".", "nothing to inspect")])
def test_what_is_not_there(path: str, says: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, err = run(monkeypatch, capsys, inspect_checkpoint.main, path)
    assert (code, said) == (2, "")
    assert says in err
