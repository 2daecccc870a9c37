"""`--download` against a local server that answers as the Hugging Face hub does, through the real huggingface_hub."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from convert import download, torch_to_flax
from convert.download import PLACES, Place, fetch
from tests.convert.test_convert import run
from tests.support import checkpoint_files as files
from tests.support.torch_reference import tiny_dvae, tiny_unified_voice
from tortoise_jax.errors import UserError

COMMIT = "0123456789012345678901234567890123456789"


class Hub(http.server.ThreadingHTTPServer):
    """Serves `files` (path of a Place -> content) under the addresses of the hub; what is not there is 404."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Silence."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def path_of(place: Place) -> str:
    return place.url("")


def test_published_places() -> None:
    assert [place.url() for place in PLACES["dvae.pth"]] == [
        "https://huggingface.co/Gatozu35/tortoise-tts/resolve/main/dvae.pth",
        "https://huggingface.co/jbetker/tortoise-tts-v2/resolve/3704aea61678e7e468a06d8eea121dba368a798e/.models/dvae.pth",
    ]
    assert [place.url() for place in PLACES["autoregressive.pth"]] == [
        "https://huggingface.co/Manmay/tortoise-tts/resolve/main/autoregressive.pth",
        "https://huggingface.co/jbetker/tortoise-tts-v2/resolve/main/.models/autoregressive.pth",
    ]


def test_first_place_that_answers_is_taken(hub, tmp_path) -> None:
    first, second = PLACES["autoregressive.pth"]
    hub.files[path_of(second)] = b"second"
    lines = fetch(["autoregressive.pth"], tmp_path / "a", hub.address)
    assert (tmp_path / "a" / "autoregressive.pth").read_bytes() == b"second"
    assert lines == [f"{tmp_path / 'a' / 'autoregressive.pth'} fetched from jbetker/tortoise-tts-v2"]
    hub.files[path_of(first)] = b"first"
    fetch(["autoregressive.pth"], tmp_path / "b", hub.address)
    assert (tmp_path / "b" / "autoregressive.pth").read_bytes() == b"first"


def test_a_file_that_is_there_is_kept(hub, tmp_path) -> None:
    (tmp_path / "dvae.pth").write_bytes(b"mine")
    assert fetch(["dvae.pth"], tmp_path, hub.address) == [f"{tmp_path / 'dvae.pth'} is there already and kept"]
    assert not hub.asked
    assert (tmp_path / "dvae.pth").read_bytes() == b"mine"


def test_checksum_of_the_dvae(hub, tmp_path, monkeypatch) -> None:
    for place in PLACES["dvae.pth"]:
        hub.files[path_of(place)] = b"something else"
    with pytest.raises(UserError) as caught:
        fetch(["dvae.pth"], tmp_path, hub.address)
    found = hashlib.sha256(b"something else").hexdigest()
    assert str(caught.value).count(f"has sha256 {found}, published is {download.DVAE_SHA256}; it was removed") == 2
    assert not (tmp_path / "dvae.pth").exists()
    monkeypatch.setitem(download.CHECKSUMS, "dvae.pth", found)
    assert "its sha256 the published one" in fetch(["dvae.pth"], tmp_path, hub.address)[0]


def test_no_network(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(UserError) as caught:
        fetch(["dvae.pth"], tmp_path, "http://127.0.0.1:9")
    said = str(caught.value)
    assert (
        "dvae.pth could not be fetched (127.0.0.1 cannot be reached, is there a network? (Connection refused))" in said
    )
    assert (
        "With a browser it is at https://huggingface.co/Gatozu35/tortoise-tts/resolve/main/dvae.pth; put it at" in said
    )
    assert len(said.splitlines()) == 1
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://127.0.0.1:9"})
    download.check_reachable(None)  # left to the proxy


def test_a_missing_package_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"huggingface_hub is not installed: pip install 'tortoise_jax\[download\]'"):
        fetch(["dvae.pth"], tmp_path)


def test_download_and_convert_in_one_command(hub, tmp_path, monkeypatch, capsys) -> None:
    made = {"autoregressive.pth": tiny_unified_voice(), "dvae.pth": tiny_dvae()}
    for name, model in made.items():
        path = files.save(tmp_path / name, files.state_of(model))
        hub.files[path_of(PLACES[name][0])] = path.read_bytes()
        path.unlink()
    digest = hashlib.sha256(hub.files[path_of(PLACES["dvae.pth"][0])]).hexdigest()
    monkeypatch.setitem(download.CHECKSUMS, "dvae.pth", digest)
    real = download.fetch
    monkeypatch.setattr(download, "fetch", lambda names, folder: real(names, folder, hub.address))
    monkeypatch.chdir(tmp_path)
    code, said, err = run(monkeypatch, capsys, torch_to_flax.main, "--download", "--heads", 4)
    assert (code, err) == (0, "")
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
