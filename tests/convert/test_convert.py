"""Conversion there and back, by the commands people type: every variant, every refusal, every option."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st

from convert import flax_to_torch, mapping, progress, torch_to_flax
from convert.flax_to_torch import export
from convert.source import describe, open_source
from convert.tables import MODELS
from convert.torch_files import OUT_DTYPES, as_torch, read_state_dict
from convert.torch_to_flax import convert, convert_part
from tests.support import checkpoint_files as files
from tests.support.conversion import HEADS, assert_same, run
from tests.support.layer_values import check_values
from tests.support.torch_reference import DiscreteVAE, UnifiedVoice, random_batch, tiny_dvae, tiny_unified_voice
from tortoise_jax.checkpoints.parts import AR, DVAE
from tortoise_jax.checkpoints.pretrained import load_pretrained
from tortoise_jax.errors import UserError
from tortoise_jax.models.unified_voice import MEL, TEXT
from tortoise_jax.models.unified_voice import UnifiedVoice as FlaxVoice
from tortoise_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4  # of max|a - b| / max|b|, the whole stack
TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def voice() -> UnifiedVoice:
    return tiny_unified_voice(seed=3).requires_grad_(False)


@pytest.fixture(scope="module")
def dvae() -> DiscreteVAE:
    return tiny_dvae(seed=3).requires_grad_(False)


@pytest.fixture(scope="module")
def converted(voice, dvae, tmp_path_factory) -> Path:
    """A converted checkpoint of both models; not to be changed."""
    folder = tmp_path_factory.mktemp("converted")
    ar = files.save(folder / "autoregressive.pth", files.with_masks(files.state_of(voice)))
    convert({DVAE: files.save(folder / "dvae.pth", files.state_of(dvae)), AR: ar}, folder / "tortoise", HEADS)
    return folder / "tortoise"


# --- there and back ---------------------------------------------------------------------------------------------------


def test_commands_there_and_back_are_bit_exact_and_load_strictly(voice, dvae, tmp_path, monkeypatch, capsys) -> None:
    ar = files.save(tmp_path / "autoregressive.pth", files.with_masks(files.state_of(voice)))
    book = files.save(tmp_path / "dvae.pth", files.state_of(dvae))
    out = tmp_path / "tortoise"
    arguments = ("--dvae", book, "--ar", ar, "--heads", HEADS, "--out", out)
    code, said, err = run(monkeypatch, capsys, torch_to_flax.main, *arguments)
    assert (code, err) == (0, "")
    for words in (
        "3 layers, width 64, 4 heads (--heads), 64 codes, 256 text tokens",
        "302,402 parameters, float32",
        "dropped 6 tensors: causal masks",
        "codebook_dim 24, read from codebook.embed; the public configs' 256 does not apply",
        "45,224 parameters and buffers",
        f"written to {out}",
    ):
        assert words in said
    for part, model in (("ar", voice), ("dvae", dvae)):
        pth = tmp_path / f"{part}-back.pth"
        code, said, err = run(monkeypatch, capsys, flax_to_torch.main, out, "--part", part, "--out", pth)
        assert (code, err) == (0, "")
        assert f"{len(model.state_dict())} tensors, float32, read back and equal bit for bit" in said
        assert_same(read_state_dict(pth), model)
        fresh = type(model)(**(files_arguments(pth) if part == "ar" else dvae_arguments(pth)))
        fresh.load_state_dict(torch.load(pth, weights_only=True), strict=True)


def files_arguments(pth: Path) -> dict[str, Any]:
    """The constructor arguments that the .json beside a .pth gives."""
    return json.loads(pth.with_suffix(".json").read_text())["constructor"]


def dvae_arguments(pth: Path) -> dict[str, Any]:
    d = json.loads(pth.with_suffix(".json").read_text())["dimensions"]
    names = {"hidden_dim": "hidden", "num_layers": "layers", "num_resnet_blocks": "res_blocks"}
    rest = {"codebook_dim": "codebook_dim", "num_tokens": "codes", "channels": "channels"}
    return {ours: d[theirs] for ours, theirs in (names | rest).items()}


def test_logits_of_the_exported_file_are_ours(converted, tmp_path) -> None:
    """Weights other than those that were converted, so that neither side can have kept the original's."""
    export(converted, tmp_path / "voice.pth")
    model = UnifiedVoice(**files_arguments(tmp_path / "voice.pth")).eval().requires_grad_(False)
    model.load_state_dict(torch.load(tmp_path / "voice.pth", weights_only=True), strict=True)
    batch = random_batch(model, seed=1, text_lengths=(6,), code_lengths=(9,))
    conditioning = model.conditioning_latent(batch["cond_mel"])
    text_logits, mel_logits = model.row_logits(conditioning[0], batch["text"][0], batch["codes"][0])

    ours = load_pretrained(converted, ("ar",)).ar
    c = ours.config
    text = [c.start_text, *batch["text"][0].tolist(), c.stop_text]
    codes = [c.start_mel, *batch["codes"][0].tolist(), c.stop_mel]
    row = lambda values: np.array([[0, *values]], np.int32)
    out = FlaxVoice(c).apply(
        {"params": jax.tree.map(jax.numpy.asarray, ours.params)},
        batch["cond_mel"].mT.numpy(),
        row([*text, *codes]),
        row([*[TEXT] * len(text), *[MEL] * len(codes)]),
        row([*range(len(text)), *range(len(codes))]),
    )
    for got, want in (
        (out["text_logits"][0, 1 : 1 + len(text)], text_logits),
        (out["mel_logits"][0, 1 + len(text) :], mel_logits),
    ):
        assert np.abs(got - want.numpy()).max() <= TOLERANCE * np.abs(want.numpy()).max()


