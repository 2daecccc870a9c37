"""The demo's trained pair, as it is in the repository: it says sentences that it never heard, and it stops."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert import flax_to_torch
from tests.support import spoken
from tests.support.parity import STACK, assert_close
from tests.support.runs import ROOT
from tests.support.spoken import Renderings
from tests.support.torch_reference import DiscreteVAE, UnifiedVoice
from tortoise_jax.audio import crop_conditioning, log_mel, read_audio
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained
from tortoise_jax.models import dvae
from tortoise_jax.models.compiled import apply
from tortoise_jax.synthesis import sampler, voices

DEMO = ROOT / "demo"
FILES = {"dvae": DEMO / "dvae.pth", "ar": DEMO / "autoregressive.pth"}
SENTENCES = (DEMO / "unseen" / "sentences.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    out = tmp_path_factory.mktemp("pair") / "tortoise"
    files = [word for part, file in FILES.items() for word in (f"--{part}", str(file))]
    command("convert/torch_to_flax.py", *files, "--out", str(out))
    return load_pretrained(out)


def command(*words: str) -> str:
    """Runs one of the README's commands and returns what it says."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def torch_dvae() -> DiscreteVAE:
    return loaded(DiscreteVAE(hidden_dim=64, codebook_dim=64, num_tokens=256), FILES["dvae"])


@pytest.fixture(scope="module")
def torch_ar() -> UnifiedVoice:
    model = UnifiedVoice(
        layers=8, model_dim=128, heads=2, max_text_tokens=60, max_mel_tokens=130, number_mel_codes=258,
        start_mel_token=256, stop_mel_token=257,
    )  # fmt: skip
    return loaded(model, FILES["ar"])


def loaded(model: Any, file: Path) -> Any:
    """torch's model with the file's weights, in float32."""
    model.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return model.eval().requires_grad_(False)


def clip(speaker: str, number: int) -> np.ndarray:
    return read_audio(DEMO / "unseen" / speaker / f"{number:02d}.ogg")


# --- trained weights say more than random ones: real speech, sharp logits, rows that stop -----------------------------


def test_it_is_small_and_loads_strictly_into_torchs_models(torch_dvae: DiscreteVAE, torch_ar: UnifiedVoice) -> None:
    assert sum(file.stat().st_size for file in FILES.values()) < 12_000_000


def test_codes_of_speech_are_torchs(pair: Pretrained, torch_dvae: DiscreteVAE) -> None:
    """Equal wherever the choice is no coin toss."""
    samples = 24 * 1024 - 256
    speech = np.concatenate([clip(speaker, i) for speaker in ("emma", "grace") for i in range(1, 15)])
    waveforms = speech[: 16 * samples].reshape(16, samples)
    mels = np.asarray(log_mel(waveforms, pair.mel_norms))
    got = np.asarray(apply(dvae.DiscreteVAE(pair.dvae.config), "encode", pair.dvae.variables, mels))
    features, want = torch_dvae.encode(torch.from_numpy(mels.swapaxes(1, 2).copy()))
    distances = (features.double()[..., None] - torch_dvae.codebook.embed.double()).pow(2).sum(2)
    best, second = distances.topk(2, largest=False).values.unbind(-1)
    clear = ((second - best) / best > 1e-4).numpy()
    np.testing.assert_array_equal(got[clear], want.numpy()[clear])
    assert clear.mean() > 0.99
    assert got.shape == (16, 24)
    assert len(np.unique(got)) > 64, "of 256"


def test_greedy_codes_are_torchs_and_end_where_torchs_end(pair: Pretrained, torch_ar: UnifiedVoice) -> None:
    """The voice's vector, and every code up to the stop, by the cached decoder."""
    mels = [np.asarray(log_mel(crop_conditioning(clip("emma", i)), pair.mel_norms)) for i in (1, 2)]
    want_vector = torch.stack(
        [torch_ar.conditioning_latent(torch.from_numpy(mel.T[None, None].copy()))[0] for mel in mels]
    )
    config = pair.ar.config
    vector = voices.condition(
        pair.ar.params, config, pair.mel_norms, [crop_conditioning(clip("emma", i)) for i in (1, 2)]
    )
    assert_close(vector, want_vector.mean(dim=0), STACK)
    texts = [pair.tokenizer.encode(sentence) for sentence in SENTENCES[:4]]
    options = sampler.SamplingOptions(
        temperature=0, repetition_penalty=1.0, max_codes=100, extra_text_stop=False, dtype="float32"
    )
    got = sampler.sample(pair.ar.params, config, np.stack([vector] * 4), texts, options=options)
    assert got.stopped.all()
    for i, text in enumerate(texts):
        want = torch_ar.generate(torch.from_numpy(vector), torch.tensor(text), 100, 1.0).numpy()
        assert want[-1] == config.stop_mel
        np.testing.assert_array_equal(got.row(i), want[:-1])


