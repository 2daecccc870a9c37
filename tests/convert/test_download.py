"""`--download` against a local server that answers as the Hugging Face hub does, through the real huggingface_hub."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from convert import download, torch_to_flax
from convert.download import LOCATIONS, fetch
from convert.tables import MODELS, Location
from tests.support import checkpoint_files as files
from tests.support.conversion import run
from tests.support.hub import Hub, running
from tests.support.torch_reference import (
    tiny_clvp,
    tiny_diffusion,
    tiny_dvae,
    tiny_hifigan,
    tiny_random_voice,
    tiny_unified_voice,
    tiny_vocoder,
)
from tortoise_jax.checkpoints.parts import DVAE
from tortoise_jax.errors import UserError


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as server:
        yield server


def path_of(location: Location) -> str:
    return location.url("")


def test_published_locations() -> None:
    assert [location.url() for location in LOCATIONS["dvae.pth"]] == [
        "https://huggingface.co/Gatozu35/tortoise-tts/resolve/main/dvae.pth",
        "https://huggingface.co/jbetker/tortoise-tts-v2/resolve/3704aea61678e7e468a06d8eea121dba368a798e/.models/dvae.pth",
    ]
    assert [location.url() for location in LOCATIONS["autoregressive.pth"]] == [
        "https://huggingface.co/Manmay/tortoise-tts/resolve/main/autoregressive.pth",
        "https://huggingface.co/jbetker/tortoise-tts-v2/resolve/main/.models/autoregressive.pth",
    ]


def test_first_location_that_answers_is_taken(hub, tmp_path) -> None:
    first, second = LOCATIONS["autoregressive.pth"]
    hub.files[path_of(second)] = b"second"
    lines = fetch(["autoregressive.pth"], tmp_path / "a", hub.address)
    assert (tmp_path / "a" / "autoregressive.pth").read_bytes() == b"second"
    assert lines == [f"{tmp_path / 'a' / 'autoregressive.pth'} fetched from jbetker/tortoise-tts-v2"]
    hub.files[path_of(first)] = b"first"
    fetch(["autoregressive.pth"], tmp_path / "b", hub.address)
    assert (tmp_path / "b" / "autoregressive.pth").read_bytes() == b"first"


def test_an_existing_file_is_kept(hub, tmp_path) -> None:
    (tmp_path / "dvae.pth").write_bytes(b"mine")
    assert fetch(["dvae.pth"], tmp_path, hub.address) == [f"{tmp_path / 'dvae.pth'} exists already and is kept"]
    assert not hub.asked
    assert (tmp_path / "dvae.pth").read_bytes() == b"mine"


def test_checksum_of_the_dvae(hub, tmp_path, monkeypatch) -> None:
    for location in LOCATIONS["dvae.pth"]:
        hub.files[path_of(location)] = b"something else"
    with pytest.raises(UserError) as caught:
        fetch(["dvae.pth"], tmp_path, hub.address)
    found = hashlib.sha256(b"something else").hexdigest()
    assert str(caught.value).count(f"has sha256 {found}, published is {MODELS[DVAE].sha256}; it was removed") == 2
    assert not (tmp_path / "dvae.pth").exists()
    monkeypatch.setitem(download.CHECKSUMS, "dvae.pth", found)
    assert "its sha256 the published one" in fetch(["dvae.pth"], tmp_path, hub.address)[0]


@pytest.fixture
def fresh_session(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The hub's library reads the environment when its session begins: no proxy but the test's own."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    huggingface_hub.close_session()
    yield monkeypatch
    huggingface_hub.close_session()


def test_no_network(tmp_path, fresh_session) -> None:
    """One line within seconds; the hub's library by itself would try each location for 23 seconds."""
    started = time.perf_counter()
    with pytest.raises(UserError) as caught:
        fetch(["dvae.pth"], tmp_path, "http://127.0.0.1:9")
    assert time.perf_counter() - started < 5
    said = str(caught.value)
    assert "dvae.pth could not be fetched (127.0.0.1 cannot be reached, is there a network? (" in said
    assert "Connection refused)" in said
    assert (
        "With a browser it is at https://huggingface.co/Gatozu35/tortoise-tts/resolve/main/dvae.pth; put it at" in said
    )
    assert len(said.splitlines()) == 1


def test_a_proxy_is_asked_in_place_of_the_hub(hub, tmp_path, fresh_session) -> None:
    location = LOCATIONS["autoregressive.pth"][0]
    far = "http://hub.invalid"
    hub.files[location.url(far)] = b"through the proxy"
    fresh_session.setenv("HTTP_PROXY", hub.address)
    fetch(["autoregressive.pth"], tmp_path, far)
    assert (tmp_path / "autoregressive.pth").read_bytes() == b"through the proxy"


def test_a_missing_package_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"huggingface_hub is not installed: pip install 'tortoise_jax\[download\]'"):
        fetch(["dvae.pth"], tmp_path)


def test_download_and_convert_in_one_command(hub, tmp_path, monkeypatch, capsys) -> None:
    made = {
        "autoregressive.pth": tiny_unified_voice(),
        "dvae.pth": tiny_dvae(),
        "clvp2.pth": tiny_clvp(),
        "diffusion_decoder.pth": tiny_diffusion(),
        "vocoder.pth": tiny_vocoder(),
        "hifidecoder.pth": tiny_hifigan(),
        "rlg_auto.pth": tiny_random_voice(),
        "rlg_diffuser.pth": tiny_random_voice(),
    }
    for name, model in made.items():
        path = files.save(tmp_path / name, files.state_of(model))
        hub.files[path_of(LOCATIONS[name][0])] = path.read_bytes()
        path.unlink()
    digest = hashlib.sha256(hub.files[path_of(LOCATIONS["dvae.pth"][0])]).hexdigest()
    monkeypatch.setitem(download.CHECKSUMS, "dvae.pth", digest)
    real = download.fetch
    monkeypatch.setattr(download, "fetch", lambda names, folder: real(names, folder, hub.address))
    monkeypatch.chdir(tmp_path)
    code, said, err = run(monkeypatch, capsys, torch_to_flax.main, "--download", "--heads", 4)
    assert (code, err) == (0, "")
    assert said.startswith("fetching 4.33 GB: dvae.pth 240 MB, autoregressive.pth 1,690 MB, clvp2.pth 975 MB, ")
    assert "checkpoints/dvae.pth fetched from Gatozu35/tortoise-tts, its sha256 the published one" in said
    assert "checkpoints/autoregressive.pth fetched from Manmay/tortoise-tts" in said
    assert "written to checkpoints/tortoise" in said
    assert Path("checkpoints/tortoise/tortoise.json").exists()
    # A file that is named is not fetched.
    hub.asked.clear()
    Path("checkpoints/autoregressive.pth").rename("mine.pth")
    arguments = ("--download", "--ar", "mine.pth", "--heads", 4, "--out", "again")
    assert run(monkeypatch, capsys, torch_to_flax.main, *arguments)[0] == 0
    assert not hub.asked
    # A file that is named must exist, even where another one would do.
    arguments = ("--download", "--ar", "none.pth", "--out", "third")
    code, said, err = run(monkeypatch, capsys, torch_to_flax.main, *arguments)
    assert (code, err) == (2, "error: none.pth does not exist\n")