@pytest.mark.parametrize("variant", files.WITH)
def test_every_variant_gives_the_same_weights(voice, variant: str, tmp_path) -> None:
    content = files.WITH[variant](files.state_of(voice))
    path = files.save(tmp_path / "a.pth", content)
    source = open_source(path, AR, HEADS)
    part, remarks = convert_part(source, allow_nonfinite=False)
    assert not remarks
    assert_same(mapping.to_torch(MODELS[AR].table, part.tree), voice)
    assert sorted([*source.plan.keys, *source.plan.dropped]) == sorted(source.found.state)
    assert all(found.row.reason for found in source.plan.dropped.values())


@pytest.mark.parametrize(
    ("variant", "keys"),
    [
        ("410 keys", 410),
        ("470 keys", 470),
        ("after generating with tortoise 3.0", 782),
        ("after generating with tortoise 3.0, masks", 902),
        ("after generating with DL-Art-School", 780),
    ],
)
def test_builders_make_as_many_keys_as_the_real_files_have(variant: str, keys: int) -> None:
    small = dict(model_dim=16, number_mel_codes=8194, start_mel_token=8192, stop_mel_token=8193)
    state = files.state_of(tiny_unified_voice(layers=30, **small))
    assert len(files.WITH[variant](state)) == keys


@pytest.mark.parametrize("write", [files.old_format, files.safetensors], ids=lambda write: write.__name__)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_other_formats_and_dtypes(voice, write: Any, dtype: str, tmp_path) -> None:
    state = {key: value.to(TORCH_DTYPES[dtype]) for key, value in files.state_of(voice).items()}
    path = write(tmp_path / "voice", state)
    source = open_source(path, AR, HEADS)
    assert source.dtypes == dtype
    assert any("has no checksums" in line for line in describe(source))
    params = convert_part(source, allow_nonfinite=False)[0].tree
    back = mapping.to_torch(MODELS[AR].table, params)
    for key, value in state.items():
        assert np.array_equal(back[key], value.float().numpy())


@st.composite
def voice_dims(draw: st.DrawFn) -> dict[str, Any]:
    heads, codes, text = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 20)), draw(st.integers(2, 30))
    return dict(
        layers=draw(st.integers(1, 3)),
        heads=heads,
        model_dim=heads * 4 * draw(st.integers(1, 4)),
        max_text_tokens=draw(st.integers(1, 20)),
        max_mel_tokens=draw(st.integers(1, 20)),
        number_text_tokens=text,
        start_text_token=text,
        number_mel_codes=codes + 2,
        start_mel_token=codes,
        stop_mel_token=codes + 1,
    )


@st.composite
def dvae_dims(draw: st.DrawFn) -> dict[str, Any]:
    return dict(
        hidden_dim=draw(st.integers(1, 12)),
        num_layers=draw(st.integers(1, 3)),
        num_resnet_blocks=draw(st.integers(0, 3)),
        codebook_dim=draw(st.integers(1, 20)),
        num_tokens=draw(st.integers(1, 20)),
        channels=draw(st.integers(1, 20)),
    )


@st.composite
def saved_models(draw: st.DrawFn) -> dict[str, Any]:
    """Dimensions, what is added, dtype, key order, prefixes, wrappers, file format."""
    dims = draw(st.one_of(voice_dims(), dvae_dims()))
    additions = [files.with_masks, files.with_solo_embeddings, files.with_alignment_head, files.with_inference_model]
    if "hidden_dim" in dims:
        additions = [files.with_statistics]
    return {
        "dims": dims,
        "extras": draw(st.lists(st.sampled_from(additions), unique=True)),
        "dtype": draw(st.sampled_from(list(TORCH_DTYPES))),
        "order": draw(st.randoms(use_true_random=False)),
        "prefixes": draw(st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=2)),
        "wrappers": draw(st.lists(st.sampled_from(["state_dict", "model", "model_g"]), max_size=2)),
        "write": draw(st.sampled_from([files.save, files.old_format, files.safetensors])),
    }


