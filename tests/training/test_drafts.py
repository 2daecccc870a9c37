"""What a run lets you hear: drafts by the configured preset, with the parts of the checkpoint it begins with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
from ml_collections import ConfigDict

from configs import ar
from tests.support import runs
from tests.support.parity import twin_of
from tests.support.torch_reference import tiny_hifigan
from tortoise_jax.checkpoints import parts
from tortoise_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.errors import UserError
from tortoise_jax.training import ar_run
from tortoise_jax.training.drafts import make_drafter


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint/`, the same with the fast path's decoder in `whole/`, and `data/`."""
    project = runs.write_project(tmp_path_factory.mktemp("drafts"))
    decoder = twin_of(parts.HIFIGAN, tiny_hifigan(in_channels=runs.AR.width, cond_channels=runs.AR.width)).part
    save_pretrained(load_pretrained(project / "checkpoint").with_part(parts.HIFIGAN, decoder), project / "whole")
    return project


def settings_of(project: Path, checkpoint: str, preset: str) -> ConfigDict:
    settings = ar.get_config()
    settings.update(checkpoint=str(project / checkpoint), sample_every=1, prompts=("Yes.",), sample_preset=preset)
    return settings


def drafts_of(settings: ConfigDict, project: Path, folder: Path) -> list[dict[str, Any]]:
    """What a run of these settings would note of its drafts at step 3."""
    pretrained = ar_run.load(settings, weights=True)
    noted: list[dict[str, Any]] = []
    history = SimpleNamespace(has=lambda *_: False, add=lambda kind, step, entry: noted.append(entry))
    writer = SimpleNamespace(audio=lambda *_: None, scalars=lambda *_: None, say=lambda *_: None)
    drafter = make_drafter(settings, pretrained, Dataset.open(project / "data"))
    assert drafter is not None
    drafter(3, pretrained.ar.params, SimpleNamespace(folder=folder, history=history, writer=writer))  # type: ignore[arg-type]
    return noted


@pytest.mark.parametrize(("preset", "rate"), [("draft", 22050), ("hifigan", 24000)])
def test_drafts_sound_as_the_preset_makes_them(project: Path, tmp_path: Path, preset: str, rate: int) -> None:
    noted = drafts_of(settings_of(project, "whole", preset), project, tmp_path)
    assert [entry["prompt"] for entry in noted] == ["Yes."]
    info = soundfile.info(tmp_path / noted[0]["file"])
    assert info.samplerate == rate
    assert info.frames > 0


def test_parts_come_from_where_the_checkpoint_began(project: Path, tmp_path: Path) -> None:
    """A run that is begun from a run."""
    save_pretrained(load_pretrained(project / "checkpoint"), tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"checkpoint": "%s"}' % (project / "whole"))
    settings = settings_of(project, "whole", "hifigan")
    settings.checkpoint = str(tmp_path / "run")
    [entry] = drafts_of(settings, project, tmp_path)
    assert soundfile.info(tmp_path / entry["file"]).samplerate == 24000


def test_a_preset_without_its_parts_ends_before_the_first_step(project: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint: without decoder of the fast path; convert all files"):
        drafts_of(settings_of(project, "checkpoint", "hifigan"), project, tmp_path)
