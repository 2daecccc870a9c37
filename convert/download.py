"""Fetches the published checkpoints from the Hugging Face hub, which needs a network and the extra `download`."""

from __future__ import annotations

import hashlib
import urllib.parse
from pathlib import Path

from convert.tables import MODELS, Location
from tortoise_jax.errors import UserError, first_line

LOCATIONS: dict[str, tuple[Location, ...]] = {model.file: model.locations for model in MODELS.values()}
SIZES = {model.file: model.size for model in MODELS.values()}
CHECKSUMS = {model.file: model.sha256 for model in MODELS.values() if model.sha256}


def fetch(names: list[str], folder: Path, hub: str | None = None) -> list[str]:
    """Puts the named files into `folder`, unless they exist there already. Returns one line per file.

    hub: another address than huggingface.co. Says the sizes of what is missing before it begins. Raises UserError if no
    location gives the file or its checksum is wrong.
    """
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        total = sum(SIZES[name] for name in missing)
        print(f"fetching {total / 1e9:.2f} GB: " + ", ".join(f"{name} {SIZES[name] / 1e6:,.0f} MB" for name in missing))
    lines = []
    for name in names:
        target = folder / name
        if name not in missing:
            lines.append(f"{target} exists already and is kept")
            continue
        location = fetch_one(name, target, hub)
        verified = ", its sha256 the published one" if name in CHECKSUMS else ""
        lines.append(f"{target} fetched from {location.repository}{verified}")
    return lines


def fetch_one(name: str, target: Path, hub: str | None) -> Location:
    """The first location that gives the file, whole and with the right checksum. Raises UserError."""
    failures = []
    try:
        check_reachable(LOCATIONS[name][0], hub)
        for location in LOCATIONS[name]:
            try:
                downloaded = download(location, target.parent, hub)
                check(downloaded, name, location)
                downloaded.replace(target)
                return location
            except UserError as error:
                failures.append(f"{location.repository}: {error}")
    except UserError as error:
        failures.append(str(error))
    raise UserError(
        f"{name} could not be fetched ({'; '.join(failures)}). With a browser it is at {LOCATIONS[name][0].url()}; "
        f"put it at {target}"
    )


def check_reachable(location: Location, hub: str | None) -> None:
    """Raises UserError if the hub does not answer one request. Its library would retry each download for 23 seconds."""
    try:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UserError("huggingface_hub is not installed: pip install 'tortoise_jax[download]'") from None
    url = hf_hub_url(location.repository, location.path, revision=location.revision, endpoint=hub)
    try:
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, endpoint=hub)
    except HfHubHTTPError:
        return  # it answered, if only that it has no such file
    except Exception as error:  # of HTTP, of names, of certificates, of proxies: each library has its own
        host = urllib.parse.urlsplit(url).hostname
        raise UserError(f"{host} cannot be reached, is there a network? ({first_line(error)})") from None


def download(location: Location, folder: Path, hub: str | None) -> Path:
    """Downloads into `.download` beside the target, where the next call continues an interrupted download."""
    from huggingface_hub import hf_hub_download

    beside = folder / ".download"
    try:
        return Path(
            hf_hub_download(
                location.repository, location.path, revision=location.revision, local_dir=beside, endpoint=hub
            )
        )
    except Exception as error:  # of the hub, of HTTP, of the disk: each library has its own
        raise UserError(first_line(error)) from None


def check(path: Path, name: str, location: Location) -> None:
    """Raises UserError for a file whose sha256 is not the published one, and removes it."""
    if name not in CHECKSUMS:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != CHECKSUMS[name]:
        path.unlink()
        raise UserError(
            f"what {location.url()} gave has sha256 {found}, published is {CHECKSUMS[name]}; it was removed"
        )