@given(saved_models())
def test_any_model_saved_in_any_way_comes_back_bit_for_bit(saved: dict[str, Any]) -> None:
    dtype = TORCH_DTYPES[saved["dtype"]]
    is_dvae = "hidden_dim" in saved["dims"]
    part = DVAE if is_dvae else AR
    model = (tiny_dvae if is_dvae else tiny_unified_voice)(**saved["dims"]).to(dtype).requires_grad_(False)
    want = files.state_of(model)
    state = files.state_of(model)
    for add in saved["extras"]:
        state = add(state)
    keys = list(state)
    saved["order"].shuffle(keys)
    state = {key: state[key] for key in keys}
    for prefix in saved["prefixes"]:
        state = files.with_prefix(state, prefix)
    content: Any = state
    if saved["write"] is not files.safetensors:
        for wrapper in saved["wrappers"]:
            content = {wrapper: content}

    with tempfile.TemporaryDirectory() as folder:
        path = saved["write"](Path(folder) / "a.pth", content)
        source = open_source(path, part, saved["dims"].get("heads"))
        params = convert_part(source, allow_nonfinite=False)[0].tree
        check_values(model.float(), params)
        assert sorted([*source.plan.keys, *source.plan.dropped]) == sorted(keys)
        assert sorted(source.plan.keys) == sorted(want)
        assert {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()} == source.plan.shapes
        back = mapping.to_torch(MODELS[part].table, params)
        assert list(back) == list(want)
        for key, value in want.items():
            assert torch.equal(as_torch(back[key]).to(dtype), value), key
            assert np.array_equal(back[key], value.float().numpy()), key


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", files.REFUSED)
def test_what_cannot_be_converted_is_named_in_one_line(voice, name: str, tmp_path, monkeypatch, capsys) -> None:
    build, says = files.REFUSED[name]
    path = files.save(tmp_path / "given.pth", build(files.state_of(voice)))
    arguments = ("--ar", path, "--heads", HEADS, "--out", tmp_path / "out")
    code, said, err = run(monkeypatch, capsys, torch_to_flax.main, *arguments)
    assert (code, said) == (2, "")
    assert says in err
    assert "given.pth" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.pth"]


def test_one_model_given_as_the_other(voice, dvae, tmp_path) -> None:
    ar = files.save(tmp_path / "a.pth", files.state_of(voice))
    book = files.save(tmp_path / "d.pth", files.state_of(dvae))
    with pytest.raises(UserError, match=r"--ar .*d\.pth is a TorToiSe dVAE .*give it as --dvae"):
        convert({AR: book}, tmp_path / "out", HEADS)
    with pytest.raises(UserError, match=r"--dvae .*a\.pth is a TorToiSe AR model .*give it as --ar"):
        convert({DVAE: ar}, tmp_path / "out")


