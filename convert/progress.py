"""Progress bars over bytes, shown on a terminal only."""

from __future__ import annotations

from tqdm import tqdm


def byte_bar(what: str, total: int) -> tqdm:
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False, disable=None)
