"""``topwork cache``: shows and clears the cache. Everything in it can be recomputed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from topwork.errors import TopworkError
from topwork.files import error_reason
from topwork.settings import cache_setting

CACHED = {  # what topwork writes there; other files are left alone: TOPWORK_CACHE may be a folder with other contents
    "archives": "decompressed archives",
    "backbones": "backbones",
    "demo": "demo images",
    "drawn-shapes": "drawn shapes",
    "facts": "image checks",
    "features": "features",
    "neighbors": "near duplicates",
    "onnx": "converted networks",
    "traits": "image statistics",
}


def cache_contents() -> dict[str, Any]:
    """The cache folder and the bytes of each part that topwork keeps there, by name."""
    folder = cache_setting()
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    parts = [part for part in found if part.is_dir() and re.sub(r"-\d+$", "", part.name) in CACHED]
    return {"folder": str(folder), "bytes": {part.name: _bytes_below(part) for part in parts}}


def clear_cache() -> dict[str, Any]:
    """Deletes what topwork keeps in the cache.

    Returns:
        The result of :func:`cache_contents` afterwards, and ``freed`` bytes.

    Raises:
        TopworkError: something could not be deleted.
    """
    before = cache_contents()
    for name in before["bytes"]:
        path = cache_setting() / name
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise TopworkError(f"{error.filename or path}: {error_reason(error)}.") from None
    return {**cache_contents(), "freed": sum(before["bytes"].values())}


def _bytes_below(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
