"""Saving a checkpoint so that it is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

_SHARD = re.compile(r"model(\.[^.]+?)?(?:-\d{5}-of-\d{5})?\.safetensors")
_INDEX = re.compile(r"model\.safetensors\.index(\.[^.]+)?\.json")


@contextlib.contextmanager
def whole_or_nothing(directory: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty directory beside `directory`; its files take their places there only if the block succeeds.

    If the block fails, for want of space or of permission, the staging directory is removed and `directory` is as it
    was. Otherwise files of the same name are replaced, and weights of an earlier save that the new one does not have
    (other shards, another index) are removed: they would be loaded in its stead.

    Raises
    ------
    OSError
        When something cannot be written; the message says where, and that nothing was changed.
    """
    target = Path(os.path.abspath(directory))
    if target.is_file():
        raise FileExistsError(f"cannot save to {target}: it is a file, not a directory")
    staging = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        staging.mkdir(parents=True)
        yield staging
        _move(staging, target)
    except OSError as error:
        reason = f"cannot save to {target}: {error.strerror or error}; nothing was written there"
        raise (OSError(error.errno, reason) if error.errno else OSError(reason)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _variant(name: str) -> str | None:
    """Which set of weights a file belongs to ("" for the usual one); `None` if it holds none."""
    match = _SHARD.fullmatch(name) or _INDEX.fullmatch(name)
    return (match[1] or "") if match else None


def _move(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    new = {path.name: path for path in staging.iterdir()}
    # The configuration goes last: until then what lies there is described by the old one.
    for name in sorted(new, key=lambda n: (n == "config.json", n)):
        place = target / name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(new[name], place)
    saved = {_variant(name) for name in new} - {None}
    for path in target.iterdir():
        if _variant(path.name) in saved and path.name not in new:
            path.unlink()