def test_models_that_do_not_belong_together(voice, dvae, tmp_path) -> None:
    ar = files.save(tmp_path / "a.pth", files.state_of(voice))
    other = files.save(tmp_path / "d.pth", files.state_of(tiny_dvae(num_tokens=63)))
    says = r"codebook.embed has 63 codes, mel_embedding.weight has room for 64 \(its 66 rows less start and stop\)"
    with pytest.raises(UserError, match=says):
        convert({DVAE: other, AR: ar}, tmp_path / "out", HEADS)
    bands = files.save(tmp_path / "b.pth", files.state_of(tiny_dvae(channels=100)))
    with pytest.raises(UserError, match=r"reads mels of 100 bands, conditioning_encoder.init.weight of 80"):
        convert({DVAE: bands, AR: ar}, tmp_path / "out", HEADS)
    with pytest.raises(UserError, match="reads mels of 100 bands, the mel norms are 80"):
        convert({DVAE: bands}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stated_codebook_dimension_is_only_compared(dvae, voice, tmp_path, monkeypatch, capsys) -> None:
    book = files.save(tmp_path / "d.pth", files.state_of(dvae))
    arguments = ("--dvae", book, "--out", tmp_path / "out", "--codebook_dim")
    code, _, err = run(monkeypatch, capsys, torch_to_flax.main, *arguments, 256)
    assert code == 2
    assert "--codebook_dim 256, but" in err
    assert "has 24: its tensor codebook.embed has shape (24, 64), codebook_dim first" in err
    assert "(the public configs say 256, which does not apply to the released file)" in err
    assert run(monkeypatch, capsys, torch_to_flax.main, *arguments, 24)[0] == 0
    ar = files.save(tmp_path / "a.pth", files.state_of(voice))
    with pytest.raises(UserError, match="--codebook_dim 24 is about a dVAE"):
        convert({AR: ar}, tmp_path / "none", HEADS, codebook_dim=24)


@pytest.mark.parametrize("dim", [256, 512, 100])
def test_any_codebook_dimension(dim: int, tmp_path) -> None:
    model = tiny_dvae(codebook_dim=dim, num_tokens=1024)
    state = files.state_of(model)
    state = files.with_statistics(state)
    lines = convert({DVAE: files.save(tmp_path / "dvae.pth", state)}, tmp_path / "out")
    assert any(f"codebook_dim {dim}, read from codebook.embed" in line for line in lines)
    assert any("does not apply" in line for line in lines) == (dim != 256)
    assert any("dropped 3 tensors: statistics" in line for line in lines)
    export(tmp_path / "out", tmp_path / "back.pth")  # the only model there is
    assert_same(read_state_dict(tmp_path / "back.pth"), model)
    export(tmp_path / "out", tmp_path / "all.pth", source=tmp_path / "dvae.pth")
    assert read_state_dict(tmp_path / "all.pth").keys() == state.keys()


def test_the_released_dvae_is_recognised(dvae, tmp_path, monkeypatch) -> None:
    path = files.save(tmp_path / "dvae.pth", files.state_of(dvae))
    assert not any("sha256" in line for line in convert({DVAE: path}, tmp_path / "a"))
    ours = dataclasses.replace(MODELS[DVAE], sha256=torch_to_flax.sha256(path))
    monkeypatch.setitem(MODELS, DVAE, ours)
    assert any("its sha256 is that of the released dvae.pth" in line for line in convert({DVAE: path}, tmp_path / "b"))


def test_nonfinite_weights_are_converted_only_on_demand(voice, tmp_path) -> None:
    state = files.state_of(voice)
    state["gpt.h.2.ln_1.bias"][3] = torch.inf
    state["mel_head.bias"][:2] = torch.nan
    path = files.save(tmp_path / "a.pth", state)
    with pytest.raises(UserError, match=r"gpt.h.2.ln_1.bias has 1 values that are NaN or infinite and 1 more tensors"):
        convert({AR: path}, tmp_path / "out", HEADS)
    assert not (tmp_path / "out").exists()
    lines = convert({AR: path}, tmp_path / "out", HEADS, allow_nonfinite=True)
    assert any("warning" in line and "gpt.h.2.ln_1.bias" in line for line in lines)
    export(tmp_path / "out", tmp_path / "back.pth")
    back = read_state_dict(tmp_path / "back.pth")
    for key, value in state.items():
        assert mapping.same_bits(back[key], value.numpy())


def test_large_finite_weights_are_not_called_infinite() -> None:
    assert torch_to_flax.nonfinite(np.full(10, 3e38, np.float32)) == 0
    assert torch_to_flax.nonfinite(np.array([1.0, -np.inf, np.nan], np.float32)) == 2


# --- what the file does not tell --------------------------------------------------------------------------------------


def test_heads_come_from_the_json_beside_an_exported_file(converted, tmp_path) -> None:
    export(converted, tmp_path / "voice.pth")
    assert open_source(tmp_path / "voice.pth", AR).config.heads == HEADS
    assert open_source(tmp_path / "voice.pth", AR).heads_from == "its .json"
    assert open_source(tmp_path / "voice.pth", AR, heads=8).config.heads == 8
    metadata = json.loads((tmp_path / "voice.json").read_text())
    for wrong in (0, "4", True):
        files.write_json(tmp_path / "voice.json", metadata | {"heads": wrong})
        with pytest.raises(UserError, match=r'voice.json: "heads" is .* expected a number'):
            open_source(tmp_path / "voice.pth", AR)
    files.write_json(tmp_path / "voice.json", metadata | {"conditioning_inputs": "two"})
    with pytest.raises(UserError, match=r'"conditioning_inputs" is .two., expected a number'):
        convert({AR: tmp_path / "voice.pth"}, tmp_path / "out")
    files.write_json(tmp_path / "voice.json", metadata | {"conditioning_inputs": 1})
    convert({AR: tmp_path / "voice.pth"}, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "again.pth")
    constructor = files_arguments(tmp_path / "again.pth")
    assert (constructor["max_conditioning_inputs"], constructor["max_mel_tokens"]) == (1, 41)
    files.write_json(tmp_path / "voice.json", {"heads": 2})  # not ours
    with pytest.raises(UserError, match="--heads N"):
        open_source(tmp_path / "voice.pth", AR)
    (tmp_path / "voice.json").write_text("{ another program's")
    with pytest.raises(UserError, match="--heads N"):
        open_source(tmp_path / "voice.pth", AR)
    (tmp_path / "voice.json").write_text('{"tortoise_jax": "0.1.0", ')
    with pytest.raises(UserError, match=r"voice.json, which belongs to .*voice.pth, is damaged"):
        open_source(tmp_path / "voice.pth", AR)


def test_metadata_beside_an_export_says_what_shapes_cannot(converted, tmp_path) -> None:
    export(converted, tmp_path / "voice.pth")
    metadata = json.loads((tmp_path / "voice.json").read_text())
    whole = load_pretrained(converted, ())
    assert metadata["heads"] == HEADS
    assert metadata["conditioning_inputs"] == 2
    assert metadata["tokenizer_digest"] == whole.tokenizer.digest
    assert metadata["source"]["ar"]["file"] == "autoregressive.pth"
    assert metadata["source"]["dvae"]["sha256"] == torch_to_flax.sha256(converted.parent / "dvae.pth")
    assert UnifiedVoice(**metadata["constructor"]).mel_pos_embedding.emb.num_embeddings == 44


def test_early_position_tables(tmp_path) -> None:
    model = tiny_unified_voice(layers=1, max_mel_tokens=300, max_text_tokens=200)
    lines = convert({AR: files.save(tmp_path / "a.pth", files.state_of(model))}, tmp_path / "out", HEADS)
    assert any("positions: 304 for codes, 202 for text (an early release's" in line for line in lines)
    export(tmp_path / "out", tmp_path / "back.pth")
    assert_same(read_state_dict(tmp_path / "back.pth"), model)


def test_a_text_table_of_its_own_asks_for_its_tokenizer(tmp_path) -> None:
    model = tiny_unified_voice(layers=1, number_text_tokens=299, start_text_token=299)
    path = files.save(tmp_path / "a.pth", files.state_of(model))
    says = r"text table \(text_embedding.weight\) has 300 rows, the released model's 256: .* --tokenizer"
    with pytest.raises(UserError, match=says):
        convert({AR: path}, tmp_path / "out", HEADS)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(Tokenizer.default().to_json())
    convert({AR: path}, tmp_path / "out", HEADS, tokenizer=tokenizer)
    lines = export(tmp_path / "out", tmp_path / "voice.pth")
    assert any("its text table has 300 rows, TorToiSe's code builds 256" in line for line in lines)
    assert any("number_text_tokens=299, start_text_token=299" in line for line in lines)
    small = tiny_unified_voice(layers=1, number_text_tokens=99, start_text_token=99)
    with pytest.raises(UserError, match=r"has 255 tokens, but .* has room for 99"):
        convert({AR: files.save(path, files.state_of(small))}, tmp_path / "b", HEADS, tokenizer=tokenizer)


def test_an_export_asks_for_its_tokenizer_and_mel_norms_again(converted, tmp_path) -> None:
    export(converted, tmp_path / "voice.pth")
    metadata = json.loads((tmp_path / "voice.json").read_text())
    for name, option in (("tokenizer", "--tokenizer tokenizer.json"), ("mel_norms", "--mel_norms mel_norms.txt")):
        files.write_json(tmp_path / "voice.json", metadata | {f"{name}_digest": "0"})
        with pytest.raises(UserError, match=option):
            convert({AR: tmp_path / "voice.pth"}, tmp_path / "out")
    norms = np.linspace(-9, -1, 80).astype(np.float32)
    np.savetxt(tmp_path / "norms.txt", norms, fmt="%.9g")
    files.write_json(tmp_path / "voice.json", metadata | {"mel_norms_digest": flax_to_torch.mel_norms_digest(norms)})
    convert({AR: tmp_path / "voice.pth"}, tmp_path / "out", mel_norms=tmp_path / "norms.txt")
    assert np.array_equal(load_pretrained(tmp_path / "out", ()).mel_norms, norms)


@pytest.mark.parametrize("content", ["a b", "", "1\nnan", "1 2\n3 4", "0\n1"])
def test_mel_norms_that_are_none(voice, content: str, tmp_path, recwarn) -> None:
    (tmp_path / "norms.txt").write_text(content)
    ar = files.save(tmp_path / "a.pth", files.state_of(voice))
    with pytest.raises(UserError, match=r"mel norms|--mel_norms"):
        convert({AR: ar}, tmp_path / "out", HEADS, mel_norms=tmp_path / "norms.txt")


# --- back to torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", OUT_DTYPES)
def test_dtypes_of_an_export(voice, converted, dtype: str, tmp_path) -> None:
    lines = export(converted, tmp_path / "voice.pth", dtype=dtype, attn_masks=True)
    assert dtype in lines[0]
    written = torch.load(tmp_path / "voice.pth", weights_only=True)
    for key, value in voice.state_dict().items():
        assert torch.equal(written[key], value.to(TORCH_DTYPES[dtype]))
    assert written["gpt.h.0.attn.bias"].dtype == torch.uint8


def test_values_too_large_for_float16(voice, tmp_path) -> None:
    state = files.state_of(voice)
    state["mel_head.bias"][0] = 7e4
    convert({AR: files.save(tmp_path / "a.pth", state)}, tmp_path / "out", HEADS)
    with pytest.raises(UserError, match=r"mel_head.bias has values too large for float16"):
        export(tmp_path / "out", tmp_path / "voice.pth", dtype="float16")
    assert not (tmp_path / "voice.pth").exists()
    export(tmp_path / "out", tmp_path / "voice.pth", dtype="bfloat16")


def test_masks_are_those_of_older_transformers(voice, converted, tmp_path) -> None:
    export(converted, tmp_path / "voice.pth", attn_masks=True)
    want = files.with_masks(files.state_of(voice))
    got = torch.load(tmp_path / "voice.pth", weights_only=True)
    assert list(got) == list(want)
    for key, value in want.items():
        assert torch.equal(got[key], value), key
        assert got[key].dtype == value.dtype


@pytest.mark.parametrize("attn_masks", [None, True, False])
def test_source_carries_over_what_conversion_dropped(voice, converted, attn_masks: bool | None, tmp_path) -> None:
    state = files.with_masks(files.with_solo_embeddings(files.with_alignment_head(files.state_of(voice))))
    source = files.save(tmp_path / "original.pth", {"model": files.with_prefix(files.with_inference_model(state))})
    lines = export(converted, tmp_path / "voice.pth", source=source, attn_masks=attn_masks)
    got = torch.load(tmp_path / "voice.pth", weights_only=True)
    masks = (".attn.bias", ".attn.masked_bias") if attn_masks is False else ()
    want = {key: value for key, value in state.items() if not key.endswith(masks)}
    assert list(got) == list(want)
    assert all(torch.equal(got[key], value) for key, value in want.items())
    assert any("added 2 tensors: alignment heads" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "mel_head.bias"}, "mel_head.bias is missing there"),
        (lambda s: s | {"mel_head.bias": torch.zeros(3)}, r"mel_head.bias has shape \(3,\) there"),
        (lambda s: s | {"gpt.h.3.ln_1.bias": torch.zeros(64)}, "it has gpt.h.3.ln_1.bias, this one has not"),
    ],
)
def test_source_of_another_model(voice, converted, change: Any, says: str, tmp_path) -> None:
    source = files.save(tmp_path / "original.pth", change(files.state_of(voice)))
    with pytest.raises(UserError, match=says):
        export(converted, tmp_path / "voice.pth", source=source)
    assert not (tmp_path / "voice.pth").exists()