def test_its_export_is_the_file(pair: Pretrained, tmp_path: Path) -> None:
    """Name by name in order, bit for bit, through float32 and back to the float16 it is kept in."""
    for part, file in FILES.items():
        flax_to_torch.export(pair.path, tmp_path / file.name, part, dtype="float16")
        ours, theirs = (torch.load(one, weights_only=True) for one in (tmp_path / file.name, file))
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert ours[name].numpy().tobytes() == tensor.numpy().tobytes(), name


# --- what it says -----------------------------------------------------------------------------------------------------


def test_no_clip_says_an_unseen_sentence() -> None:
    with (DEMO / "voice" / "metadata.csv").open(encoding="utf-8", newline="") as file:
        said = [row["text"] for row in csv.DictReader(file)]
    assert len(said) == len(list((DEMO / "voice" / "wavs").iterdir())) == 100
    assert len(set(SENTENCES)) == len(SENTENCES) == 40
    assert not set(SENTENCES) & set(said)
    words = {word for sentence in SENTENCES for word in sentence.split()}
    assert words <= {word for sentence in said for word in sentence.split()}


def test_it_says_sentences_it_never_heard_and_stops(pair: Pretrained) -> None:
    """By emma, one of the voices it was trained on."""
    renderings = Renderings.read(DEMO / "unseen" / "emma", SENTENCES, pair.mel_norms)
    clips = [clip("emma", i) for i in range(1, 9)]
    drawn = spoken.draw(pair, clips, SENTENCES)
    found = spoken.figures(pair, drawn, renderings)
    assert found.stops >= 0.98, found
    assert found.silence < 0.3, found
    assert found.nearest >= 0.95, found  # of 40
    assert found.ratio <= 1.1, found
    # Codes that are shuffled between the sentences say other ones: the figures can tell.
    others = np.roll(np.arange(len(SENTENCES)), 1)
    swapped = Renderings(
        SENTENCES, [renderings.waveforms[i] for i in others], [renderings.mels[i] for i in others], renderings.pitch
    )
    assert spoken.figures(pair, drawn, swapped).nearest < 0.1


@pytest.mark.slow
def test_judges_hear_the_new_voice_being_learnt(pair: Pretrained, tmp_path: Path) -> None:
    """Programs that know nothing of this project (the extra `evaluate`), on what `make demo` trains."""
    data, run = tmp_path / "data", tmp_path / "run"
    metadata, checkpoint = str(DEMO / "voice" / "metadata.csv"), str(pair.path)
    command("-m", "tortoise_jax.prepare", "--data", metadata, "--checkpoint", checkpoint, "--out", str(data))
    fields = (f"--config.checkpoint={checkpoint}", f"--config.data={data}", "--config.export=", f"--workdir={run}")
    command("train.py", "--config", "configs/ar_demo.py", *fields)
    sampling = ("--temperature", "0.5", "--repetition_penalty", "1")
    texts = ("--text", str(DEMO / "unseen" / "sentences.txt"), "--others", str(DEMO / "unseen" / "emma"))
    said = command("-m", "tortoise_jax.evaluate", "--run", str(run), *texts, *sampling)
    result = json.loads((run / "evaluation.json").read_text())
    assert not [note for note in result["notes"] if "left out" in note], said
    rows = {row["name"]: row for row in result["rows"]}
    true, codes, others = rows["recordings"], rows["their codes"], rows["other speakers"]
    before, after = rows["step 0"], rows["step 120"]
    assert true["words"] < 0.3, said
    assert true["words"] < codes["words"] < after["words"] < 1, said
    assert true["likeness"] > others["likeness"] + 0.1, said
    assert after["stops"] == 1, said
    assert abs(after["pitch"] - true["pitch"]) < abs(before["pitch"] - true["pitch"]), said
    assert "sounds best" in said


def test_the_demos_readme_shows_the_maker_commands() -> None:
    """Every field of the recipes stands in demo/README.md as make_pair.py has it."""
    sys.path.insert(0, str(DEMO))
    try:
        import make_pair
    finally:
        sys.path.pop(0)
    text = re.sub(r"\s+", " ", (DEMO / "README.md").read_text(encoding="utf-8").replace("\\\n", " "))
    for field in make_pair.fields(make_pair.CODEC) + make_pair.fields(make_pair.SPEECH):
        assert field.replace("'", "") in text.replace("'", ""), field
    for clips in (make_pair.CODEC_CLIPS, make_pair.CLIPS):
        assert f"--clips {clips} " in text
