"""The demo's trained pair, as it is in the repository: it says sentences that it never heard, and it stops."""

from __future__ import annotations

import csv
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.support import spoken
from tests.support.runs import ROOT
from tests.support.spoken import Renderings
from tests.support.torch_reference import DiscreteVAE, UnifiedVoice
from tortoise_jax.audio import read_audio
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained

DEMO = ROOT / "demo"
SENTENCES = (DEMO / "unseen" / "sentences.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    out = tmp_path_factory.mktemp("pair") / "tortoise"
    files = ["--dvae", str(DEMO / "dvae.pth"), "--ar", str(DEMO / "autoregressive.pth")]
    done = subprocess.run(
        [sys.executable, "convert/torch_to_flax.py", *files, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return load_pretrained(out)


def test_it_is_small_and_loads_strictly_into_torchs_models() -> None:
    files = {name: DEMO / f"{name}.pth" for name in ("dvae", "autoregressive")}
    assert sum(file.stat().st_size for file in files.values()) < 12_000_000
    dvae, ar = (torch.load(file, weights_only=True) for file in files.values())
    DiscreteVAE(hidden_dim=64, codebook_dim=64, num_tokens=256).load_state_dict(dvae, strict=True)
    UnifiedVoice(
        layers=8, model_dim=128, heads=2, max_text_tokens=60, max_mel_tokens=130, number_mel_codes=258,
        start_mel_token=256, stop_mel_token=257,
    ).load_state_dict(ar, strict=True)  # fmt: skip


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
    clips = [read_audio(DEMO / "unseen" / "emma" / f"{i:02d}.ogg") for i in range(1, 9)]
    drawn = spoken.draw(pair, clips, SENTENCES)
    found = spoken.figures(pair, drawn, renderings)
    assert found.stops >= 0.98, found
    assert found.silence < 0.3, found
    assert found.nearest >= 0.7, found  # of 40: 72 to 88 % by which clips it is conditioned on; the aim is 95 %
    assert found.ratio <= 1.25, found
    # Codes that are shuffled between the sentences say other ones: the figures can tell.
    others = np.roll(np.arange(len(SENTENCES)), 1)
    swapped = Renderings(
        SENTENCES, [renderings.waveforms[i] for i in others], [renderings.mels[i] for i in others], renderings.pitch
    )
    assert spoken.figures(pair, drawn, swapped).nearest < 0.1


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
    assert f"--clips {make_pair.CODEC_CLIPS}" in text
    assert f"--clips {make_pair.SPEECH_CLIPS}" in text