def test_a_write_that_goes_wrong_is_noticed(converted, tmp_path, monkeypatch) -> None:
    def failing_disk(path: Path) -> dict[str, np.ndarray]:
        state = dict(read_state_dict(path))
        state["mel_head.bias"] = state["mel_head.bias"] + 1
        return state

    export(converted, tmp_path / "voice.pth")
    earlier = (tmp_path / "voice.pth").read_bytes()
    monkeypatch.setattr("convert.torch_files.read_state_dict", failing_disk)
    with pytest.raises(UserError, match=r"mel_head.bias read back differs"):
        export(converted, tmp_path / "voice.pth")
    monkeypatch.setattr("convert.torch_files.read_state_dict", lambda path: {})
    with pytest.raises(UserError, match="the keys read back are not those written"):
        export(converted, tmp_path / "voice.pth")
    assert (tmp_path / "voice.pth").read_bytes() == earlier
    assert sorted(path.name for path in tmp_path.iterdir()) == ["voice.json", "voice.pth"]


def test_an_export_that_is_killed_is_made_anew(converted, tmp_path, monkeypatch) -> None:
    """It was killed between its two files; the next took the one that was there for another program's."""
    out = tmp_path / "voice.pth"
    rename = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if Path(target) == out:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            export(converted, out)
    assert (out.exists(), out.with_suffix(".json").exists()) == (False, True)
    export(converted, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["voice.json", "voice.pth"]


def test_nobody_elses_file_is_written_over(converted, tmp_path) -> None:
    (tmp_path / "autoregressive.pth").write_text("the original")
    (tmp_path / "tortoise.json").write_text("{}")
    for name, kept in (("autoregressive.pth", "autoregressive.pth"), ("tortoise.pth", "tortoise.json")):
        with pytest.raises(UserError, match=f"{kept} exists already and was not exported by tortoise_jax"):
            export(converted, tmp_path / name)
    assert (tmp_path / "autoregressive.pth").read_text() == "the original"
    assert (tmp_path / "tortoise.json").read_text() == "{}"
    export(converted, tmp_path / "voice.pth")
    export(converted, tmp_path / "voice.pth", dtype="float16")
    assert json.loads((tmp_path / "voice.json").read_text())["dtype"] == "float16"


def test_what_lies_beside_out_is_not_touched(converted, tmp_path) -> None:
    """The commands once wrote into X.partial and voice.pth.partial, whatever these held."""
    (tmp_path / "X.partial").mkdir()
    (tmp_path / "X.partial" / "film").write_text("somebody's")
    (tmp_path / "voice.pth.partial").write_text("somebody's")
    given = ["--ar", converted.parent / "autoregressive.pth", "--heads", HEADS, "--out", tmp_path / "X"]
    for script, arguments in (
        ("torch_to_flax", given),
        ("flax_to_torch", [converted, "--out", tmp_path / "voice.pth"]),
    ):
        command = [sys.executable, ROOT / "convert" / f"{script}.py", *arguments]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=280)
        if script == "flax_to_torch":
            assert done.returncode == 0, done.stderr
        else:
            assert done.returncode == 2
            assert "X.partial is needed to write" in done.stderr
            assert done.stderr.count("\n") == 1
    assert (tmp_path / "X.partial" / "film").read_text() == "somebody's"
    assert (tmp_path / "voice.pth.partial").read_text() == "somebody's"
    assert not (tmp_path / "X").exists()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".partial", ".partial", ".pth"]


