"""Outputs are there whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from srf_retrofit import files


def test_directory_appears_when_done(tmp_path) -> None:
    target = tmp_path / "a" / "out"
    with files.atomic_directory(target, mark="old") as scratch:
        (scratch / "x").write_text("1")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["x"]
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_failure_leaves_what_was_there(tmp_path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with (
        pytest.raises(OSError, match="No space"),
        files.atomic_directory(target, overwrite=True, mark="old") as scratch,
    ):
        (scratch / "new").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]


def test_overwrite_replaces_the_whole(tmp_path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with (
        pytest.raises(ValueError, match="not empty: choose another, or pass --overwrite"),
        files.atomic_directory(target, mark="old"),
    ):
        pass
    with files.atomic_directory(target, overwrite=True, mark="old") as scratch:
        (scratch / "new").write_text("new")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["new", "out"]


def test_refusals_come_first(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a directory"):
        files.check_writable(tmp_path / "file", overwrite=True, mark="x")
    with pytest.raises(ValueError, match="not a writable directory"):
        files.check_writable(tmp_path / "file" / "below", overwrite=True, mark="x")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="not a writable directory"):
        files.check_writable(tmp_path / "new", overwrite=False, mark="x")


def test_only_an_earlier_output_is_replaced(tmp_path) -> None:
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(ValueError, match="not an earlier output .it has no results.json"):
        files.check_writable(tmp_path, overwrite=True, mark="results.json")
    files.check_writable(tmp_path, overwrite=True, mark="letters")


def test_text_is_replaced_or_kept(tmp_path, monkeypatch) -> None:
    path = tmp_path / "r.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "b")
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(Path(tmp_path).iterdir()) == [path]
