"""Fetches the published checkpoints from the Hugging Face hub, which needs a network and the extra `download`."""

from __future__ import annotations

import dataclasses
import hashlib
import socket
import urllib.parse
import urllib.request
from pathlib import Path

from tortoise_jax.errors import UserError, first_line

DVAE_SHA256 = "a990825371506c16bcf0e8167bf24ccf82f65bb6a1dbcbfcf058d76f9b197e35"
HUB = "https://huggingface.co"
CONNECT_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class Place:
    """A file of a repository on the hub."""

    repository: str
    path: str
    revision: str = "main"

    def url(self, hub: str = HUB) -> str:
        return f"{hub}/{self.repository}/resolve/{self.revision}/{self.path}"


# The first place that answers is taken.
PLACES: dict[str, tuple[Place, ...]] = {
    "autoregressive.pth": (
        Place("Manmay/tortoise-tts", "autoregressive.pth"),
        Place("jbetker/tortoise-tts-v2", ".models/autoregressive.pth"),
    ),
    "dvae.pth": (
        Place("Gatozu35/tortoise-tts", "dvae.pth"),
        Place("jbetker/tortoise-tts-v2", ".models/dvae.pth", "3704aea61678e7e468a06d8eea121dba368a798e"),
    ),
}
CHECKSUMS = {"dvae.pth": DVAE_SHA256}


def fetch(names: list[str], folder: Path, hub: str | None = None) -> list[str]:
    """Puts the named files into `folder`; one that is there is kept. Returns a line a file.

    hub: another address than huggingface.co. Raises UserError where no place answers or a checksum is wrong.
    """
    lines = []
    for name in names:
        target = folder / name
        if target.exists():
            lines.append(f"{target} is there already and kept")
            continue
        place = fetch_one(name, target, hub)
        verified = ", its sha256 the published one" if name in CHECKSUMS else ""
        lines.append(f"{target} fetched from {place.repository}{verified}")
    return lines


def fetch_one(name: str, target: Path, hub: str | None) -> Place:
    """The first place that gives the file, whole and with the right checksum."""
    failures = []
    try:
        check_reachable(hub)
        for place in PLACES[name]:
            try:
                downloaded = download(place, target.parent, hub)
                check(downloaded, name, place)
                downloaded.replace(target)
                return place
            except UserError as error:
                failures.append(f"{place.repository}: {error}")
    except UserError as error:
        failures.append(str(error))
    raise UserError(
        f"{name} could not be fetched ({'; '.join(failures)}). With a browser it is at {PLACES[name][0].url()}; "
        f"put it at {target}"
    )


def check_reachable(hub: str | None) -> None:
    """Raises UserError at once where there is no network; the hub's library would try again for a minute."""
    try:
        import huggingface_hub.constants
    except ImportError:
        raise UserError("huggingface_hub is not installed: pip install 'tortoise_jax[download]'") from None
    address = urllib.parse.urlsplit(hub or huggingface_hub.constants.ENDPOINT)
    if urllib.request.getproxies():
        return  # a proxy answers for itself
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"{address.hostname} cannot be reached, is there a network? ({error.strerror or error})"
        ) from None


def download(place: Place, folder: Path, hub: str | None) -> Path:
    """Downloads into a folder of its own beside the target, where an interrupted download goes on the next time."""
    from huggingface_hub import hf_hub_download

    beside = folder / ".download"
    try:
        return Path(
            hf_hub_download(place.repository, place.path, revision=place.revision, local_dir=beside, endpoint=hub)
        )
    except Exception as error:  # of the hub, of HTTP, of the disk: each library has its own
        raise UserError(first_line(error)) from None


def check(path: Path, name: str, place: Place) -> None:
    """Removes a file whose sha256 is not the published one; UserError."""
    if name not in CHECKSUMS:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != CHECKSUMS[name]:
        path.unlink()
        raise UserError(f"what {place.url()} gave has sha256 {found}, published is {CHECKSUMS[name]}; it was removed")