# --- files of earlier versions ----------------------------------------------------------------------------------------

TOKENIZER_DIGEST = "db1206f16ebb87e997641251483a3d1550f7c8272c90910ae6d5af5cc78d5ea9"  # of the released tokenizer
MEL_NORMS_DIGEST = "c8d1452681391f3a4ea084d606b8f560f555fcb4f3ac9274839b75d12bd1af7e"  # of the released mel norms
VOICE_DIMENSIONS = {
    "layers": 3,
    "width": 64,
    "heads": 4,
    "text_tokens": 256,
    "mel_tokens": 66,
    "text_positions": 32,
    "mel_positions": 44,
    "conditioning_layers": 6,
    "mel_channels": 80,
    "stop_text": 0,
}
DVAE_DIMENSIONS = {
    "codebook_dim": 24,
    "codes": 64,
    "hidden": 16,
    "layers": 2,
    "res_blocks": 2,
    "channels": 80,
    "kernel": 3,
}
# tortoise.json as the first version wrote it: without checksums, digests of all parts and conditioning_inputs.
OLD_METADATA = {
    "format": 1,
    "ar": VOICE_DIMENSIONS,
    "dvae": DVAE_DIMENSIONS,
    "dvae_digest": "c2bde22515781f35e98f098434b6b40932ecb41c48cb4b561704f3d17aae1941",
    "tokenizer_digest": TOKENIZER_DIGEST,
    "mel_norms_digest": MEL_NORMS_DIGEST,
    "source": {"ar": {"file": "autoregressive.pth", "sha256": "0"}, "dvae": {"file": "dvae.pth", "sha256": "0"}},
}
# The .json of an export as the first version wrote it.
OLD_EXPORT = {
    "tortoise_jax": "0.1.0",
    "model": "ar",
    "dimensions": VOICE_DIMENSIONS,
    "heads": 4,
    "tokenizer_digest": TOKENIZER_DIGEST,
    "mel_norms_digest": MEL_NORMS_DIGEST,
    "source": OLD_METADATA["source"],
}


