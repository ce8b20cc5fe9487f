"""Outputs that are there whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_writable(path: Path, *, overwrite: bool, mark: str) -> None:
    """Refuse an output directory before any work is done for it.

    Parameters
    ----------
    path : Path
    overwrite : bool
        Allow what stands there to be replaced, if it is an earlier output.
    mark : str
        Name of a file that every output of this kind has, and that a home directory given by mistake has not.

    Raises
    ------
    ValueError
        When `path` is a file, has something in it that may not be replaced, or its parent cannot be written.
    """
    path = path.absolute()
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"output {path} exists and is not a directory: choose another")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"output {path} is not empty: choose another, or pass --overwrite to replace it")
    if path.is_dir() and any(path.iterdir()) and not (path / mark).is_file():
        raise ValueError(f"output {path} is not an earlier output (it has no {mark}): it will not be replaced")
    existing = next(p for p in path.parents if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output {path} cannot be created: {existing} is not a writable directory")


@contextmanager
def atomic_directory(path: str | Path, *, overwrite: bool = False, mark: str) -> Iterator[Path]:
    """A scratch directory beside `path` that takes its place when the block ends well, and vanishes when it does not.

    What stood at `path` stays until then; with `overwrite` it is replaced as a whole, with no file of it left over.
    Parameters and errors are those of `check_writable`.
    """
    path = Path(path).absolute()
    check_writable(path, overwrite=overwrite, mark=mark)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    scratch = path.with_name(f".{path.name}.partial-{mark}")
    scratch.mkdir()
    try:
        yield scratch
        old = path.with_name(f".{path.name}.old-{mark}")
        if path.exists():
            path.rename(old)
        scratch.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file through a temporary neighbour, so that readers see the old text or the new one."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, see `write_text`. NaN and infinity are refused: other readers do not know them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