def test_a_checkpoint_of_the_first_version_is_exported(voice, dvae, converted, tmp_path) -> None:
    old = shutil.copytree(converted, tmp_path / "old")
    files.write_json(old / "tortoise.json", OLD_METADATA)
    assert load_pretrained(old).dvae.digest == OLD_METADATA["dvae_digest"]
    for part, model in ((AR, voice), (DVAE, dvae)):
        export(old, tmp_path / f"{part}.pth", part=part)
        assert_same(read_state_dict(tmp_path / f"{part}.pth"), model)
    assert files_arguments(tmp_path / "ar.pth")["max_conditioning_inputs"] == 2


def test_an_export_of_the_first_version_is_converted_again(voice, tmp_path) -> None:
    path = files.save(tmp_path / "voice.pth", files.state_of(voice))
    files.write_json(tmp_path / "voice.json", OLD_EXPORT)
    lines = convert({AR: path}, tmp_path / "out")
    assert any("4 heads (its .json)" in line for line in lines)
    source = load_pretrained(tmp_path / "out", ()).source["ar"]
    assert (source["file"], source["conditioning_inputs"]) == ("voice.pth", 2)
    export(tmp_path / "out", path)  # an export of ours may be written over
    assert_same(read_state_dict(path), voice)


# --- mistakes on the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ar", "none.pth"], "none.pth does not exist"),
        (["--ar", "."], "is a directory, expected a checkpoint file"),
        (["--heads", "0"], "argument --heads: invalid number (expected 1, 2, 3 …) value: '0' (see --help)"),
        (["--head", "4"], "unrecognized arguments: --head 4 (see --help)"),
        (["--out", "."], "--out . exists already"),
        ([], "which files? --dvae dvae.pth --ar autoregressive.pth; or put them into checkpoints/"),
    ],
)
def test_mistakes_when_converting(arguments: list[str], says: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, err = run(monkeypatch, capsys, torch_to_flax.main, *arguments)
    assert (code, said) == (2, "")
    assert err.startswith("error: ")
    assert says in err
    assert not list(tmp_path.iterdir())


def test_without_arguments_what_lies_in_checkpoints_is_taken(voice, dvae, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    files.save(Path("checkpoints/dvae.pth"), files.state_of(dvae))
    code, said, _ = run(monkeypatch, capsys, torch_to_flax.main)
    assert code == 0
    assert "checkpoints/autoregressive.pth does not exist: only checkpoints/dvae.pth is converted" in said
    assert "ar" not in load_pretrained("checkpoints/tortoise", ("dvae",)).parts
    files.save(Path("checkpoints/autoregressive.pth"), files.state_of(voice))
    assert "exists already" in run(monkeypatch, capsys, torch_to_flax.main)[2]
    assert run(monkeypatch, capsys, torch_to_flax.main, "--heads", 4, "--out", "checkpoints/both")[0] == 0
    load_pretrained("checkpoints/both", ("ar", "dvae"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{ckpt}", "--out", "voice.bin"], "--out voice.bin: expected a name ending in .pth"),
        (["{ckpt}", "--out", "folder.pth"], "folder.pth is a directory"),
        (["none", "--out", "voice.pth"], "none does not exist; expected a converted checkpoint"),
        (["{ckpt}", "--out", "voice.pth", "--step", "3"], "is a converted checkpoint, not a run"),
        (["{ckpt}", "--out", "v.pth", "--part", "dvae", "--attn_masks"], "a dVAE has no causal masks"),
        (["{ckpt}", "--out", "v.pth", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["{ckpt}"], "the following arguments are required: --out"),
        (["{ckpt}", "--out", "v.pth", "--source", "none.pth"], "none.pth does not exist"),
        (["{ckpt}", "--out", "source.pth", "--source", "source.pth"], "is the --source itself"),
    ],
)
def test_mistakes_when_exporting(converted, arguments, says: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.pth").mkdir()
    Path("source.pth").write_text("x")
    arguments = [argument.format(ckpt=converted) for argument in arguments]
    code, said, err = run(monkeypatch, capsys, flax_to_torch.main, *arguments)
    assert (code, said) == (2, "")
    assert says in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pth", "source.pth"]


def test_a_missing_package_for_safetensors_is_named(voice, tmp_path, monkeypatch) -> None:
    path = files.safetensors(tmp_path / "a.safetensors", files.state_of(voice))
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(UserError, match=r"pip install safetensors"):
        open_source(path, AR, HEADS)


def test_a_converted_checkpoint_given_as_a_file(converted, tmp_path) -> None:
    with pytest.raises(UserError, match=r"is a directory, converted already \(it holds tortoise.json\)"):
        convert({AR: converted}, tmp_path / "out")


def test_a_flipped_bit_in_a_converted_checkpoint(converted, tmp_path) -> None:
    shutil.copytree(converted, tmp_path / "tortoise")
    data = max((tmp_path / "tortoise" / "ar").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    files.flip(data, data.stat().st_size // 2)
    with pytest.raises(UserError, match=r"ar is damaged: its checksum is not what tortoise.json says"):
        export(tmp_path / "tortoise", tmp_path / "voice.pth")
    assert not (tmp_path / "voice.pth").exists()
    export(tmp_path / "tortoise", tmp_path / "dvae.pth", part="dvae")


def test_a_disk_without_room_is_noticed_before_writing(voice, tmp_path, monkeypatch) -> None:
    path = files.save(tmp_path / "a.pth", files.state_of(voice))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=r"out will take 1.21 MB, .* has 1 MB left; make room"):
        convert({AR: path}, tmp_path / "deep" / "out", HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2 * 10**6))
    convert({AR: path}, tmp_path / "deep" / "out", HEADS)


@pytest.mark.parametrize("command", ["torch_to_flax", "flax_to_torch"])
def test_a_full_disk_leaves_nothing(converted, command: str, tmp_path) -> None:
    """In a process that may write no file larger than 200 kB."""
    given = converted.parent / "autoregressive.pth"
    arguments = {
        "torch_to_flax": ["--ar", str(given), "--heads", str(HEADS), "--out", str(tmp_path / "out")],
        "flax_to_torch": [str(converted), "--out", str(tmp_path / "voice.pth")],
    }
    limited = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 10**5,) * 2); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = str(ROOT / "convert" / f"{command}.py")
    done = subprocess.run(
        [sys.executable, "-c", limited, script, *arguments[command]], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 2, done.stderr
    # tensorstore's threads may print tracebacks beside it, some without an end of line.
    assert [line for line in done.stderr.splitlines() if "error: " in line and "cannot be written" in line], done.stderr
    assert not list(tmp_path.iterdir())


def test_progress_bars_end_where_they_should(voice, tmp_path, monkeypatch) -> None:
    bars: list[Any] = []

    class Terminal(progress.tqdm):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(progress, "tqdm", Terminal)
    path = files.save(tmp_path / "a.pth", files.state_of(voice))
    convert({AR: path}, tmp_path / "out", HEADS)
    size = sum(value.numel() * 4 for value in voice.state_dict().values())
    assert [bar.desc.strip(": ") for bar in bars] == ["checking a.pth", "converting a.pth"]
    assert 0.9 * path.stat().st_size < bars[0].n <= bars[0].total == path.stat().st_size
    assert bars[1].n == bars[1].total == size


def test_a_folder_that_cannot_be_written(voice, tmp_path) -> None:
    path = files.save(tmp_path / "a.pth", files.state_of(voice))
    with pytest.raises(UserError, match=r"cannot be written: .*: Not a directory"):
        convert({AR: path}, path / "out", HEADS)
